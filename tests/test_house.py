"""The house itself: its layers, what each file says, and what importing one brings along."""

import ast
import dataclasses
import difflib
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from common.args import Args

CODE = sorted((ROOT / "common").rglob("*.py"))
SCRIPTS = [ROOT / f"{name}.py" for name in ("grpo_base", "bpgo", "slas", "self_paced")]
LAYERS = [
    {"sde", "loss", "groups", "errors"},
    {"args", "hub"},
    {"prompts"},
    {"models", "rewards", "reporting"},
    {"memory"},
    {"trainer"},
    {"cli"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path) for path in CODE}


def imports(path):
    """Modules of this project that a file imports: at its top, in functions, for type checkers."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def room_of(module):
    return module.split(".")[1]


def test_imports_run_down_the_layers():
    up = []
    for path in CODE:
        own = module_of(path)
        if own == "common":
            continue
        for other in imports(path):
            if other.split(".")[0] in (
                "evaluation",
                "worlds",
                "lab",
                "benchmarks",
                "tests",
                "papers",
            ):
                up.append(f"{own} imports {other}")
            if other.startswith("common.") and room_of(other) != room_of(own):
                if LAYER[room_of(other)] >= LAYER[room_of(own)]:
                    up.append(f"{own} imports {other}")
    assert not up


def test_no_cycle_of_imports():
    edges = {module_of(path): {o for o in imports(path) if o in MODULES} for path in CODE}
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, " -> ".join([*under_way, module])
        if module in done:
            return
        under_way.append(module)
        for other in edges[module] - {module}:
            visit(other)
        under_way.pop()
        done.add(module)

    for module in edges:
        visit(module)


def test_no_parameter_is_called_run():
    named = []
    for path in [*CODE, *SCRIPTS, ROOT / "evaluate.py", *(ROOT / "evaluation").glob("*.py")]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.arg) and node.arg == "run":
                named.append(f"{path.name}: line {node.lineno}")
    assert not named


def test_no_class_is_put_together_from_mixins():
    """Of classes of this project, one at most is inherited; the flags are dataclasses."""
    several = []
    for path in CODE:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and len(node.bases) > 1 and path.name != "args.py":
                several.append(f"{path.name}: {node.name}")
    assert not several


# --- The diff is the paper ---


def sections(text):
    """{title: text} of main, by its banners."""
    main = text[text.index("def main(") : text.index('if __name__ == "__main__"')]
    titles = re.findall(r"# --- (\w+) ---", main)
    parts = re.split(r"\n *# --- \w+ ---\n", main)
    return dict(zip(["", *titles], parts))


def own_names(path):
    """Names of the functions and classes at the top of a script, with their code."""
    text = path.read_text()
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@pytest.mark.parametrize("path", SCRIPTS[1:], ids=lambda path: path.stem)
def test_methods_differ_where_their_docstring_says(path):
    base, script = SCRIPTS[0].read_text(), path.read_text()
    lines = list(difflib.unified_diff(base.splitlines(), script.splitlines(), n=0, lineterm=""))
    changed = [line for line in lines[2:] if line[0] in "+-" and line[1:].strip()]
    print(f"{path.stem}: {len(changed)} changed lines")
    theirs, ours = sections(base), sections(script)
    assert list(theirs) == list(ours) and len(ours) == 8
    about = ast.get_docstring(ast.parse(script)).split("\n\n")[1]
    named = set(re.findall("|".join(filter(None, ours)), about))
    differ = {title for title in ours if ours[title] != theirs[title]}
    assert differ == named
    functions = own_names(SCRIPTS[0])
    equal = {name for name, text in own_names(path).items() if functions.get(name) == text}
    assert {"combine_scores", "compute_advantages"} - equal <= {
        "combine_scores"
    } or path.stem == "slas"


# --- What each file says, and what it brings along ---


def public(body, prefix=""):
    """[(name, node)] of functions, classes and methods without an underscore, but Args."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node.name[0] != "_" and node.name != "Args":
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from public(node.body, f"{prefix}{node.name}.")


def test_every_public_function_and_class_has_a_docstring():
    silent = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*CODE, *SCRIPTS, ROOT / "evaluate.py"]
        for name, node in public(parsed(path).body)
        if not ast.get_docstring(node)
    ]
    assert not silent


def test_the_equations_bring_torch_along_and_nothing_else():
    """What torch loads by itself does not count, and of its own parts only those that are slow."""
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        from grpo_base import compute_advantages
        from slas import TrustRegion, compute_advantages
        from bpgo import contrastive_rewards, reliability_weights
        from self_paced import combine_scores, hoyer_sparsity, stage_weights
        from common import groups, loss, sde
        names = sys.modules.keys() - before
        new = {name: getattr(sys.modules[name], "__file__", None) or "" for name in names}
        packages = {name.partition(".")[0] for name, file in new.items() if "site-packages" in file}
        print(sorted(packages - {"torch"}), "torch.distributed.fsdp" in new, "slas" in new)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] False True\n"


