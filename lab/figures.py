"""The study's figures, in the papers' form, drawn from lab/results alone into lab/figures.

    python -m lab.figures

Lines are means over seeds; bands hold 95% of the mean, by Student's t. Colours are Okabe and Ito's,
which the colour-blind can tell apart."""

import base64
import io
import math
from pathlib import Path

import numpy as np

from common.reporting.pictures import pyplot
from lab import claims, verdicts
from lab.study_results import FOLDER, Results

FIGURES = Path(__file__).with_name("figures")
GREY = "#4D4D4D"
METHODS = {  # script -> what it is called, its colour
    "grpo_base": ("GRPO", GREY),
    "slas": ("SLAS", "#0072B2"),
    "bpgo": ("BPGO", "#D55E00"),
    "self_paced": ("Self-Paced", "#009E73"),
}
OTHERS = (
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#F0E442",
)  # of a reader's methods, and of settings of one method
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E5E5E5", "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.titlesize": 10,
    "axes.titleweight": "bold", "legend.frameon": False, "axes.edgecolor": "#888888",
    "lines.linewidth": 1.8,
}  # fmt: skip


# --- Curves ---


def band(curves):
    """Curves [n, k] of n seeds -> mean, low, high, each [k]; of one seed there is no band."""
    values = np.asarray(curves, dtype=float)
    mean, n = values.mean(0), len(values)
    half = np.array([verdicts.half_of_t(column) for column in values.T]) if n > 1 else 0 * mean
    return mean, mean - half, mean + half


def draw_curve(axis, runs, name, label, colour, part="evaluations", style="-"):
    """A mean line with its band; part: of the evaluations, or of the training steps."""
    if not runs or any(name not in run[part] for run in runs.values()):
        return
    curves = [run[part][name] for run in runs.values()]
    steps = (
        next(iter(runs.values()))["steps"] if part == "evaluations" else list(range(len(curves[0])))
    )
    mean, low, high = band(curves)
    axis.fill_between(steps, low, high, color=colour, alpha=0.16, lw=0)
    axis.plot(
        steps,
        mean,
        style,
        color=colour,
        label=label,
        marker="o" if part == "evaluations" else "",
        ms=3.2,
    )


def look(number, script):
    """What a method is called, and its colour; number: of the reader's methods."""
    return METHODS.get(script) or (script.removesuffix(".py"), OTHERS[number % len(OTHERS)])


def rewards(results, plt):
    """Held-out rewards over the steps: what was trained on, and the verifier (the papers' reward
    curves)."""
    wanted = [
        ("tiny-flux", "proxy", "reward", "tiny-flux: the proxy,\ntrained on it"),
        ("tiny-flux", "proxy", "truth", "tiny-flux: the verifier,\ntrained on the proxy"),
        (
            "tiny-flux",
            "doubtful",
            "truth",
            "tiny-flux: the verifier,\ntrained on a doubtful reward",
        ),
        ("tiny-sd", "proxy", "reward", "tiny-sd: the proxy,\ntrained on it"),
        ("tiny-sd", "proxy", "truth", "tiny-sd: the verifier,\ntrained on the proxy"),
        ("tiny-sd", "doubtful", "truth", "tiny-sd: the verifier,\ntrained on a doubtful reward"),
        ("tiny-wan", "doubtful", "truth", "tiny-wan: the verifier,\ntrained on a doubtful reward"),
        (
            "tiny-wan-i2v",
            "doubtful",
            "truth",
            "tiny-wan-i2v: the verifier,\ntrained on a doubtful reward",
        ),
        ("tiny-wan", "stages", "truth", "tiny-wan: the verifier,\ntrained on three stages"),
    ]
    figure, axes = plt.subplots(3, 3, figsize=(10, 8.4), sharex=True)
    for axis, (model, task, name, title) in zip(axes.flat, wanted):
        own = 0
        for script, runs in results.methods(model, task).items():
            label, colour = look(own, script)
            own += script not in METHODS
            draw_curve(axis, runs, name, label, colour)
        axis.set_title(title)
        if axis.lines:
            axis.legend(fontsize=8)  # where no line is
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    return figure


def stages(results, plt):
    """Weights of Self-Paced's stages over the steps: coarse to fine (its section 4.2)."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    colours = ("#E69F00", "#56B4E9", "#009E73")
    wanted = [("tiny-wan", {}, "tiny-wan"), ("tiny-flux", {}, "tiny-flux"),
              ("tiny-flux", {"saturation": "one-minus-hoyer"}, "tiny-flux, what the prose "
                                                               "says")]  # fmt: skip
    for axis, (model, flags, title) in zip(axes, wanted):
        runs = results.of(claims.setting("self_paced", model, "stages", **flags))
        for stage, colour in zip(claims.TASKS[model]["stages"]["reward"], colours):
            label = stage if ":" in stage else f"{stage}, the last"
            draw_curve(axis, runs, f"weight_{stage}", label, colour, part="training")
        axis.set(title=title, xlabel="training step", ylim=(0, 1))
        if axis.lines:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("weight in the reward")
    return figure


# --- One number a run ---


def dots(axis, place, values, colour, horizontal=False):
    """The seeds as faint dots, their mean as a point with its interval."""
    low, high = verdicts.interval(values)
    mean = sum(values) / len(values)
    low, high = (mean, mean) if math.isinf(low) else (low, high)
    axis.scatter([place] * len(values), values, s=9, color=colour, alpha=0.35, lw=0)
    axis.errorbar(
        [place],
        [mean],
        yerr=[[mean - low], [high - mean]],
        fmt="o",
        ms=5,
        color=colour,
        capsize=2.5,
    )
    return mean


def hacking(results, plt):
    """The proxy against the verifier, from first evaluation to last: what is gained to the right
    and not upwards is hacked."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.7))
    for axis, model in zip(axes, claims.IMAGES):
        own = 0
        for script, runs in results.methods(model, "proxy").items():
            label, colour = look(own, script)
            own += script not in METHODS
            curves = [run["evaluations"] for run in runs.values()]
            paths = np.array([[curve["reward"], curve["truth"]] for curve in curves])  # [n, 2, k]
            for path in paths:
                axis.plot(*path, color=colour, alpha=0.22, lw=0.9)
            if len(paths):
                axis.plot(*paths.mean(0), "o-", color=colour, ms=3.5, label=label)
        axis.set(title=model, xlabel="the proxy, held-out prompts")
        if axis.lines:
            axis.legend()
    axes[0].set_ylabel("the verifier, held-out prompts")
    return figure


