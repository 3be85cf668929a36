"""Draw docs/learn: the world of points in two dimensions, where everything can be seen.

    python -m lab.learn    # a minute; writes docs/learn/*.png and training.gif

Shapes: N shown prompts, K samples of each, E = 1 run; otherwise as in lab/points.py.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from common import sde
from common.errors import one_line
from common.reporting.pictures import pyplot
from lab import dials
from lab.points import Judge, Ladder, Runs, Setting, draws, steps_of
from worlds import points

PAGE = Path(__file__).resolve().parents[1] / "docs/learn"
BANK = 8  # a world in which the shown prompts do not overlap
N, K = 4, 48
RATE = 0.008
SETTING = Setting(dimensions=2)
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
LIMIT = 3.2  # pictures show coordinates from -LIMIT to LIMIT


class Stages(Ladder):
    """Score points in two dimensions: the first coordinate, then both, then a narrow peak."""

    def __init__(self, bank, seeds, floor):
        super().__init__(bank, seeds, 2, floor=floor)
        self.blocks = (slice(0, 1), slice(1, 2), slice(0, 2))


def judged():
    """Return a judge that scores vague prompts low and cannot tell their samples apart."""
    return Judge(BANK, 1, 2, unsure=0.0, noise=0.05)


def staged():
    """Return stages of which the last is flat for nearly all samples of the base model."""
    world = Stages(BANK, 1, floor=0.6)
    world.thresholds = dials.calibrated(world, SETTING)
    return world


PACED = partial(dials.paced, gate="previous", saturation="one-minus-hoyer")
PANELS = (  # title, world, method
    ("GRPO", judged, dials.grpo),
    ("SLAS, gamma 0.5", judged, dials.slas_by),
    ("BPGO", judged, dials.bpgo_by),
    ("GRPO on the last stage", staged, dials.grpo),
    ("Self-Paced GRPO", staged, PACED),
)


# --- What is drawn ---


def shown_prompts(world):
    """Return N prompts [1, N, ...] with targets far from each other.

    Targets and means of the base model are in the pictures. Every second one of a Judge is vague.
    """
    z = torch.randn(1, 256, points.C, generator=points.drawn(BANK, "shown"))
    vague = torch.arange(256)[None] % 2
    every = points.prompts_of(world.world, z, vague.float())
    inside = torch.cat([every.target, every.mean], -1)[0].abs().amax(1) < 0.7 * LIMIT
    distances = torch.cdist(every.target[0], every.target[0])
    chosen = [int((inside & (vague[0] == 0)).nonzero()[0])]
    while len(chosen) < N:
        other = inside & (vague[0] == len(chosen) % 2)
        chosen.append(int((distances[chosen].amin(0) * other).argmax()))
    vague = vague[:, chosen].float() * isinstance(world, Judge)
    return points.prompts_of(world.world, z[:, chosen], vague)


@torch.no_grad()
def samples(runs, prompts, start):
    """Return noise-free samples [N, K, 2] of N prompts from the noise start [N, K, 2]."""
    z, mean = (part.repeat_interleave(start.shape[1], 1) for part in (prompts.z, prompts.mean))
    none = torch.zeros(runs.setting.sampling_steps)
    latents, _ = sde.rollout(runs.field(z, mean), start.flatten(0, 1), runs.sigmas, none, None)
    return latents[:, -1].view(start.shape)


@dataclass
class Trained:
    """Hold a run, what it sampled of the shown prompts, and its held-out truth."""

    runs: Runs
    prompts: object
    """The shown prompts [1, N, ...]."""
    shown: list
    """Samples [N, K, 2] before the training and after every `every` steps."""
    truth: list
    """Mean truth of the held-out prompts at the same steps."""


def trained(world, method, setting=SETTING, every=4):
    """Train one run, and return it as Trained."""
    runs = Runs(world, (RATE,), setting)
    prompts = shown_prompts(world)
    start = torch.randn(N, K, 2, generator=points.drawn(BANK, "start"))
    shown, truth = [], []

    def look():
        shown.append(samples(runs, prompts, start))
        truth.append(runs.evaluate()["truth"].item())

    look()
    for step, _ in enumerate(steps_of(runs, method), start=1):
        if step % every == 0:
            look()
    return Trained(runs, prompts, shown, truth)


def advantages(world, method):
    """Return a first step of the shown prompts: points x [N, 16, 2] and advantages [N, 16]."""
    setting = Setting(dimensions=2, prompts_per_step=N, group_size=16)
    runs = Runs(world, (RATE,), setting)
    known = runs.known()
    _, noise, error, _ = draws(world, setting, 0, 0)
    known.prompts = shown_prompts(world)
    x = runs.rollout(known.prompts, noise).latents[0, :, -1].view(N, 16, 2)
    rewards = runs.score(x[None], known.prompts, error)
    known.reward = rewards[world.trained]
    return x, sum(method(rewards, known))[0]


# --- Pictures ---


def square(axis, title):
    """Prepare an axis that shows the plane."""
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=(), yticks=())
    axis.set_title(title, fontsize=9)


def draw_samples(axis, prompts, x):
    """Draw samples x [N, K, 2] in the colours of their prompts, and the targets as stars.

    The targets of vague prompts are hollow: the judge cannot tell their samples apart.
    """
    for n, colour in enumerate(COLOURS):
        axis.scatter(*x[n].T, s=9, color=colour, alpha=0.55, lw=0)
        vague = bool(prompts.vague[0, n])
        face, edge = ("white", colour) if vague else (colour, "black")
        axis.scatter(*prompts.target[0, n], s=150, marker="*", color=face, edgecolor=edge, lw=1)


def draw_before_after(path, one):
    """Draw the samples before and after a training, and the judge's truth of one prompt."""
    plt = pyplot()
    drawn, axes = plt.subplots(1, 2, figsize=(8, 4.2))
    for axis, at, word in zip(axes, (0, -1), ("before", "after 80 steps of GRPO")):
        square(axis, f"{word}: mean score {one.truth[at]:.2f}")
        draw_samples(axis, one.prompts, one.shown[at])
    drawn.tight_layout()
    drawn.savefig(path, dpi=100)
    plt.close(drawn)