@pytest.mark.parametrize("words", [("check",), ("format", "--check")])
def test_ruff_has_nothing_to_say(words):
    """Of the repository's files; pyproject.toml has its rules."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    command = [sys.executable, "-m", "ruff", *words, *(listed.stdout.split() or ["."])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name, number",
    [
        ("slas.py", 2),
        ("common/sde.py", 2),
        ("common/reporting/page.py", 2),
        ("common/rewards/x.py", 2),
        ("evaluation/bias.py", 2),
        ("lab/x.py", 0),
    ],
)
def test_functions_that_are_copied_or_called_need_type_hints(name, number):
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
    done = subprocess.run(
        [*command, "--stdin-filename", name, "-"],
        cwd=ROOT,
        input="def bare(x):\n    return x\n",
        capture_output=True,
        text=True,
    )
    assert len(re.findall("ANN(001|201)", done.stdout)) == number, done.stdout + done.stderr


def test_every_flag_of_every_script_is_read_somewhere():
    """As args.x or self.args.x in common/ or in the script itself, as self.x in common/args.py."""

    def reads(path):
        owners = ("args", "self") if path.name == "args.py" else ("args",)
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute):
                owner = node.value
                if getattr(owner, "id", getattr(owner, "attr", "")) in owners:
                    yield node.attr
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                yield getattr(node.args[1], "value", "")  # a flag that evaluate.py lacks

    shared = {name for path in CODE if path.name != "cli.py" for name in reads(path)}
    shared |= {field.name for field in dataclasses.fields(Args) if field.name.startswith("judge_")}
    for path in [*SCRIPTS, ROOT / "evaluate.py"]:
        flags = {f.name for f in dataclasses.fields(importlib.import_module(path.stem).Args)}
        assert not flags - shared - set(reads(path)), path.name


# --- Text is UTF-8, whatever the locale ---

TEXT_FILES = {"open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
TEXT_FILES |= {"TextIOWrapper", "FileHandler", "basicConfig", "run", "Popen", "check_output"}
OF_BYTES = {"os", "Image"}  # os.open, Image.open
OWN = {"files"}  # common.reporting.files.write_text, which is UTF-8


def opens_text(call):
    """Whether a call opens a text file, or a pipe to another program in text mode."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    method = isinstance(call.func, ast.Attribute)
    if name not in TEXT_FILES or (name == "open" and owner in OF_BYTES):
        return False
    if name in ("run", "Popen", "check_output"):
        return bool({"text", "universal_newlines"} & keywords.keys())
    if name in ("read_text", "write_text"):
        return method and owner not in OWN
    if name in ("FileHandler", "TextIOWrapper", "basicConfig"):
        return name != "basicConfig" or "filename" in keywords
    place = 1 if name == "fdopen" or not method else 0  # of the mode
    if name.endswith("TemporaryFile"):
        place, default = 0, "w+b"
    else:
        default = "r"
    mode = keywords.get("mode", call.args[place] if len(call.args) > place else None)
    return "b" not in (mode.value if isinstance(mode, ast.Constant) else default)


def without_encoding(code):
    """The lines of code that open text in the encoding of the locale."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if opens_text(call) and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]


@pytest.mark.parametrize(
    "code, wrong",
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='a', newline='')", True),
        ("open(path, 'rb')", False),
        ("path.open('a')", True),
        ("path.open('wb')", False),
        ("gzip.open(path, 'rt')", True),
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("(a / b).write_text(words)", True),
        ("write_text(path, words)", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("os.fdopen(number, 'w')", True),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(words, text=True)", True),
        ("subprocess.run(words)", False),
        ("logging.FileHandler(path)", True),
    ],
)
def test_what_opens_text_in_the_encoding_of_the_locale(code, wrong):
    assert bool(without_encoding(code)) == wrong


def test_text_is_opened_as_utf_8():
    rooms = ("common", "evaluation", "worlds", "lab", "benchmarks")
    paths = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    assert len(paths) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in paths
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # ASCII
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["files and streams", "streams"],
)
def test_a_run_in_a_locale_without_utf_8(locale, tmp_path):
    """Prompts are read, the page is written, and lines are printed, all with other letters."""
    (tmp_path / "prompts.txt").write_text("🦊 läuft → 中\n", encoding="utf-8")
    settings = {"prompts": "läuft 中", "script": "bpgo"}
    (tmp_path / "config.json").write_text(json.dumps(settings, ensure_ascii=False), "utf-8")
    rows = [{"step": step, "reward_mean": 0.5 + step, "eval_reward": step} for step in range(2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code = """if True:
        import sys
        from pathlib import Path
        from common import errors
        from common.prompts import read_prompts
        from common.reporting import page

        def main(folder):
            (prompt,) = read_prompts(folder / "prompts.txt")
            assert page.write(folder).read_bytes().decode().count("l\\xe4uft \\u4e2d")
            print(prompt)
            print(prompt, file=sys.stderr)
            raise errors.InputError(f"prompts: {prompt} is not of this world")

        errors.run(main, Path(sys.argv[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=ROOT,
        env={**os.environ, **locale},
        capture_output=True,
    )
    assert done.returncode == 2, done.stderr.decode(errors="replace")
    assert done.stdout.startswith(b"\\U0001f98a l") and b"\\u4e2d" in done.stdout
    assert b"error: prompts: \\U0001f98a l" in done.stderr and b"Traceback" not in done.stderr
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "läuft 中" in html and "0.500 → 1.500" in html
