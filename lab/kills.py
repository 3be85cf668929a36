"""Kills a run at random moments, lets `--resume latest` finish it, and compares it with a run that nothing disturbed.

    python -m lab.kills                       # 20 kills (SIGKILL), every fourth while a checkpoint is being written
    python -m lab.kills --script bpgo.py --times 5

Same means: every number of metrics.jsonl but the timings, and every tensor of the last checkpoint, bit for bit.
"""

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

from common import checkpoints

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
SMALL = (
    f"--prompts-per-step=2 --group-size=4 --sampling-steps=4 --steps={STEPS} --save-every=1 --eval-every=0 "
    "--sample-every=0 --tracker=none --learning-rate=1e-3 --micro-batch=8"
).split()
TIMINGS = ("rollout_seconds", "reward_seconds", "update_seconds", "samples_per_second")


@dataclass
class Args:
    script: str = "grpo_base.py"
    """The script that is killed."""
    times: int = 20
    """How often, each time in a new run."""
    seed: int = 0
    """Of the moments."""


def start(script, folder, *flags):
    words = [sys.executable, str(ROOT / script), *SMALL, f"--output={folder}", *flags]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    error = process.communicate()[1]
    assert process.returncode == 0, error


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill(process, folder, rng, writing):
    """Kills a run in a random step, after a random part of it, or while it writes that step's checkpoint; returns a
    line that says when."""
    step, after = rng.randrange(STEPS), rng.random()
    while steps_done(folder) < step:
        _wait(process)
    while writing and not list(folder.glob("checkpoints/.step_*")):
        _wait(process)
    if not writing:
        time.sleep(after * (8.0 if step == 0 else 0.6))  # the first begins with the start of Python
    process.kill()
    process.wait()
    saved = [path.name for path in checkpoints.newest_first(folder)[:1]]
    where = "writing a checkpoint" if writing else f"{steps_done(folder)} steps logged"
    return f"{where}, {saved[0] if saved else 'none'} saved" + ", finished before" * (process.returncode == 0)


def _wait(process):
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.0005)


def same(folder, whole):
    """Whether two finished runs left the same numbers and weights."""
    numbers, states = [], []
    for run in (folder, whole):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        numbers.append([{name: row[name] for name in row if name not in TIMINGS} for row in rows])
        step, state = checkpoints.read(checkpoints.newest_first(run)[0])
        states.append([step, *torch.utils._pytree.tree_leaves(state)])
    return numbers[0] == numbers[1] and all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*states, strict=True)
    )


def kill_and_resume(script, folder, whole, rng, writing):
    """(when it was killed, whether the resumed run equals `whole`)"""
    when = kill(start(script, folder), folder, rng, writing)
    finish(start(script, folder, "--resume=latest"))
    return when, same(folder, whole)


def main(args):
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        finish(start(args.script, whole))
        equal = 0
        print("| kill | when | the same at the end |\n| --- | --- | --- |")
        for number in range(args.times):
            when, agrees = kill_and_resume(args.script, Path(root) / str(number), whole, rng, number % 4 == 3)
            equal += agrees
            print(f"| {number + 1} | {when} | {'yes' if agrees else 'NO'} |", flush=True)
    print(f"\n{args.script}: {equal} of {args.times} the same")
    return equal == args.times


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Args, description=__doc__)) else 1)
