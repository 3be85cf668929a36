"""What a run survives: signals, broken checkpoints, a full disk."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, metrics, weights

import bpgo
import grpo_base
from common import arguments, checkpoints, errors, models
from common.errors import InputError, RunError
from common.runtime import Runtime
from lab import kills

SMALL = (
    "--prompts-per-step 2 --group-size 4 --sampling-steps 4 --tracker none --eval-every 0 --sample-every 0 --steps 6 "
    "--save-every 4"
).split()


def start(folder, *flags, script="grpo_base.py"):
    command = [sys.executable, script, "--output", str(folder), *SMALL, *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(folder, number, process):
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < number:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(folder)
    assert process.wait() == 0, process.communicate()[0]
    return folder


def same(left, right):
    """Metrics and weights of two finished runs, bit for bit."""
    assert metrics(left) == metrics(right)
    for name in ("transformer", "optimizer"):
        ours, theirs = weights(left, 6, name), weights(right, 6, name)
        flat = [value for value in torch.utils._pytree.tree_leaves(ours)]
        for a, b in zip(flat, torch.utils._pytree.tree_leaves(theirs), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b


# --- Kills ---


def test_a_run_killed_at_any_moment_goes_on_exactly(train, tmp_path):
    """The last while a checkpoint is being written; `python -m lab.kills` does twenty."""
    settings = dict(steps=kills.STEPS, save_every=1, learning_rate=1e-3)
    whole, _ = train(**settings)
    rng = random.Random(1)
    for number in range(3):
        folder = tmp_path / str(number)
        kills.kill(kills.start("grpo_base.py", folder), folder, rng, writing=number == 2)
        train(output=str(folder), resume="latest", **settings)
        assert kills.same(folder, whole)


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(whole, tmp_path, monkeypatch, number):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_steps(folder, 1, process)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number and "Traceback" not in said
    steps = len(metrics(folder))
    assert f"stopped: {number.name}: stopped after {steps} steps" in said and 1 <= steps < 6
    assert f"{steps} steps are saved; go on with --output {folder} --resume latest" in said
    assert checkpoints.read(checkpoints.newest_first(folder)[0])[0] == steps
    monkeypatch.setattr(sys, "argv", ["grpo_base.py", "--output", str(folder), *SMALL, "--resume", "latest"])
    grpo_base.main(arguments.parse(grpo_base.Args, ""))
    same(folder, whole)


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path / "run", "--steps", "1000", "--group-size", "64")
    wait_for_steps(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_signals_are_as_before_after_a_run(train):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- Checkpoints ---


def test_only_the_latest_checkpoints_are_kept(train):
    folder, _ = train(steps=5, save_every=1, keep_checkpoints=2)
    assert [path.name for path in checkpoints.newest_first(folder)] == ["step_000005", "step_000004"]
    folder, _ = train(steps=5, save_every=2, output="all")
    assert [path.name for path in checkpoints.newest_first(folder)] == ["step_000005", "step_000004", "step_000002"]


def test_a_full_disk_leaves_the_earlier_checkpoints(train, monkeypatch):
    real, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) > 3:  # the second checkpoint's second file
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="cannot save step 2 in .*No space left on device.*is the disk full"):
        train(steps=3, save_every=1)
    monkeypatch.setattr(torch, "save", real)
    folder, rows = train(steps=3, save_every=1, resume="latest")
    assert rows == train(steps=3, save_every=1, output="whole")[1]
    assert not list((folder / "checkpoints").glob(".*"))


def test_checkpoints_hold_no_code(train, tmp_path):
    """A pickle that would run something when it is loaded is refused, not run."""
    folder, _ = train(steps=2, save_every=1)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save(Evil(), folder / "checkpoints" / "step_000002" / "transformer.pt")
    train(steps=2, save_every=1, resume="latest")  # falls back to step 1
    assert not (tmp_path / "ran").exists()


# --- Code that a model brings ---


@pytest.fixture
def with_code(tmp_path):
    """tiny-flux with a transformer whose class comes as a file of the repository."""
    folder = tmp_path / "with_code"
    shutil.copytree(models.ASSETS / "tiny-flux", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["brought", "Brought"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer/brought.py").write_text(
        "from diffusers import FluxTransformer2DModel\n\n\nclass Brought(FluxTransformer2DModel):\n    pass\n"
    )
    return str(folder)


def test_code_of_a_repository_runs_only_if_it_is_trusted(with_code, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="its transformer brings Python code; --trust-remote-code runs it"):
        models.load(with_code, torch.float32)
    trusted = models.load(with_code, torch.float32, trust_remote_code=True)
    assert type(trusted.pipe.transformer).__name__ == "Brought"


# --- Weights that are no numbers ---


def test_weights_that_are_no_numbers_are_named_and_never_saved(train, monkeypatch):
    folder, _ = train(steps=1, save_every=1)
    real = Runtime.update

    def diverge(run):
        norm = real(run)
        if run.step == 1:
            next(iter(run.weights())).data.fill_(torch.nan)
        return norm

    monkeypatch.setattr(Runtime, "update", diverge)
    with pytest.raises(RunError, match="the samples are no numbers: the weights have diverged. Go on"):
        train(steps=4, save_every=0, resume="latest")
    errors.rescues[0]()
    assert [path.name for path in checkpoints.newest_first(folder)] == ["step_000001"]
    monkeypatch.undo()
    assert len(train(steps=2, save_every=0, resume="latest")[1]) == 2


def test_a_gradient_that_is_no_number_costs_its_own_step(train, monkeypatch, capsys):
    """The finished steps are saved without a word of the broken one, though the prior has seen its rewards."""
    settings = dict(script=bpgo, steps=2, save_every=0, updates_per_step=2, learning_rate=1e-3)
    whole, rows = train(**settings, output="whole")
    real, passes = Runtime.update, []

    def poison(run, update):
        passes.append(run.step)
        if passes.count(1) == update:
            run.weights()[0].grad.fill_(torch.nan)
        return real(run)

    def broken(update):
        passes.clear()
        monkeypatch.setattr(Runtime, "update", lambda run: poison(run, update))
        with pytest.raises(SystemExit):
            errors.run(lambda _: train(**settings, output=f"at {update}"), None)
        monkeypatch.undo()
        return capsys.readouterr()

    said = broken(1)
    assert said.err.endswith("error: the gradient norm of step 1 is nan: lower --learning-rate\n")
    assert "1 steps are saved; go on with" in said.out
    folder, again = train(**settings, output="at 1", resume="latest")
    assert again == rows
    assert all(torch.equal(value, weights(folder, 2)[name]) for name, value in weights(whole, 2).items())
    said = broken(2)  # the first update has changed the weights
    assert "saved" not in said.out and not checkpoints.newest_first(folder.with_name("at 2"))


# --- A folder that nobody can write to ---


@pytest.mark.parametrize(
    "folder, reason", [("file/run", "Not a directory"), ("x" * 300, "File name too long")], ids=["file", "long"]
)
def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(train, tmp_path, folder, reason):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"--output \S*{folder}: cannot write there \({reason}"):
        train(output=folder)
