"""Proxies of the environment that the client of the hub cannot use: one line names the variable."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = {  # what asks the hub: its part of the line
    "a model": (["--model", "nobody/nothing"], "model nobody/nothing: the proxy"),
    "prompts": (
        ["--prompts", "hub:nobody/nothing/a.txt"],
        "prompts: hub:nobody/nothing/a.txt: a.txt of the data set nobody/nothing: the proxy",
    ),
    "the upload": (["--push-to-hub", "nobody/nothing"], "--push-to-hub nobody/nothing: the proxy"),
}


@pytest.mark.parametrize("words, place", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    "proxy, value, said",
    [
        ("ALL_PROXY", "socks5://localhost:9", "needs the package socksio: pip install"),
        ("https_proxy", "gopher://localhost:9", "cannot be used (ValueError: Unknown scheme"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(words, place, proxy, value, said, tmp_path):
    environment = {k: v for k, v in os.environ.items() if "HF_" not in k and "PROXY" not in k}
    environment |= {"HF_HOME": str(tmp_path), proxy: value, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "grpo_base.py"), *words, "--output", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{place} in {proxy} {said}" in line and f"unset {proxy}" in line
