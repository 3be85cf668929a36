"""What README and docs/ print: commands, links, headings, as a reader meets them."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import tyro
from conftest import ROOT

import bpgo
import evaluate
import grpo_base
import self_paced
import slas
from common import cli

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    + [
        ROOT / name
        for name in (
            "assets/README.md",
            "common/rewards/README.md",
            "benchmarks/RESULTS.md",
            "lab/README.md",
        )
    ]
)
SCRIPTS = {"grpo_base": grpo_base, "bpgo": bpgo, "slas": slas, "self_paced": self_paced}
STARTS = (
    "python ",
    "python3 ",
    "accelerate launch ",
    "bash ",
    "sbatch ",
    "pip ",
    *(f"{name}.py " for name in SCRIPTS),
)


def prose(text):
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"(?:(?<=\n\n)|\A)(?:(?: {4}.*)?\n)+", "\n", text)


def commands(text):
    """The command lines of a page, in blocks of code and between backticks, without comments and
    `...`."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(text))
    return [
        line
        for line in dict.fromkeys(lines)
        if line.startswith(STARTS) and line != "accelerate launch"
    ]


def words_of(command):
    """The words that a command is given by a shell, without what stands for more of the same."""
    words = [
        word for word in shlex.split(command, comments=True) if word not in ("...", "...]", "[RUN")
    ]
    return words[: words.index(">")] if ">" in words else words


def parsed(words, monkeypatch):
    """The settings of `SCRIPT.py flags`, by the script's own parser; nothing is run."""
    monkeypatch.setattr(sys, "argv", words)
    args = cli.parse(SCRIPTS[Path(words[0]).stem].Args, "about")
    cli.check(args)
    return args


def check_python(words, monkeypatch):
    """SCRIPT.py flags or -m MODULE flags: parsed by what it starts; my_method.py is a copy of
    grpo_base.py."""
    words = ["grpo_base.py" if words[0] == "my_method.py" else words[0], *words[1:]]
    if words[0] == "-m" and words[1] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
    elif words[0] == "-m" and (ROOT / words[1].split(".")[0]).is_dir():
        module = importlib.import_module(words[1])
        if hasattr(module, "Args"):
            tyro.cli(module.Args, args=words[2:])
        else:  # takes no flags, but folders or nothing
            assert not any(word.startswith("-") for word in words[2:])
    elif words[0] == "evaluate.py":
        monkeypatch.setattr(sys, "argv", words)
        cli.parse(evaluate.Args, "about", evaluate.defaults)
    elif Path(words[0]).stem in SCRIPTS:
        if words[1:] not in (
            ["--help"],
            ["--list-models"],
        ):  # these have tests of their own, and end the program
            parsed(words, monkeypatch)
    else:
        assert words[0] == "-m" or (ROOT / words[0]).is_file() and not words[1:]


def check_command(command, monkeypatch):
    """Raises what a reader would meet who types the command, as far as its words go: unknown flags,
    files that are not there."""
    words = words_of(command)
    if words[0] in ("python", "python3"):
        check_python(words[1:], monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        words = words[2:]
        while words[0].startswith("-"):
            assert words[0] in ("--config_file", "--num_processes"), words[0]
            assert words[0] == "--num_processes" or (ROOT / words[1]).is_file(), words[1]
            words = words[2:]
        check_python(words, monkeypatch)
    elif words[0] == "sbatch":
        at = words.index("configs/slurm.sh")
        assert words[1:at] in ([], ["--nodes", "2"])
        check_python(words[at + 1 :], monkeypatch)
    elif words[:2] == ["bash", "run.sh"]:
        if words[2:3] != ["test"]:
            check_python(["bpgo.py", *words[2:]], monkeypatch)
    elif words[0] == "pip":
        assert words[1] != "install" or words[2] != "-r" or (ROOT / words[3]).is_file()
    else:
        check_python(words, monkeypatch)


def links(text):
    """Targets of a page's links and pictures, outside code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "code", prose(text)))


def anchors(text):
    """What a page's headings are called in an address, as GitHub does it: lower case, letters,
    digits, hyphens."""
    found = []
    for title in re.findall(r"^#+ (.+)$", prose(text), re.M):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        name = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        again = sum(
            re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found
        )
        found.append(f"{name}-{again}" if again else name)
    return found
