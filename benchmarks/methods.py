"""What each method costs over grpo_base on tiny-flux: time per training step, in alternating runs of one process.

python -m benchmarks.methods     # rewrites its part of RESULTS.md
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

import bpgo
import grpo_base
import self_paced
import slas
from benchmarks.results import write
from common import arguments

SMALL = dict(eval_every=0, sample_every=0, save_every=0, tracker="none")
METHODS = {
    "bpgo": (bpgo, {}),
    "slas": (slas, {}),
    "slas --gamma auto": (slas, dict(gamma="auto")),
    "self_paced": (self_paced, {}),
}


@dataclass
class Args:
    rounds: int = 5
    """Runs of each method; each one stands between two of grpo_base."""
    steps: int = 6
    """Training steps of a run; the first is warm-up."""
    write: bool = True
    """Rewrite its part of benchmarks/RESULTS.md."""


def seconds(script, steps, **settings):
    """Median seconds of a training step: rollout, reward, advantage and update."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [script.__file__]
        script.main(arguments.defaults(script.Args, steps=steps, output=folder + "/run", **SMALL, **settings))
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    return statistics.median(
        sum(row[f"{part}_seconds"] for part in ("rollout", "reward", "update")) for row in rows[1:]
    )


def main(args):
    ratios = {name: [] for name in METHODS}
    for _ in range(args.rounds):
        before = seconds(grpo_base, args.steps)
        for name, (script, settings) in METHODS.items():
            own, after = seconds(script, args.steps, **settings), seconds(grpo_base, args.steps)
            ratios[name].append(2 * own / (before + after))
            before = after
            print(f"{name}: {own:.2f} s against {after:.2f} s", flush=True)
    lines = ["| script | time per step over grpo_base's, median (all) | target |", "| --- | --- | --- |"]
    for name, values in ratios.items():
        spread = ", ".join(f"{value:.3f}" for value in sorted(values))
        lines.append(f"| {name} | {statistics.median(values):.3f} ({spread}) | {'' if 'auto' in name else '1.02'} |")
    print(*lines, sep="\n")
    if args.write:
        write("What the methods cost (`python -m benchmarks.methods`)", lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
