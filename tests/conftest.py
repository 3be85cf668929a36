import os
import sys
from pathlib import Path

if workers := os.getenv(
    "PYTEST_XDIST_WORKER_COUNT"
):  # they share the cores; before torch is imported
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(workers)))

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpus import wants_gpu

# Elsewhere a GPU would change dtypes, kernels and rounding. Before torch is imported; the workers
# of pytest-xdist inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ and not wants_gpu(sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import json
import re
import shutil
import signal
import socket
import subprocess

import pytest
import torch
from accelerate.state import AcceleratorState

import grpo_base
from common.args import defaults
from common.trainer import processes

ROOT = Path(__file__).resolve().parents[1]
# tests send these, and their processes inherit what a shell's background job and nohup ignore
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
TIMINGS = ("rollout_seconds", "reward_seconds", "update_seconds", "samples_per_second")


def pytest_collection_modifyitems(items):
    """The long ones begin, so that no worker waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and -m gpu: bash run.sh test -m gpu -n0")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    item.failed = getattr(item, "failed", False) or report.failed


@pytest.fixture
def tmp_path(tmp_path, request):
    """pytest's own, gone after a test that passed: all together would leave 15 GB."""
    yield tmp_path
    if not request.node.failed:
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs a script's main here on small settings; returns (folder, rows of metrics.jsonl without
    the timings)."""

    def run(script=grpo_base, output="run", **settings):
        small = dict(
            prompts_per_step=2,
            group_size=4,
            sampling_steps=4,
            micro_batch=8,
            minibatches=1,
            tracker="none",
        )
        small |= dict(steps=2, eval_every=0, sample_every=0)
        monkeypatch.setattr(sys, "argv", [script.__file__])
        folder = tmp_path / output
        script.main(defaults(script.Args, **{**small, "output": str(folder), **settings}))
        return folder, metrics(folder)

    return run


@pytest.fixture
def bf16(monkeypatch):
    """Inside, the passes are in bfloat16, as on GPUs."""
    monkeypatch.setitem(processes.PRECISION, "cpu", ("bf16", torch.bfloat16))
    AcceleratorState._reset_state(
        reset_partial_state=False
    )  # it keeps the precision of the first run
    yield
    AcceleratorState._reset_state(reset_partial_state=False)


def no_json(constant):
    raise ValueError(f"{constant} is no JSON")


def documented():
    """A pattern of the metrics that docs/metrics.md has: NAME is any reward's, N a number."""
    cells = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    names = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
    return re.compile("|".join(name.replace("NAME", ".+").replace("_N", r"_\d+") for name in names))


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=no_json) for line in lines]
    assert (
        new := {name for row in rows for name in row if not documented().fullmatch(name)}
    ) == set(), new
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def weights(folder, step, name="transformer"):
    return torch.load(folder / "checkpoints" / f"step_{step:06d}" / f"{name}.pt", weights_only=True)


def launch(processes, *words, config=ROOT / "configs/ddp.yaml"):
    """What `launched` started, finished."""
    process = launched(processes, *words, config=config)
    out, error = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def launched(processes, *words, config=ROOT / "configs/ddp.yaml"):
    """accelerate launch, as a user does it; on a machine without GPUs its processes meet over
    gloo."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"--config_file": config, "--num_processes": processes, "--main_process_port": port}
    flags = [
        str(word) for pair in flags.items() for word in pair
    ]  # the folder may have a space in its name
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*accelerate, *words], env=environment, **pipes)
