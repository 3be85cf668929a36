"""What a run survives: signals, broken checkpoints, a full disk."""

import errno
import fcntl
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, metrics, weights

import bpgo
from benchmarks import kills
from common import errors, models, sde
from common.errors import InputError, RunError
from common.models.flux import Flux
from common.rewards import rewards
from common.trainer import Policy, checkpoint_files, checkpoints, disk, evaluator, export

SMALL = (
    "--prompts-per-step 2 --group-size 4 --sampling-steps 4 --minibatches 1 --tracker none "
    "--eval-every 0 "
    "--sample-every 0 --steps 6 --save-every 4"
).split()


def start(folder, *flags, script="grpo_base.py"):
    command = [sys.executable, script, "--output", str(folder), *SMALL, *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(folder, number, process):
    while (
        not (folder / "metrics.jsonl").exists()
        or len((folder / "metrics.jsonl").read_text().splitlines()) < number
    ):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


# --- Kills ---


@pytest.mark.long
def test_a_run_killed_at_any_moment_goes_on_exactly(train, tmp_path):
    """The last while a checkpoint is being written; `python -m benchmarks.kills` does twenty."""
    settings = dict(steps=kills.STEPS, save_every=1, learning_rate=1e-3)
    whole, _ = train(**settings)
    rng = random.Random(1)
    for number, moment in enumerate(("a step", "a step", "a checkpoint")):
        folder = tmp_path / str(number)
        kills.kill(kills.start("grpo_base", folder), folder, rng, moment)
        train(output=str(folder), resume="latest", **settings)
        assert kills.same(folder, whole)


# --- Signals ---


@pytest.fixture
def raising():
    """What would end this process raises instead, should nobody catch it."""

    def fail(number, frame):
        raise AssertionError(f"signal {number} was not caught")

    numbers = signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, fail) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def before_updates(monkeypatch, action):
    """Call action(number of the update, policy) before each optimizer step of a run."""
    honest, updates = Policy.step, []

    def step(policy):
        action(len(updates), policy)
        updates.append(1)
        honest(policy)

    monkeypatch.setattr(Policy, "step", step)


def signalled(train, monkeypatch, numbers, step=1, **settings):
    """A run that gets signals in the middle of a step; returns its exit code."""

    def send(update, policy):
        for number in numbers if update == step else ():
            os.kill(os.getpid(), number)

    before_updates(monkeypatch, send)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda _: train(save_every=0, learning_rate=1e-3, **settings), None)
    monkeypatch.undo()
    return ended.value.code


@pytest.mark.long
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    train, monkeypatch, capfd, tmp_path, raising
):
    """In any step, the last one too: what comes after it is left to the next start."""
    settings = dict(steps=3, save_every=0, learning_rate=1e-3)
    whole, rows = train(output="whole", **settings)
    for number, step in ((signal.SIGINT, 0), (signal.SIGHUP, 1), (signal.SIGTERM, 2)):
        folder = tmp_path / number.name
        capfd.readouterr()
        assert (
            signalled(train, monkeypatch, [number], step=step, output=number.name, steps=3)
            == 128 + number
        )
        said = capfd.readouterr()
        assert f"stopped: {number.name}: stopped after {step + 1} steps\n" in said.err
        assert f"{step + 1} steps are saved" in said.out
        assert f"--output {folder} --resume latest" in said.out
        assert (
            checkpoint_files.read(checkpoint_files.newest_first(folder)[0])[0]
            == len(metrics(folder))
            == step + 1
        )
        assert not (folder / "export").exists()
        assert train(output=number.name, resume="latest", **settings)[1] == rows
        assert all(
            torch.equal(value, weights(folder, 3)[name])
            for name, value in weights(whole, 3).items()
        )
        assert (folder / "export").exists()


