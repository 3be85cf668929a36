"""What each method costs over grpo_base on tiny-flux: time per training step, in alternating runs
of one process.

python -m benchmarks.methods     # rewrites its part of RESULTS.md
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import tyro

import bpgo
import grpo_base
import self_paced
import slas
from benchmarks.results import write
from common import cli
from common.reporting.report import Report

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
    steps: int = 7
    """Training steps of a run; the first warms up, the last saves."""
    write: bool = True
    """Rewrite its part of benchmarks/RESULTS.md."""


def seconds(script, steps, **settings):
    """Median seconds of a training step, by the clock and of the processor: the second is hardly
    disturbed by other programs on the machine."""
    taken = []

    class Timed(Report):
        def steps(self, start, stop):
            for step in super().steps(start, stop):
                clock, processor = time.perf_counter(), time.process_time()
                yield step
                taken.append((time.perf_counter() - clock, time.process_time() - processor))

    honest, script.Report, sys.argv = script.Report, Timed, [script.__file__]
    try:
        with tempfile.TemporaryDirectory() as folder:
            script.main(
                cli.defaults(script.Args, steps=steps, output=folder + "/run", **SMALL, **settings)
            )
    finally:
        script.Report = honest
    # the first step warms up, the last saves a checkpoint as well
    return [statistics.median(column) for column in zip(*taken[1:-1])]


def main(args):
    ratios = {name: [] for name in METHODS}
    for _ in range(args.rounds):
        before = seconds(grpo_base, args.steps)
        for name, (script, settings) in METHODS.items():
            own, after = seconds(script, args.steps, **settings), seconds(grpo_base, args.steps)
            ratios[name].append([2 * o / (b + a) for o, b, a in zip(own, before, after)])
            before = after
            print(f"{name}: {own[0]:.2f} s against {after[0]:.2f} s", flush=True)
    lines = [
        "| script | time per step over grpo_base's, median (all) | processor time | target |",
        "| --- " * 4 + "|",
    ]
    for name, values in ratios.items():
        clock, processor = zip(*values)
        spread = ", ".join(f"{value:.3f}" for value in sorted(clock))
        lines.append(
            f"| {name} | {statistics.median(clock):.3f} ({spread}) | "
            f"{statistics.median(processor):.3f} | "
            f"{'' if 'auto' in name else '1.02'} |"
        )
    print(*lines, sep="\n")
    if args.write:
        write("What the methods cost (`python -m benchmarks.methods`)", lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
