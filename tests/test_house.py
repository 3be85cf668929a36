"""The house itself: how long its rooms are, what each of them says, and what importing one brings along."""

import ast
import subprocess
import sys

from conftest import ROOT

CODE = sorted((ROOT / "common").rglob("*.py"))
LINES, CLASS_LINES = 300, 150


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_no_file_in_common_and_no_class_is_longer_than_one_reads_at_once():
    long = {str(path.relative_to(ROOT)): n for path in CODE if (n := len(path.read_text().splitlines())) > LINES}
    for path in CODE:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and (n := node.end_lineno - node.lineno + 1) > CLASS_LINES:
                long[f"{path.relative_to(ROOT)}: {node.name}"] = n
    long.pop("common/models/family.py: Family", None)
    assert not long


def test_the_equations_bring_torch_along_and_nothing_else():
    """Who takes a method's equations need not have its models, rewards and trackers; and --help is there at once. What
    torch loads by itself does not count, and of torch's own parts only those do that take long."""
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        from grpo_base import compute_advantages, keep_rows, split_rows
        from slas import compute_advantages
        from bpgo import contrastive_rewards, reliability_weights
        from self_paced import combine_scores, hoyer_sparsity, stage_weights
        from common import fisher, loss, sde
        new = {name: getattr(sys.modules[name], "__file__", None) or "" for name in sys.modules.keys() - before}
        packages = {name.partition(".")[0] for name, file in new.items() if "site-packages" in file}
        print(sorted(packages - {"torch"}), "torch.distributed.fsdp" in new, "slas" in new)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] False True\n"
