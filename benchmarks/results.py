"""benchmarks/RESULTS.md: one part for each benchmark, with the machine that it ran on."""

import platform
import re
import subprocess
from pathlib import Path

import diffusers
import torch

RESULTS = Path(__file__).with_name("RESULTS.md")


def commit():
    """The commit that is checked out, "unknown" without git."""
    words = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(
            words, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(title, lines):
    """Puts the lines under `## title`, in place of what stood there."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}, {device}, "
        f"commit {commit()}"
    )
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Measured results\n"
    old = re.compile(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", re.S)
    RESULTS.write_text(
        old.sub("", text) + "\n".join(["", f"## {title}", "", machine, "", *lines, ""]),
        encoding="utf-8",
    )
