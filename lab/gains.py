"""What the embedded models gain: every job from its defaults, with three seeds; writes README's
table.

    python -m lab.gains                          # all of them: hours on two cores
    python -m lab.gains --only tiny-flux         # those whose command has these words
    python -m lab.gains --seeds                  # no runs: write the table from docs/gains.json

Each job runs in a process of its own, as many at once as --workers, one thread each. A run that is
there already counts; one that was stopped goes on. docs/gains.json keeps every run's held-out
reward, and the commit."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import errors
from common.args import check_lists

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/gains.json"
JOBS = (
    "bpgo.py", "grpo_base.py", "slas.py", "self_paced.py",
    "grpo_base.py --model tiny-wan", "bpgo.py --model tiny-wan", "bpgo.py --model tiny-wan "
                                                                 "--prior sft",
    "slas.py --model tiny-wan", "self_paced.py --model tiny-wan", "slas.py --model tiny-sd",
    "bpgo.py --model tiny-wan-i2v --prior first-frame",
)  # fmt: skip


@dataclass
class Args:
    only: str = ""
    """Jobs whose command holds this text, or `tiny-flux`: those without --model."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs."""
    workers: int = 2
    """Runs at once."""
    runs: Path = ROOT / "runs/gains"
    """Where the runs go."""


def chosen(only):
    """The jobs that --only means."""
    return [
        job for job in JOBS if only in (job if "--model" in job else f"{job} --model tiny-flux")
    ]


def place(job, seed, folder):
    """The folder of a run."""
    return folder / f"{job.replace('.py', '').replace(' --', '-').replace(' ', '-')}-{seed}"


def run(job, seed, folder):
    """Trains, or goes on, and returns {start, end, commit}."""
    output = place(job, seed, folder)
    resume = ["--resume", "latest"] if (output / "config.json").exists() else []
    words = [
        sys.executable,
        *job.split(),
        f"--seed={seed}",
        f"--output={output}",
        "--tracker=none",
        *resume,
    ]
    with (folder / f"{output.name}.log").open("a", encoding="utf-8") as log:
        subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            check=True,
        )
    rows = [
        json.loads(line)
        for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluations = [row["eval_reward"] for row in rows if "eval_reward" in row]
    return {"start": evaluations[0], "end": evaluations[-1], "commit": commit()}


def commit():
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    ).stdout.strip()


def table(results):
    """{job: {seed: run}} -> Markdown: of the seeds' last held-out rewards the mean, the lowest and
    the highest."""
    lines = ["| command | held-out reward | seeds |", "| --- | --- | --- |"]
    for job in (job for job in JOBS if job in results):
        runs = list(results[job].values())
        start, ends = runs[0]["start"], [run["end"] for run in runs]
        mean, between = sum(ends) / len(ends), f"{min(ends):.3f} to {max(ends):.3f}"
        lines.append(
            f"| `python {job}` | {start:.3f} -> **{mean:.3f}** ({between}) | {len(ends)} |"
        )
    return "\n".join(lines)


def with_table(readme):
    """README's text with the table of docs/gains.json between its markers."""
    before, _, rest = readme.partition("<!-- gains -->")
    _, end, after = rest.partition("<!-- /gains -->")
    assert end, "README.md has no place for the gains"
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return f"{before}<!-- gains -->\n{table(results)}\n<!-- /gains -->{after}"


def main(args):
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    todo = [
        (job, seed)
        for seed in args.seeds
        for job in chosen(args.only)
        if str(seed) not in results.get(job, {})
    ]
    args.runs.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(args.workers) as pool:
        under_way = {pool.submit(run, job, seed, args.runs): (job, seed) for job, seed in todo}
        for done in as_completed(under_way):
            (job, seed), found = under_way[done], done.result()
            results.setdefault(job, {})[str(seed)] = found
            RESULTS.write_text(
                json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8"
            )
            print(f"{job} --seed {seed}: {found['start']:.3f} -> {found['end']:.3f}", flush=True)
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    with errors.one_line():
        check_lists(Args, sys.argv[1:])
    main(tyro.cli(Args, description=__doc__))