def draw_arrows(path, one, prompt=0):
    """Draw where the base model moves points at three noise levels, and what training adds."""
    plt = pyplot()
    line = torch.linspace(-LIMIT * 0.85, LIMIT * 0.85, 8)
    grid = torch.cartesian_prod(line, line)  # [64, 2]
    z, mean = (part[:, prompt : prompt + 1].expand(-1, len(grid), -1)
               for part in (one.prompts.z, one.prompts.mean))  # fmt: skip
    drawn, axes = plt.subplots(1, 3, figsize=(12, 4.3))
    for axis, sigma in zip(axes, (0.9, 0.6, 0.3)):
        square(axis, f"noise level {sigma:g}")
        with torch.no_grad():  # denoising moves a point against its velocity
            base, now = (
                -one.runs.field(z, mean, base)(grid, torch.tensor(sigma)) for base in (True, False)
            )
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 6, "width": 0.005}
        axis.quiver(*grid.T, *base.T, color="#bbbbbb", **arrows)
        axis.quiver(*grid.T, *(now - base).T, color=COLOURS[0], **arrows)
        axis.scatter(*mean[0, 0], s=70, marker="s", color="#888888", edgecolor="black", zorder=3)
        target = one.prompts.target[0, prompt]
        axis.scatter(*target, s=170, marker="*", color=COLOURS[0], edgecolor="black", zorder=3)
    drawn.tight_layout()
    drawn.savefig(path, dpi=80)
    plt.close(drawn)


def draw_advantages(path, panels):
    """Draw the groups of a first step with their advantages as colours.

    panels: [(title, world, method)].
    """
    plt = pyplot()
    drawn, axes = plt.subplots(2, 3, figsize=(10, 6.9))
    for axis, (title, world, method) in zip(axes.flat, panels):
        prompts = shown_prompts(world)
        x, found = advantages(world, method)
        square(axis, f"{title}: mean |A| {found.abs().mean():.2f}")
        for group, values, target, vague in zip(x, found, prompts.target[0], prompts.vague[0]):
            for point in group:
                axis.plot(*zip(point, target), color="#e4e4e4", lw=0.6, zorder=0)
            dots = axis.scatter(*group.T, c=values, cmap="RdBu", vmin=-2, vmax=2, s=34,
                                edgecolor="#444444", lw=0.4)  # fmt: skip
            face = "white" if vague else "black"
            axis.scatter(*target, s=120, marker="*", color=face, edgecolor="black", lw=0.8)
    axes[1, 2].axis("off")
    bar = drawn.colorbar(dots, ax=axes[1, 2], orientation="horizontal", location="top")
    bar.set_label("advantage: blue is reinforced, red is suppressed")
    drawn.tight_layout()
    drawn.savefig(path, dpi=80)
    plt.close(drawn)


def draw_training(path, runs, every=4):
    """Draw the trainings {title: Trained} side by side as a GIF, and their truth over the steps."""
    plt = pyplot()
    frames = []
    for at in range(len(next(iter(runs.values())).shown)):
        drawn, axes = plt.subplots(2, 3, figsize=(7.5, 5.2))
        places = (axes[0, 0], axes[0, 1], axes[0, 2], axes[1, 0], axes[1, 1])
        for axis, (title, one) in zip(places, runs.items()):
            square(axis, f"{title}: {one.truth[at]:.2f}")
            draw_samples(axis, one.prompts, one.shown[at])
        curves = axes[1, 2]
        last = (len(one.truth) - 1) * every
        for title, one in runs.items():
            curves.plot(range(0, at * every + 1, every), one.truth[: at + 1], lw=1.5, label=title)
        curves.set(xlim=(0, last), ylim=(0, 1))
        curves.set_title(f"mean score, step {at * every}", fontsize=9)
        curves.legend(fontsize=6, frameon=False, loc="lower right")
        curves.tick_params(labelsize=7)
        drawn.tight_layout()
        drawn.canvas.draw()
        picture = Image.fromarray(np.asarray(drawn.canvas.buffer_rgba())).convert("RGB")
        frames.append(picture.quantize(48, dither=Image.Dither.NONE))
        plt.close(drawn)
    times = [250] * (len(frames) - 1) + [2000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


# --- The command ---


@dataclass
class Args:
    output: Path = PAGE
    """Folder of the pictures."""
    steps: int = SETTING.steps
    """Number of training steps."""


def main(args):
    """Train, and draw all pictures."""
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    worlds = {make: make() for make in (judged, staged)}
    setting = Setting(dimensions=2, steps=args.steps)
    runs = {title: trained(worlds[make], method, setting) for title, make, method in PANELS}
    draw_before_after(args.output / "before_after.png", runs["GRPO"])
    draw_arrows(args.output / "arrows.png", runs["GRPO"])
    panels = [(title, worlds[make], method) for title, make, method in PANELS]
    draw_advantages(args.output / "advantages.png", panels)
    draw_training(args.output / "training.gif", runs)
    return runs


if __name__ == "__main__":
    with one_line():
        main(tyro.cli(Args, description=__doc__))
