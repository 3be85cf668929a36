"""Measure the time per training step of each method against grpo_base on tiny-flux.

The runs alternate in one process.

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
from benchmarks.replaced import replaced
from benchmarks.results import write
from common.args import defaults
from common.trainer import Checkpoints

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
    """Return the median seconds of a training step, [by the clock, of the processor].

    The second is hardly disturbed by other programs on the machine.
    """
    taken = []

    class Timed(Checkpoints):
        def steps(self, stop):
            for step in super().steps(stop):
                clock, processor = time.perf_counter(), time.process_time()
                yield step
                taken.append((time.perf_counter() - clock, time.process_time() - processor))

    sys.argv = [script.__file__]
    with replaced(script, Checkpoints=Timed), tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/run"
        script.main(defaults(script.Args, steps=steps, output=output, **SMALL, **settings))
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
