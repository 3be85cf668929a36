"""Kills runs at random moments, lets `--resume latest` finish them, and compares them with runs
that nothing disturbed.

    python -m benchmarks.kills     # 20 kills (SIGKILL): all scripts and all contents of checkpoints
    python -m benchmarks.kills --script bpgo --times 3

Same means, bit for bit: every number of metrics.jsonl but the timings, every tensor of the last
checkpoint, and every file of the exports."""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from common.trainer import checkpoint_files

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
SMALL = (
    f"--prompts-per-step=2 --group-size=4 --sampling-steps=4 --steps={STEPS} --save-every=1 "
    "--eval-every=0 "
    "--sample-every=0 --tracker=none --learning-rate=1e-3 --micro-batch=8 --minibatches=1"
).split()
TIMINGS = ("rollout_seconds", "reward_seconds", "update_seconds", "samples_per_second")
CALIBRATED = "self_paced --calibrate --sampling-steps=2 --group-size=2"
KILLS = (  # what runs, and in what it is killed
    ("grpo_base", "a step"),
    ("bpgo", "a checkpoint"),
    ("slas --gamma=auto", "a step"),
    ("self_paced", "a step, twice"),
    (CALIBRATED, "the calibration"),
    ("grpo_base", "the export"),
    ("grpo_base --lora-rank=4 --kl-coef=0.1 --ema=0.9", "a step"),
    ("grpo_base --lora-rank=4 --kl-coef=0.1 --ema=0.9", "the export"),
    ("grpo_base --kl-coef=0.1 --ema=0.9 --best-of=2", "a checkpoint"),
    ("grpo_base --kl-coef=0.1 --ema=0.9 --best-of=2", "a step, twice"),
    ("grpo_base --updates-per-step=2 --timestep-fraction=0.6", "a step"),
    ("bpgo --prior=sft --lora-rank=4", "a step"),
    ("bpgo --prior=sft --lora-rank=4", "a checkpoint, twice"),
    ("bpgo", "a step, twice"),
    ("slas --gamma=auto", "a checkpoint, twice"),
    ("slas --lora-rank=4 --best-of=2", "a step"),
    ("slas --lora-rank=4 --best-of=2", "the export"),
    ("self_paced", "a checkpoint"),
    ("self_paced --lora-rank=4 --ema=0.9", "a step, twice"),
    (CALIBRATED, "a step"),
)


@dataclass
class Args:
    script: str = ""
    """The one that is killed; none: all."""
    times: int = len(KILLS)
    """How often, each time in a new run."""
    seed: int = 0
    """Of the moments."""


def start(job, folder, *flags):
    script, *more = job.split()
    words = [
        sys.executable,
        str(ROOT / f"{script}.py"),
        *SMALL,
        *more,
        f"--output={folder}",
        *flags,
    ]
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def finish(process):
    error = process.communicate()[1]
    assert process.returncode == 0, error


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def kill(process, folder, rng, moment):
    """Kills a run in a random step, after a random part of it, or in what `moment` names; returns a
    line that says when, or that it had finished."""
    began, before, step, coin = (
        time.time(),
        _saved(folder),
        rng.randrange(STEPS),
        rng.random() < 0.5,
    )
    if "calibration" in moment:
        step = rng.randrange(50)
        _wait(process, lambda: any(steps_done(part) > step for part in folder.glob("calibrate-*")))
    elif "export" in moment:
        _wait(process, lambda: _written(folder, ".export.tmp", began))
    elif before:  # it goes on, and dies as it starts or when it has done something
        _wait(process, lambda: coin or _saved(folder) > before)
    else:
        _wait(process, lambda: steps_done(folder) >= step)
    if "checkpoint" in moment:
        _wait(process, lambda: _written(folder, "checkpoints/.step_*", began))
    elif "step" in moment:
        time.sleep(
            rng.random() * (8.0 if (coin if before else step == 0) else 0.6)
        )  # Python starts for seconds
    process.kill()
    process.communicate()
    where = f"{steps_done(folder)} steps logged, {_saved(folder)} saved"
    return where + ", finished before" * (process.returncode == 0)


def _written(folder, pattern, began):
    """Whether something that is being written is there, and not from a run before."""
    with contextlib.suppress(FileNotFoundError):  # it may go while we look
        return any(path.stat().st_mtime >= began for path in folder.glob(pattern))


def _saved(folder):
    return max([0, *map(checkpoint_files.number_of, checkpoint_files.newest_first(folder))])


def _wait(process, until):
    while not until() and process.poll() != 0:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.0005)


def same(folder, whole):
    """Whether two finished runs left the same numbers, weights and exports."""
    numbers, states, exports = [], [], []
    for run in (folder, whole):
        rows = [
            json.loads(line)
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        numbers.append([{name: row[name] for name in row if name not in TIMINGS} for row in rows])
        step, state = checkpoint_files.read(checkpoint_files.newest_first(run)[0])
        states.append([step, *torch.utils._pytree.tree_leaves(state)])
        files = [path for path in run.glob("export*/**/*") if path.is_file()]
        exports.append({path.relative_to(run): path.read_bytes() for path in files})
    return (
        numbers[0] == numbers[1]
        and exports[0] == exports[1]
        and all(
            torch.equal(a, b) if torch.is_tensor(a) else a == b
            for a, b in zip(*states, strict=True)
        )
    )


def kill_and_resume(job, folder, whole, rng, moment):
    """(when it was killed, whether the resumed run equals `whole`)"""
    when = [kill(start(job, folder), folder, rng, moment)]
    if "twice" in moment:
        when.append(kill(start(job, folder, "--resume=latest"), folder, rng, moment))
    finish(start(job, folder, "--resume=latest"))
    return "; ".join(when), same(folder, whole)


def main(args):
    kills = [
        (job, moment) for job, moment in KILLS if job.split()[0] == args.script or not args.script
    ]
    rng, equal, wholes = random.Random(args.seed), 0, {}
    print("| | run | killed in | when | the same at the end |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as root:
        for number in range(args.times):
            job, moment = kills[number % len(kills)]
            if job not in wholes:
                wholes[job] = Path(root) / f"whole{number}"
                finish(start(job, wholes[job]))
            when, agrees = kill_and_resume(job, Path(root) / str(number), wholes[job], rng, moment)
            equal += agrees
            print(
                f"| {number + 1} | `{job}` | {moment} | {when} | {'yes' if agrees else 'NO'} |",
                flush=True,
            )
    print(f"\n{equal} of {args.times} the same")
    return equal == args.times


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Args, description=__doc__)) else 1)
