"""Draw the dials: differences to GRPO over the values of a premise, with their intervals.

python -m lab.dials --figures
"""

import math
from pathlib import Path

from common.reporting.pictures import pyplot
from lab import dials

COLOURS = ("#1f77b4", "#2ca02c", "#d62728", "#ff7f0e", "#9467bd", "#8c564b", "#17becf", "#bcbd22")
GREY = "#888888"
QUIET = ("GRPO again", "vague prompts left out")  # references, not methods: drawn in grey
SWEPT = {"slas-gamma": "gamma", "bpgo-alpha": "alpha"}  # the x axis is this setting
MAIN = {  # the figure of README: dial, methods
    "slas-exploit": ("gamma 0", "gamma 0.5", "gamma 2"),
    "bpgo-unsure": ("RAS", "CRT", "RAS and CRT", "RAS and CRT, sft prior"),
    "paced-floor": ("v1 as printed", "v1, previous mean, 1 - Hoyer", "v4", "equal weights"),
}


def lines_of(name, result, methods=()):
    """Return [(label, x positions, [(mean, low, high)])] of a dial, and the labels of the x axis.

    methods: which to draw, () for all. Methods of --methods are always drawn.
    """
    found = dials.findings(result)
    values = [row["value"] for row in result["cells"] if row["method"] == "GRPO"]
    if name in SWEPT:
        swept = [method for method in found if method.startswith(SWEPT[name])]
        lines = [
            (f"{dials.DIALS[name].turned} {value:g}", [found[m][value][:3] for m in swept])
            for value in values
        ]
        return lines, [method.split()[-1] for method in swept]
    own = set(found) - set(dials.DIALS[name].methods)
    drawn = [method for method in found if not methods or method in methods or method in own]
    lines = [(m, [found[m].get(value, (math.nan,) * 3)[:3] for value in values]) for m in drawn]
    return lines, [f"{value:g}" for value in values]


def panel(axis, name, result, methods=()):
    """Draw a dial: each method's line and interval, and the margin in which nothing matters."""
    lines, ticks = lines_of(name, result, methods)
    colours = iter(COLOURS * 2)
    for label, row in lines:
        quiet = label in QUIET
        colour = GREY if quiet else next(colours)
        places, (mean, low, high) = range(len(row)), zip(*row)
        style = ":" if label == "GRPO again" else "-"
        axis.plot(places, mean, style, marker="o", ms=3.5, lw=1.5, color=colour, label=label)
        axis.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)
    axis.axhspan(-dials.MARGIN, dials.MARGIN, color="black", alpha=0.06, lw=0)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_title(dials.DIALS[name].title, fontsize=9, loc="left")
    axis.set_xlabel(SWEPT.get(name, dials.DIALS[name].axis), fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def figure(path, names, results, methods=None, columns=3):
    """Draw several dials into one PNG."""
    plt = pyplot()
    rows = math.ceil(len(names) / columns)
    size = (4.6 * columns, 3.8 * rows)
    drawn, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        panel(axis, name, results[name], (methods or {}).get(name, ()))
    for row in axes:
        row[0].set_ylabel("true score at the end, minus GRPO's", fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    plt.close(drawn)
    return path


def draw(folder):
    """Draw a folder's results, a figure for each method and dials.png; return their paths."""
    folder = Path(folder)
    found = {name: dials.read(folder, name) for name in dials.DIALS}
    results = {name: result for name, result in found.items() if result}
    paths = []
    for method in dict.fromkeys(name.split("-")[0] for name in results):
        names = [name for name in results if name.startswith(f"{method}-")]
        columns = min(3, len(names))
        paths.append(figure(folder / f"{method}.png", names, results, columns=columns))
    if all(name in results for name in MAIN):
        paths.append(figure(folder / "dials.png", list(MAIN), results, MAIN))
    return paths