def assert_stops_in(room, name, number, train, monkeypatch, capfd, **settings):
    """A SIGTERM in the call with this number of a function, in the second of three steps, ends the
    run there, and it goes on to the same numbers and weights."""
    settings |= dict(script=bpgo, steps=3, save_every=0, learning_rate=1e-3)
    whole, rows = train(output="whole", **settings)
    honest, calls = getattr(room, name), []

    def interrupted(*words, **named):
        calls.append(words)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*words, **named)

    monkeypatch.setattr(room, name, interrupted)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda _: train(**settings), None)
    assert ended.value.code == 128 + signal.SIGTERM and len(calls) == number
    assert "stopped: SIGTERM: stopped after 1 steps\n" in capfd.readouterr().err
    monkeypatch.undo()
    folder, again = train(resume="latest", **settings)
    assert again == rows
    assert all(
        torch.equal(value, weights(folder, 3)[name]) for name, value in weights(whole, 3).items()
    )


@pytest.mark.long
def test_a_signal_in_a_rollout_does_not_wait_for_its_end(train, monkeypatch, capfd, raising):
    """The rows under way are finished, and the step is begun anew: with BPGO, whose prior moves in
    every step."""
    assert_stops_in(sde, "rollout", 6, train, monkeypatch, capfd, micro_batch=2)  # of four a step


@pytest.mark.long
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(train, monkeypatch, capfd, raising):
    """In that of the initial weights, for a prior, when those of a LoRA are off: what is saved are
    the trained ones."""
    small = dict(micro_batch=4, reward_batch=4, prior="sft", lora_rank=2)
    assert_stops_in(evaluator, "sample", 3, train, monkeypatch, capfd, **small)  # of two a step


@pytest.mark.long
def test_long_steps_are_saved_more_often(train, monkeypatch):
    monkeypatch.setattr(disk, "AUTO_STEPS", 3)
    folder, _ = train(steps=4)
    assert [path.name for path in checkpoint_files.newest_first(folder)] == [
        "step_000004",
        "step_000003",
    ]
    monkeypatch.setattr(checkpoints, "AUTO_SECONDS", 0.0)
    folder, _ = train(steps=4, output="long")
    assert len(checkpoint_files.newest_first(folder)) == 4


OUT_OF_MEMORY = {
    "reward verifier": (rewards, "scores_of", "lower --reward-batch"),
    "the VAE": (Flux, "pixels", "lower --decode-batch"),
    "the rollout": (sde, "rollout", "lower --micro-batch or --prompts-per-step"),
    "the update": (Policy, "backward", "lower --micro-batch, add --gradient-checkpointing"),
}


@pytest.mark.parametrize("place", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_with_the_flags_that_help(train, monkeypatch, capfd, place):
    folder, _ = train(steps=1)
    owner, name, cure = OUT_OF_MEMORY[place]
    honest, calls = getattr(owner, name), []

    def fails(*words, **named):
        calls.append(words)
        if len(calls) > 1:  # the first call tries the reward or the VAE out
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return honest(*words, **named)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda _: train(steps=3, resume="latest"), None)
    said = capfd.readouterr().err
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert ended.value.code == 1 and "Traceback" not in said
    what = "CUDA out of memory. Tried to allocate 3 GiB"
    assert line.startswith(f"error: out of memory in {place} ({what}); {cure}")
    assert line.endswith(f"(traceback: {folder}/error.log)")
    assert [path.name for path in checkpoint_files.newest_first(folder)][-1] == "step_000001"


def test_a_second_interrupt_ends_at_once_with_one_line(train, monkeypatch, capfd, tmp_path):
    assert signalled(train, monkeypatch, [signal.SIGINT, signal.SIGINT], steps=3) == 130
    said = capfd.readouterr().err
    assert "stopped: SIGINT: at once" in said and "Traceback" not in said
    assert len(metrics(tmp_path / "run")) == 1


def test_an_interrupt_in_the_export_is_one_line_and_leaves_the_export_before(
    train, monkeypatch, capfd
):
    folder, _ = train(steps=1)
    before = {path: path.read_bytes() for path in (folder / "export").rglob("*") if path.is_file()}
    real = export._save_pipeline

    def save(*words):
        real(*words)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(export, "_save_pipeline", save)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda _: train(steps=2, learning_rate=1e-2, resume="latest"), None)
    said = capfd.readouterr().err
    assert (
        ended.value.code == 130 and "stopped: SIGINT: at once" in said and "Traceback" not in said
    )
    assert {
        path: path.read_bytes() for path in (folder / "export").rglob("*") if path.is_file()
    } == before
    assert not (folder / ".export.tmp").exists()
    monkeypatch.undo()
    train(steps=2, learning_rate=1e-2, resume="latest")
    assert (
        folder / "export/transformer/diffusion_pytorch_model.safetensors"
    ).read_bytes() not in before.values()


