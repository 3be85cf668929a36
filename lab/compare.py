"""Several runs in one picture and one table: what the papers' figures of rewards over steps are,
for anybody's runs.

    python -m lab.compare runs/bpgo-1 runs/bpgo-2 runs/grpo_base-1 runs/grpo_base-2

Runs of one setting, which differ by their seed alone, are one line: their mean, and the range
between the lowest and the highest. Every reward has a panel of its own, those that are trained on
first, then those that are only watched; solid lines are the training samples, dashed ones with
points the held-out prompts. A step counts where all runs of a setting have it. compare.csv and
compare.json hold the table that is printed: the first and the last evaluation, or, without
evaluations, the mean of the first and of the last 5 steps."""

import csv
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from common import cli, errors, rewards
from common.errors import InputError
from common.reporting.files import rows_before
from common.reporting.pictures import pyplot
from common.trainer.run_folder import NEUTRAL

LAST = 5  # steps that the first and the last training reward are the mean of
WIDEST = 60  # letters of a setting's name that lists what differs; above that it is its first run's
Summary = tuple[float, float, float]  # mean over the runs, lowest, highest


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs."""
    output: str = "runs/compare"
    """Folder for compare.png, compare.csv and compare.json."""


@dataclass
class Run:
    """A run's folder: config.json and the rows of metrics.jsonl."""

    folder: Path
    config: dict
    rows: list

    def series(self, metric: str) -> dict[int, float]:
        """{step: value} of a metric, where it is a number."""
        return {
            row["step"]: row[metric]
            for row in self.rows
            if math.isfinite(row.get(metric, math.nan))
        }


@dataclass
class Setting:
    """The runs that differ by their seed alone."""

    name: str
    runs: list

    def series(self, metric: str) -> dict[int, Summary]:
        """{step: (mean, lowest, highest)} of a metric, at the steps where all runs that know it
        have it."""
        found = self.known(metric)
        steps = sorted(set(found[0]).intersection(*found[1:])) if found else ()
        values = {step: [one[step] for one in found] for step in steps}
        return {
            step: (sum(value) / len(value), min(value), max(value))
            for step, value in values.items()
        }

    def known(self, metric: str) -> list[dict[int, float]]:
        """[{step: value}] of the runs that know a metric: one that is watched, some may not."""
        return [series for run in self.runs if (series := run.series(metric))]

    def ends(self, name: str) -> tuple[Summary | None, Summary | None, str | None]:
        """The held-out reward NAME of the first and the last evaluation, or else the training
        reward's, each as (mean over runs, lowest, highest); None where there is neither. And which
        of the two it is."""
        held_out = list(self.series(f"eval_{name}").values())
        if len(held_out) > 1:
            return held_out[0], held_out[-1], "held-out"
        training = self.known(f"{name}_mean")
        steps = sorted(set(training[0]).intersection(*training[1:])) if training else ()
        if not steps:
            return None, None, None
        parts = (steps[:LAST], steps[-LAST:])
        return *(
            _summary([sum(map(one.get, part)) / len(part) for one in training]) for part in parts
        ), "training"


def _summary(values: list[float]) -> Summary:
    return sum(values) / len(values), min(values), max(values)


