"""benchmarks/RESULTS.md: one part for each benchmark, with the machine that it ran on."""

import platform
import re
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")


def write(title, lines):
    """Puts the lines under `## title`, in place of what stood there."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}"
    text = RESULTS.read_text() if RESULTS.exists() else "# Measured results\n"
    old = re.compile(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", re.S)
    RESULTS.write_text(old.sub("", text) + "\n".join(["", f"## {title}", "", machine, "", *lines, ""]))
