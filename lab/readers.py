"""Train on a published reader of text and watch an exact one: the proxy against the truth.

    python -m lab.readers                       # three methods, five seeds: minutes of a core a run
    python -m lab.readers --seeds 0 1           # fewer
    python -m lab.readers --no-train            # no runs: the table of those that are there

Every method trains `tiny-letters` with its defaults on the reward `ocr`, the published PP-OCRv6.
The reward `letters`, which reads the renderer's letters exactly, is only watched. If `ocr` rises
and `letters` does not, a method has learned to fool the published reader. The table has for each
method the held-out means of both rewards before and after, `fooled`, the gain of `ocr` less that of
`letters`, and how much its last `letters` differs from that of the first method with the same
seeds, each with a 95% interval."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import errors
from common.args import check_lists
from common.reporting.files import rows_before
from lab import gains
from lab.verdicts import interval


@dataclass
class Args:
    methods: tuple[str, ...] = ("grpo_base.py", "slas.py", "bpgo.py")
    """Scripts to train; the others are compared with the first."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the runs."""
    workers: int = 2
    """Runs at once, one thread each."""
    train: bool = True
    """Train what is missing. Otherwise only the finished runs are read."""
    runs: Path = gains.ROOT / "runs/readers"
    """Where the runs go."""


def job_of(method):
    """Return the command of a method, as lab/gains.py runs it."""
    return f"{method} --model tiny-letters"


def ends(folder):
    """Return {reward: (first, last)} of a run's held-out means; {} before a second evaluation."""
    rows = [row for row in rows_before(folder / "metrics.jsonl", float("inf")) if "eval_ocr" in row]
    if len(rows) < 2:
        return {}
    names = ("ocr", "letters")
    return {name: (rows[0][f"eval_{name}"], rows[-1][f"eval_{name}"]) for name in names}


def mean(values):
    """Return the mean of a list of numbers."""
    return sum(values) / len(values)


def with_interval(values):
    """Return the mean of differences over the seeds and its 95% interval, as text."""
    if len(values) < 2:
        return f"{mean(values):+.3f}"
    low, high = interval(values)
    return f"{mean(values):+.3f} [{low:+.3f}, {high:+.3f}]"


def table(results):
    """Return a Markdown table of {method: {seed: what `ends` returns}}; the first is the base."""
    head = "| method | seeds | ocr | letters | fooled | letters against the first |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    base = next(iter(results.values()))
    for method, runs in results.items():
        cells = [method, str(len(runs))]
        for reward in ("ocr", "letters"):
            first, last = (mean([run[reward][end] for run in runs.values()]) for end in (0, 1))
            cells.append(f"{first:.3f} -> **{last:.3f}**")
        gained = [
            [run[reward][1] - run[reward][0] for run in runs.values()]
            for reward in ("ocr", "letters")
        ]
        cells.append(with_interval([ocr - letters for ocr, letters in zip(*gained)]))
        shared = [seed for seed in runs if seed in base] if runs is not base else []
        against = [runs[seed]["letters"][1] - base[seed]["letters"][1] for seed in shared]
        cells.append(with_interval(against) if against else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args):
    args.runs.mkdir(parents=True, exist_ok=True)
    jobs = [(method, seed) for seed in args.seeds for method in args.methods]
    if args.train:
        with ThreadPoolExecutor(args.workers) as pool:
            for _ in pool.map(lambda job: gains.run(job_of(job[0]), job[1], args.runs), jobs):
                pass
    results = {}
    for method, seed in jobs:
        found = ends(gains.place(job_of(method), seed, args.runs))
        if found:
            results.setdefault(method, {})[seed] = found
    if not results:
        raise errors.InputError(f"--runs {args.runs}: has no finished run. Leave out --no-train.")
    print(table(results))


if __name__ == "__main__":
    with errors.one_line():
        check_lists(Args, sys.argv[1:])
    errors.run(main, tyro.cli(Args, description=__doc__))