@pytest.mark.long
def test_a_closed_terminal_saves(tmp_path):
    """The terminal goes, and with it all that the run can write to."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "grpo_base.py",
        "--output",
        str(tmp_path / "run"),
        *SMALL,
        "--steps=1000",
    ]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    owns = dict(start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    process = subprocess.Popen(command, cwd=ROOT, **streams, **owns)
    os.close(theirs)
    while not (tmp_path / "run/metrics.jsonl").exists() or not metrics(tmp_path / "run"):
        if select.select([ours], [], [], 0.1)[0]:
            os.read(ours, 4096)
        assert process.poll() is None
    os.close(ours)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert checkpoint_files.read(checkpoint_files.newest_first(tmp_path / "run")[0])[0] == len(
        metrics(tmp_path / "run")
    )


@pytest.mark.long
def test_a_second_signal_ends_at_once(tmp_path):
    process = start(
        tmp_path / "run", "--steps", "1000", "--group-size", "64", "--micro-batch", "128"
    )
    wait_for_steps(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_the_notice_of_a_cluster_saves_and_may_come_twice(train, monkeypatch, capfd, name):
    """Slurm's --signal sends it to the processes, and the launcher sends it on."""
    number = getattr(signal, name)
    code = signalled(train, monkeypatch, [number, number], steps=3)
    said = capfd.readouterr()
    assert code == 128 + number and f"stopped: {name}: stopped after 2 steps\n" in said.err
    assert "2 steps are saved" in said.out and f"{name}: saving after this update\n" in said.out
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_users_own_handler_of_such_a_signal_stays(train, monkeypatch):
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    try:
        before_updates(monkeypatch, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        assert len(train(steps=2)[1]) == len(calls) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_nohup_is_respected(train, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_updates(monkeypatch, lambda *_: os.kill(os.getpid(), signal.SIGHUP))
        assert len(train(steps=2)[1]) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_as_before_after_a_run(train):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    train()
    assert [signal.getsignal(number) for number in numbers] == before


# --- Checkpoints ---


@pytest.mark.long
def test_only_the_latest_checkpoints_are_kept(train):
    folder, _ = train(steps=5, save_every=1, keep_checkpoints=2)
    assert [path.name for path in checkpoint_files.newest_first(folder)] == [
        "step_000005",
        "step_000004",
    ]
    folder, _ = train(steps=5, save_every=2, output="all")
    assert [path.name for path in checkpoint_files.newest_first(folder)] == [
        "step_000005",
        "step_000004",
        "step_000002",
    ]


def test_a_full_disk_leaves_the_earlier_checkpoints(train, monkeypatch, capsys):
    real, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) > 3:  # the second checkpoint's second file
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda _: train(steps=3, save_every=1), None)
    said = capsys.readouterr().err
    (line,) = (line for line in said.splitlines() if "error: " in line)
    assert ended.value.code == 1
    assert "cannot save step 2 in" in line and "No space left on device" in line
    monkeypatch.setattr(torch, "save", real)
    folder, rows = train(steps=3, save_every=1, resume="latest")
    assert rows == train(steps=3, save_every=1, output="whole")[1]
    assert not list((folder / "checkpoints").glob(".*"))