def read(folder: str | Path) -> Run:
    """A run's folder, read; raises InputError for one that is none, or whose run has not finished a
    step."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows = rows_before(folder / "metrics.jsonl", math.inf)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no run's folder ({errors.text(error)})") from None
    if not isinstance(config, dict) or not isinstance(config.get("reward"), list) or not rows:
        raise InputError(f"{folder} holds no run of which a step is finished")
    return Run(
        folder.resolve(),
        config,
        [{n: v for n, v in row.items() if isinstance(v, int | float)} for row in rows],
    )


def settings(runs: Iterable[Run]) -> list[Setting]:
    """Runs -> [Setting], in the order of their first runs, called by what differs between them."""
    groups = {}
    for run in runs:
        own = {
            name: value
            for name, value in run.config.items()
            if name not in (*NEUTRAL, "seed", "run", "from")
        }
        groups.setdefault(json.dumps(own, sort_keys=True), (own, []))[1].append(run)
    configs = [own for own, _ in groups.values()]
    shared = [name for name in configs[0] if all(name in own for own in configs)]
    differing = [name for name in shared if any(own[name] != configs[0][name] for own in configs)]
    names = [" ".join(_said(name, own[name]) for name in differing) for own in configs]
    unclear = len(set(names)) < len(names) or len(max(names, key=len)) > WIDEST or names == [""]
    if unclear:
        names = [members[0].folder.name for _, members in groups.values()]
    return [Setting(name, members) for name, (_, members) in zip(names, groups.values())]


def _said(name: str, value: Any) -> str:
    shown = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return shown if name in ("script", "model", "reward") else f"{name}={shown}"


def measured(groups: list[Setting]) -> list[tuple[str, str]]:
    """[(reward, "the sum", "trained" or "watched")] of all runs: the sum of several first, then
    each by its name."""
    kinds = {}
    for kind, flag in (("trained", "reward"), ("watched", "watch")):
        specs = [
            spec for group in groups for run in group.runs for spec in run.config.get(flag) or ()
        ]
        kinds = {**dict.fromkeys((rewards.split(str(spec))[1] for spec in specs), kind), **kinds}
    trained, watched = (
        [(name, of) for name, of in kinds.items() if of == kind] for kind in ("trained", "watched")
    )
    return [("reward", "the sum")] * (len(trained) != 1) + trained + watched


def draw(path: Path, groups: list[Setting], shown: list[tuple[str, str]]) -> None:
    """The picture: a panel for each of `shown`, a colour for each setting."""
    plt, columns = pyplot(), min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    for axis, (name, kind) in zip(axes.flat, shown):
        for number, group in enumerate(groups):
            for metric, style in ((f"{name}_mean", "-"), (f"eval_{name}", "o--")):
                series = group.series(metric)
                if series:
                    mean, low, high = zip(*series.values())
                    axis.plot(
                        list(series), mean, style, color=f"C{number % 10}", markersize=4, lw=1.3
                    )
                    axis.fill_between(
                        list(series), low, high, color=f"C{number % 10}", alpha=0.2, lw=0
                    )
        axis.set_title(f"{name} ({kind})", parse_math=False, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    figure.tight_layout()
    handles = [
        plt.Line2D([], [], color=f"C{number % 10}", label=group.name)
        for number, group in enumerate(groups)
    ]
    legend = figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=min(columns, len(groups)),
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def table(groups: list[Setting], shown: list[tuple[str, str]]) -> list[dict]:
    """A row for each setting and reward: {setting, runs, steps, reward, kind, samples, start, end,
    lowest, highest}."""
    rows = []
    for group in groups:
        steps = min(len(run.series("reward_mean")) for run in group.runs)
        for name, kind in shown:
            start, end, samples = group.ends(name)
            values = {
                "start": start and start[0],
                **dict(zip(("end", "lowest", "highest"), end or (None,) * 3)),
            }
            about = {
                "setting": group.name,
                "runs": len(group.runs),
                "steps": steps,
                "reward": name,
                "kind": kind,
            }
            rows.append(about | {"samples": samples} | values)
    return rows


def markdown(rows: list[dict]) -> str:
    """The rows as a table with a line for each setting and a column for each reward."""
    names = list(dict.fromkeys((row["reward"], row["kind"]) for row in rows))
    head = ["setting", "runs", "steps", *(f"{name} ({kind})" for name, kind in names)]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        cells = [
            setting.replace("|", "\\|"),
            str(own[0]["runs"]),
            str(own[0]["steps"]),
            *map(cell, own),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: dict) -> str:
    """Start and end of a row of `table`, as "0.500 -> 0.600 (0.550 to 0.650)"; "-" where it has
    none."""
    if row["end"] is None:
        return "-"
    between = f" ({row['lowest']:.3f} to {row['highest']:.3f})" if row["runs"] > 1 else ""
    return (
        f"{row['start']:.3f} -> {row['end']:.3f}{between}"
        f"{', training' * (row['samples'] == 'training')}"
    )


def main(args: Args) -> None:
    """Reads, draws and writes. Raises InputError."""
    if not args.runs:
        raise InputError("name at least one run: python -m lab.compare RUN [RUN ...]")
    groups = settings(
        [read(folder) for folder in dict.fromkeys(Path(run).resolve() for run in args.runs)]
    )
    shown, folder = measured(groups), Path(args.output)
    rows = table(groups, shown)
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "compare.png", groups, shown)
    (folder / "compare.json").write_text(
        json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))
    print(
        f"the picture: {folder}/compare.png; the table: {folder}/compare.csv, {folder}/compare.json"
    )


if __name__ == "__main__":
    with errors.one_line():
        arguments = tyro.cli(Args, description=__doc__, args=cli.at_home(sys.argv[1:]))
    errors.run(main, arguments)
