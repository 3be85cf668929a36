"""Measure whether a long run stays as it began: its memory, its open files and its time per step
over 300 small steps.

    python -m benchmarks.steady      # rewrites its part of RESULTS.md
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import psutil
import tyro

import bpgo
import grpo_base
import self_paced
import slas
from benchmarks.replaced import replaced
from benchmarks.results import write
from common.args import defaults
from common.trainer import Log

SCRIPTS = (grpo_base, bpgo, slas, self_paced)
SMALL = dict(
    prompts_per_step=2, group_size=4, sampling_steps=4, micro_batch=8, minibatches=1, eval_every=50,
    sample_every=50, save_every=50, keep_checkpoints=2, tracker="tensorboard",
)  # fmt: skip
# steps until every cache that is bounded has filled: each prompt's embeddings, the allocator's
# arenas
WARM = 50


@dataclass
class Args:
    steps: int = 300
    """Training steps of a run; evaluations, samples and checkpoints come every 50."""
    write: bool = True
    """Rewrite its part of benchmarks/RESULTS.md."""


def watched(script, steps):
    """Return [(MiB of memory, open files, threads, seconds)] at the end of each step.

    The seconds are those of rollout, reward and update.
    """
    process = psutil.Process()
    rows = []

    class Watched(Log):
        def row(self, step, metrics):
            super().row(step, metrics)
            if "rollout_seconds" not in metrics:  # the last evaluation
                return
            memory = process.memory_info().rss / 2**20
            spent = sum(metrics[f"{part}_seconds"] for part in ("rollout", "reward", "update"))
            rows.append((memory, process.num_fds(), process.num_threads(), spent))

    sys.argv = [script.__file__]
    with replaced(script, Log=Watched), tempfile.TemporaryDirectory() as folder:
        script.main(defaults(script.Args, steps=steps, output=f"{folder}/run", **SMALL))
    return rows


def main(args):
    lines = [
        "| script | MiB after 50 steps, at the end | open files | threads | seconds a step |",
        "| --- " * 5 + "|",
    ]
    for script in SCRIPTS:
        started, rows = time.time(), watched(script, args.steps)
        ends = rows[WARM - 1 : WARM + 19], rows[-20:]
        memory, files, threads, seconds = (
            " -> ".join(f"{statistics.median(row[column] for row in rows):{form}}" for rows in ends)
            for column, form in enumerate((".0f", ".0f", ".0f", ".3f"))
        )
        lines.append(f"| {script.__name__} | {memory} | {files} | {threads} | {seconds} |")
        print(lines[-1], f"{time.time() - started:.0f} s", flush=True)
    if args.write:
        write("A run of 300 small steps (`python -m benchmarks.steady`)", lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
