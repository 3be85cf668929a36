"""docs/copying.md: the files lie in an empty folder, and what the page says is done there, with
torch alone."""

import ast
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import bpgo
from lab import lift

TEXT = (ROOT / "docs/copying.md").read_text()
NEEDED = set(re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M))
OTHERS = NEEDED - {"torch", "numpy"} | {"open_clip", "PIL"}
RUN = """
import runpy, sys
import torch._dynamo  # an optimizer's, which looks for many packages; numpy is torch's own
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {others}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, NotInstalled())
for name in {files}:
    print(name, end=" ", flush=True)
    runpy.run_path(name)
"""


def files():
    """{name: text} of the page's files: blocks of Python, and those that its patches make of
    them."""
    made = {}
    for block in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", TEXT, re.M | re.S):
        made[block[0]] = block[1]
    for old, new, patch in re.findall(
        r"^```diff\n--- (\S+)\n\+\+\+ (\S+)\n(.*?)^```", TEXT, re.M | re.S
    ):
        made[new] = patched(made[old], patch)
    return made


def patched(text, patch):
    """The text with each part of a patch, after a line of @@, in the place of the lines that it
    names."""
    for part in patch.split("@@\n")[1:]:
        lines = part.splitlines(keepends=True)
        before, after = (
            "".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +")
        )
        assert text.count(before) == 1, part
        text = text.replace(before, after)
    return text


def module(name):
    """One of the page's files, imported from its text."""
    found = SimpleNamespace()
    exec(compile(files()[name], name, "exec"), vars(found))
    return found


def imported(source):
    """The first words of the modules that a file imports."""
    parts = list(ast.walk(ast.parse(source)))
    names = [name.name for part in parts if isinstance(part, ast.Import) for name in part.names]
    names += [part.module for part in parts if isinstance(part, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_every_method_trains_in_a_folder_of_its_own_with_torch_alone(tmp_path):
    for name in ("sde", "loss", "groups"):
        shutil.copy(ROOT / f"common/{name}.py", tmp_path)
    for name in ("grpo_base", "bpgo", "slas", "self_paced"):
        (tmp_path / f"{name}_equations.py").write_text(lift.lifted(name))
    loops = [name for name in files() if name != "flat.py"]
    assert loops == ["loop.py", "grpo.py", "slas.py", "self_paced.py", "bpgo.py"]
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    for path in tmp_path.iterdir():
        assert imported(path.read_text()) <= {
            "torch",
            "math",
            "collections",
            *(other.stem for other in tmp_path.iterdir()),
        }, path.name
    (tmp_path / "all.py").write_text(RUN.format(others=OTHERS, files=["loss.py", *loops]))
    done = subprocess.run(
        [sys.executable, "-E", "all.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\w+\.py) (\d\.\d+) -> (\d\.\d+)$", done.stdout, re.M)
    assert [name for name, _, _ in found] == loops
    ends = {name: float(end) for name, start, end in found if float(end) > float(start) + 0.1}
    # -1 for no score costs so much
    assert list(ends) == loops and ends["grpo.py"] > ends["loop.py"] + 0.05


def test_the_functions_are_the_scripts_own():
    for name in ("grpo_base", "bpgo", "slas", "self_paced"):
        text, source = lift.lifted(name), (ROOT / f"{name}.py").read_text()
        defined = re.findall(r"^def \w+\(.*?(?=^def |\Z)", text, re.M | re.S)
        assert defined and all(part.strip() in source for part in defined)
    assert "def reliability_weights" in lift.lifted("bpgo")
    assert "def stage_weights" in lift.lifted("self_paced")


def test_what_needs_more_than_torch_stays():
    source = "import torch\nimport x\ndef f(a):\n  return g(a)\ndef g(a):\n  return x.h(a)\n"
    source += "def k(x):\n  return max(x)\n"
    assert lift.functions(source) == {"f": {"g"}, "g": {"x"}, "k": set()}
    assert lift.functions("def f():\n  import x\n  return x\n") == {}


def test_rows_become_groups_and_rows_again():
    flat = module("flat.py")
    prompts = [7, 3, 3, 7, 7, 5]
    rows, values = flat.groups_of(prompts), torch.arange(6.0)
    assert rows.tolist() == [[0, 3, 4], [1, 2, -1], [5, -1, -1]]
    groups = flat.to_groups(values, rows)
    assert groups.nan_to_num(-1).tolist() == [[0, 3, 4], [1, 2, -1], [5, -1, -1]]
    assert torch.equal(flat.to_rows(groups, rows), values)


@pytest.mark.parametrize("steps", [3, 60])
def test_the_running_mean_is_bpgos(steps):
    theirs, ours = bpgo.RunningMeanPrior(), module("flat.py").RunningMean()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        reward = torch.rand(2, 4, generator=generator)
        reward[0, 0] = math.nan
        reward = reward * math.nan if step == 1 else reward  # a step without any score
        expected = theirs.expect(["a", "b"], reward)
        assert torch.equal(expected, torch.full((2, 1), ours.expect(reward)))