def kinds(results, plt):
    """The coefficient of variation over semantic clusters (Self-Paced's figure 5)."""
    figure, axis = plt.subplots(figsize=(4.6, 3.3))
    runs = results.of(claims.Setting("probe:bias", "tiny-flux"))
    shown = [
        ("verifier", "verifier", GREY),
        ("clip", "tiny CLIP", "#0072B2"),
        ("biased", "judge, +.1 for one kind", "#D55E00"),
    ]
    for offset, (name, label, colour) in zip((-0.4, 0, 0.4), shown if runs else ()):
        counts = (10, 15, 20)
        means = [
            dots(axis, k + offset, [run["numbers"][f"{name}_{k}"] for run in runs.values()], colour)
            for k in counts
        ]
        axis.plot([k + offset for k in counts], means, color=colour, label=label)
    axis.set(
        xlabel="clusters of captions",
        ylabel="coefficient of variation beyond chance, %",
        xticks=(10, 15, 20),
        ylim=0,
    )
    if axis.lines:
        axis.legend(fontsize=8, loc=(0.02, 0.45))
    return figure


# --- Samples ---


def samples(results, plt, model, task, methods):
    """A line for each of the base model, GRPO and the methods: the same prompts from the same
    noise."""
    from PIL import Image

    places = [("before", claims.Setting("probe:samples", model))]
    places += [(look(0, script)[0], claims.setting(script, model, task)) for script in methods]
    shown = [(label, results.of(setting).get(0, {}).get("pictures")) for label, setting in places]
    shown = [(label, pictures) for label, pictures in shown if pictures]
    columns = len(shown[0][1]["png"]) if shown else 1
    wide, high = (2.4, 0.72) if model in claims.CLIPS else (1.25, 1.55)
    lines = max(1, len(shown))
    figure, axes = plt.subplots(
        lines, columns, figsize=(wide * columns + 0.6, 0.45 + high * lines),
        squeeze=False, gridspec_kw=dict(wspace=0.06, hspace=0.25),
    )  # fmt: skip
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for line, (label, pictures) in zip(axes, shown):
        for axis, png, truth in zip(line, pictures["png"], pictures["truth"]):
            axis.imshow(
                Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"),
                interpolation="nearest",
            )
            axis.set_xlabel(f"{truth:.2f}", fontsize=7.5, labelpad=1.5, color="#555555")
        line[0].set_ylabel(label, fontsize=9, fontweight="bold")
    for axis, caption in zip(axes[0], shown[0][1]["captions"] if shown else ()):
        axis.set_title(folded(caption, 34 if wide > 2 else 18), fontsize=7.5, fontweight="normal")
    return figure


def folded(caption, width):
    """A caption in lines of about `width` letters."""
    import textwrap

    return "\n".join(textwrap.wrap(caption, width))


DRAWN = {
    "rewards": rewards,
    "proxy_verifier": hacking,
    "stage_weights": stages,
    "kinds": kinds,
    "samples_proxy": lambda results, plt: samples(
        results, plt, "tiny-flux", "proxy", ("grpo_base", "slas")
    ),
    "samples_doubtful": lambda results, plt: samples(
        results, plt, "tiny-flux", "doubtful", ("grpo_base", "bpgo")
    ),
    "samples_clips": lambda results, plt: samples(
        results, plt, "tiny-wan", "doubtful", ("grpo_base", "bpgo")
    ),
}


def draw(results, folder):
    """All figures that have runs into a folder, each a PNG of at most 256 colours."""
    from PIL import Image

    plt, folder = pyplot(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in DRAWN.items():
        with plt.rc_context(STYLE):
            figure = drawn(results, plt)
            if not any(axis.has_data() for axis in figure.axes):
                (folder / f"{name}.png").unlink(missing_ok=True)
                plt.close(figure)
                continue
            for axis in (axis for axis in figure.axes if not axis.has_data()):
                axis.text(
                    0.5, 0.5, verdicts.NONE, transform=axis.transAxes, ha="center", color="#888888"
                )
            if not name.startswith("samples"):
                figure.tight_layout()
            file = io.BytesIO()
            figure.savefig(file, dpi=110, bbox_inches="tight")
            plt.close(figure)
        Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            folder / f"{name}.png", optimize=True
        )


if __name__ == "__main__":
    draw(Results(FOLDER), FIGURES)