def test_files_that_nfs_keeps_are_no_full_disk(train, monkeypatch):
    """A file that another program has open stays as .nfs..., and so does its folder."""
    real = os.unlink

    def unlink(path, *words, **settings):
        if str(path).startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(path, *words, **settings)

    whole = train(steps=3, save_every=1, output="whole")[1]
    folder, _ = train(steps=2, save_every=1)
    (folder / "checkpoints/step_000002/checkpoint.json").write_text("")  # it is written again
    (folder / "checkpoints/.step_000003.tmp").mkdir()
    held = ["checkpoints/step_000002", "checkpoints/.step_000003.tmp", "export"]
    for place in held:
        (folder / place / ".nfs0001").write_text("open elsewhere")
    monkeypatch.setattr(os, "unlink", unlink)
    assert train(steps=3, save_every=1, resume="latest")[1] == whole
    assert [checkpoint_files.read(path)[0] for path in checkpoint_files.newest_first(folder)] == [
        *(3, 2, 1)
    ]
    assert not list(folder.glob("export/.nfs*")) and (folder / "export/model_index.json").is_file()
    monkeypatch.setattr(os, "unlink", real)  # the other program has ended
    train(steps=4, save_every=1, resume="latest")
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
        "from diffusers import FluxTransformer2DModel\n\n\nclass "
        "Brought(FluxTransformer2DModel):\n    pass\n"
    )
    return str(folder)


def test_code_of_a_repository_runs_only_if_it_is_trusted(with_code, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    with pytest.raises(InputError, match="transformer .*--trust-remote-code"):
        models.load(with_code, torch.float32)
    trusted = models.load(with_code, torch.float32, trust_remote_code=True)
    assert type(trusted.pipe.transformer).__name__ == "Brought"


# --- Weights that are not finite ---


def test_weights_that_are_not_finite_are_named_and_never_saved(train, monkeypatch, capsys):
    folder, _ = train(steps=1, save_every=1)
    honest = Policy.step

    def diverge(policy):
        honest(policy)
        policy.weights[0].data.fill_(torch.nan)

    monkeypatch.setattr(Policy, "step", diverge)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda _: train(steps=4, save_every=0, resume="latest"), None)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "error: the samples are not finite" in said
    with pytest.raises(RunError, match="the transformer is not finite after step 2"):
        train(steps=2, save_every=1, resume="latest")
    assert [path.name for path in checkpoint_files.newest_first(folder)] == ["step_000001"]
    monkeypatch.undo()
    assert len(train(steps=2, save_every=0, resume="latest")[1]) == 2


@pytest.mark.long
def test_a_gradient_that_is_not_finite_costs_its_own_step(train, monkeypatch, capsys):
    """The finished steps are saved without anything of the broken one, though the prior has seen
    its rewards."""
    settings = dict(script=bpgo, steps=2, save_every=0, updates_per_step=2, learning_rate=1e-3)
    whole, rows = train(**settings, output="whole")

    def broken(update):
        """Run with a gradient that is not finite in this update of step 1."""
        honest, calls = Policy.clip_gradients, []

        def poison(policy, max_norm):
            calls.append(1)
            if len(calls) == 2 + update:
                policy.weights[0].grad.fill_(torch.nan)
            return honest(policy, max_norm)

        monkeypatch.setattr(Policy, "clip_gradients", poison)
        with pytest.raises(SystemExit):
            errors.run(lambda _: train(**settings, output=f"at {update}"), None)
        monkeypatch.undo()
        return capsys.readouterr()

    said = broken(1)
    assert "error: step 1: the gradient is not finite" in said.err
    assert re.search(r"the rewards are not the cause: '[a-z ]+' \(verifier 0\.\d+ to 0", said.err)
    assert "1 steps are saved" in said.out
    folder, again = train(**settings, output="at 1", resume="latest")
    assert again == rows
    assert all(
        torch.equal(value, weights(folder, 2)[name]) for name, value in weights(whole, 2).items()
    )
    said = broken(2)  # the first update has changed the weights
    assert "saved" not in said.out
    assert not checkpoint_files.newest_first(folder.with_name("at 2"))


# --- A folder that nobody can write to ---


@pytest.mark.parametrize(
    "folder, reason",
    [("file/run", "Not a directory"), ("x" * 300, "File name too long")],
    ids=["file", "long"],
)
def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(
    train, tmp_path, folder, reason
):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"--output \S*{folder}: cannot write there \({reason}"):
        train(output=folder)
