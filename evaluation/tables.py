"""Summarise scores: means with intervals, win rates, and tables as text. Needs torch alone."""

import csv
import io

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


def interval(values: torch.Tensor, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return (low, high), the 95% interval of the mean of values [n] of n > 0 prompts.

    It is a percentile bootstrap, with the same draws every time.
    """
    values, n, generator = values.double(), len(values), torch.Generator().manual_seed(0)
    size = max(1, 2_000_000 // n)
    means = [
        values[torch.randint(n, (min(size, resamples - start), n), generator=generator)].mean(1)
        for start in range(0, resamples, size)
    ]
    return tuple(
        torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )


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
    interval), "win_rate" (against the scores of `base`), "prompts" and "samples" (those with a
    score), and "missing" (how many of the `asked` samples have no score).
    """
    by_prompt, number = scores.nanmean(1), (~scores.isnan()).sum().item()
    known = by_prompt[~by_prompt.isnan()]
    low, high = interval(known) if len(known) else (None, None)
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
    words = f"{found['mean']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"
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
