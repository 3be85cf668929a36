"""Summarise scores: means with intervals, win rates, and tables as text."""

import csv
import io
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch

RESAMPLES = 10_000  # of the bootstrap
TASKS = (
    "single",
    "two",
    "counting",
    "colours",
    "position",
    "attribution",
)  # GenEval's six, of the shapes world


# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom
T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
     2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930)  # fmt: skip


def students_t(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t, to 5e-5 for any number of degrees of freedom."""
    if freedom <= len(T):
        return T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)  # Abramowitz and Stegun 26.7.5
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def interval(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return (low, high), the 95% interval of the mean of n >= 2 values.

    It is a percentile bootstrap, with the same draws every time. For few values the percentiles
    are moved outwards as Hesterberg proposes (2015, "What teachers should know about the
    bootstrap": expanded percentiles). It contains the mean of 4, 5 or 8 normal values in 87.5%,
    92.1% or 94.4% of cases. The 2.5% and 97.5% percentiles do in 79.8%, 83.9% or 88.9%.
    """
    values, n = np.asarray(values, dtype=float), len(values)
    outside = NormalDist().cdf(-students_t(n - 1) * math.sqrt(n / (n - 1)))
    generator, size = np.random.default_rng(0), max(1, 2_000_000 // n)
    means = [
        values[generator.integers(n, size=(min(size, resamples - start), n))].mean(1)
        for start in range(0, resamples, size)
    ]
    return tuple(np.quantile(np.concatenate(means), [outside, 1 - outside]).tolist())


def win_rate(scores: torch.Tensor, base: torch.Tensor) -> float | None:
    """Return how often scores [P, S] are above those of the base from the same noise, from 0 to 1.

    Ties count half. Pairs with a missing score (NaN) are left out, and all prompts have equal
    weight. Returns None if no pair is left.
    """
    wins = (scores > base) + (scores == base).double() / 2
    wins = wins.masked_fill((scores + base).isnan(), torch.nan).nanmean(1).nanmean().item()
    return wins if wins == wins else None


def summary(
    scores: torch.Tensor, base: torch.Tensor | None = None, asked: int | None = None
) -> dict:
    """Return the summary of scores [P, S] of S samples of P prompts, NaN for a missing one.

    Its keys are "mean" (over prompts, of the mean over a prompt's samples), "low" and "high" (its
    interval, None for fewer than 2 prompts), "win_rate" (against the scores of `base`), "prompts"
    and "samples" (those with a score), and "missing" (how many of the `asked` samples have none).
    """
    by_prompt, number = scores.nanmean(1), (~scores.isnan()).sum().item()
    known = by_prompt[~by_prompt.isnan()]
    low, high = interval(known.tolist()) if len(known) > 1 else (None, None)
    return {
        "mean": by_prompt.nanmean().item() if len(known) else None,
        "low": low,
        "high": high,
        "win_rate": None if base is None else win_rate(scores, base),
        "prompts": len(known),
        "samples": number,
        "missing": (asked or scores.numel()) - number,
    }


def by_task(passed: torch.Tensor, tasks: list[str]) -> dict[str, float | None]:
    """Return {task: share of samples that passed, "overall": their mean}, as GenEval does.

    passed [P, S]; tasks: that of each of P prompts. A task without a prompt is None, and left out
    of the mean.
    """
    shares = {task: passed[[name == task for name in tasks]].nanmean().item() for task in TASKS}
    known = [share for share in shares.values() if share == share]
    shares = {task: share if share == share else None for task, share in shares.items()}
    return {**shares, "overall": sum(known) / len(known) if known else None}


# --- Tables ---


def cell(found: dict) -> str:
    """Return a summary as a short text."""
    if found["mean"] is None:
        return "no score"
    words = f"{found['mean']:.4g}"
    if found["low"] is not None:
        words += f" [{found['low']:.4g}, {found['high']:.4g}]"
    words += f" {found['win_rate']:.0%}" if found["win_rate"] is not None else ""
    return words + (f" ({found['missing']} missing)" if found["missing"] else "")


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Return rows of words as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows
    )


def table(found: dict[str, dict[str, dict]]) -> str:
    """Return {model: {reward: summary}} as text, one line a model."""
    names = list(next(iter(found.values())))
    return aligned(
        [
            ("", *names),
            *((model, *(cell(row[name]) for name in names)) for model, row in found.items()),
        ]
    )


def task_table(found: dict[str, dict[str, float | None]]) -> str:
    """Return {model: by_task} as text, one line a model."""
    names = (*TASKS, "overall")
    percent = {None: "-"}
    rows = [
        (m, *(percent.get(row[name]) or f"{row[name]:.1%}" for name in names))
        for m, row in found.items()
    ]
    return aligned([("passed", *names), *rows])


def as_csv(found: dict[str, dict[str, dict]], tasks: dict[str, dict[str, float | None]]) -> str:
    """Return both as CSV: a line for each model and reward, then one for each model and task."""
    file = io.StringIO()
    names = ("mean", "low", "high", "win_rate", "prompts", "samples", "missing")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("model", "reward", "task", *names))
    for model, row in found.items():
        for reward, values in row.items():
            writer.writerow((model, reward, "", *(values[name] for name in names)))
    for model, row in tasks.items():
        for task, share in row.items():
            writer.writerow((model, "passed", task, share, *[None] * 6))
    return file.getvalue()
