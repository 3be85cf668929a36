"""The house itself: how long its rooms are, what each of them says, and what importing one brings
along."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from common import cli

CODE = sorted((ROOT / "common").rglob("*.py"))
LINES, CLASS_LINES = 300, 150


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_no_file_in_common_and_no_class_is_longer_than_one_reads_at_once():
    long = {
        str(path.relative_to(ROOT)): n
        for path in CODE
        if (n := len(path.read_text().splitlines())) > LINES
    }
    for path in CODE:
        for node in ast.walk(parsed(path)):
            if (
                isinstance(node, ast.ClassDef)
                and (n := node.end_lineno - node.lineno + 1) > CLASS_LINES
            ):
                long[f"{path.relative_to(ROOT)}: {node.name}"] = n
    assert not long


def test_the_equations_bring_torch_along_and_nothing_else():
    """Who takes a method's equations need not have its models, rewards and trackers; and --help is
    there at once. What torch loads by itself does not count, and of torch's own parts only those do
    that take long."""
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
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] False True\n"


SCRIPTS = [
    ROOT / f"{name}.py"
    for name in ("grpo_base", "bpgo", "slas", "self_paced", "evaluate", "papers")
]


def public(body, prefix=""):
    """[(name, node)] of the functions, classes and methods that have no underscore; of Args the
    fields say it."""
    for node in body:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name[0] != "_"
            and node.name != "Args"
        ):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def test_every_public_function_and_class_says_what_it_is():
    silent = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*CODE, *SCRIPTS]
        for name, node in public(parsed(path).body)
        if not ast.get_docstring(node)
    ]
    assert not silent


@pytest.mark.parametrize("words", [("check",), ("format", "--check")])
def test_ruff_has_nothing_to_say(words):
    """Of the repository's own files; pyproject.toml has its rules, and the files that must have
    type hints."""
    kept = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    command = [sys.executable, "-m", "ruff", *words, *(kept or ["."])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name, number",
    [
        ("slas.py", 2),
        ("common/sde.py", 2),
        ("common/reporting/report.py", 2),
        ("common/rewards/x.py", 2),
        ("evaluation/bias.py", 2),
        ("lab/x.py", 0),
    ],
)
def test_functions_that_are_copied_or_called_need_type_hints(name, number):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "--stdin-filename", name, "-"],
        cwd=ROOT, input="def bare(x):\n    return x\n", capture_output=True, text=True,
    )  # fmt: skip
    assert len(re.findall("ANN(001|201)", done.stdout)) == number, done.stdout + done.stderr


def test_every_flag_of_every_script_is_read_somewhere():
    """As args.x, self.args.x and so on, in common/ or in the script itself; or taken by its name
    there."""

    def reads(path):
        nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)]
        return {
            n.attr for n in nodes if getattr(n.value, "id", getattr(n.value, "attr", "")) == "args"
        }

    args = cli.Args()
    of_rewards = cli.of_rewards(args)
    shared = {*cli.of_model(args), *of_rewards, *(f"judge_{name}" for name in of_rewards["judge"])}
    shared |= {name for path in CODE if path.name != "cli.py" for name in reads(path)}
    for path in SCRIPTS[:-1]:
        flags = {
            field.name for field in dataclasses.fields(importlib.import_module(path.stem).Args)
        }
        assert not flags - shared - reads(path), path.name
