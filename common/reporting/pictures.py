"""Pictures of a run: samples with their prompts and rewards, clips, and curves.

matplotlib, torchvision and diffusers take seconds to import: each function imports what it draws
with.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

from common.prompts.pictures import sources


def save_samples(
    folder: Path,
    step: int,
    media: torch.Tensor,
    prompts: list[str],
    rewards: Iterable[float | torch.Tensor],
    fps: float,
    words: Sequence[str] = (),
) -> Path:
    """Save samples [n, 3, H, W], or clips [n, F, 3, H, W], as FOLDER/samples/step_NNNNNN.png.

    Clips also go to step_NNNNNN.mp4. words: as for `save_grid`. Return the path of the PNG.
    """
    path = folder / "samples" / f"step_{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    if media.ndim == 4:
        save_grid(path, media, prompts, rewards, words)
    else:
        save_strips(path, media, prompts, rewards)
        save_clips(path.with_suffix(".mp4"), media, fps)
    return path


def beside_sources(folder: Path, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return edited images beside their first sources: source, before, after, [n, 3, H, 3 W].

    media [n, 3, H, W] in [0, 1]. `before` are the images of the first call for a run's folder,
    which are kept in FOLDER/samples/before.png. The first call returns source and image.
    """
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.functional import to_pil_image

    height, width = media.shape[-2:]
    images = [sources(prompts, height, width)[:, 0].to(media)]
    path = folder / "samples/before.png"
    if path.is_file():
        strip = decode_image(str(path), ImageReadMode.RGB).to(media) / 255  # [3, H, n W]
        images.append(torch.stack(strip.split(width, dim=2))[: len(media)])
    else:
        path.parent.mkdir(exist_ok=True)
        to_pil_image(torch.cat(list(media.clamp(0, 1).cpu()), 2)).save(path)
    return torch.cat([*images, media], 3)


def save_grid(
    path: Path,
    images: torch.Tensor,
    prompts: list[str],
    rewards: Iterable[float | torch.Tensor],
    words: Sequence[str] = (),
    columns: int = 4,
) -> None:
    """Save a PNG of images [n, 3, H, W] in [0, 1], each above its prompt and reward.

    words: the text that a reward reads in each of the images, printed before the reward.
    """
    from common.reporting import captions

    plt = pyplot()
    lines = math.ceil(len(images) / columns)
    ratio = images.shape[-1] / images.shape[-2]
    width = 2.4 * max(1.0, ratio / 1.5)  # inches; signs and images side by side get more
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(width * columns, (width / ratio + 0.5) * lines),
        squeeze=False,
        gridspec_kw={"hspace": 0.35},
    )
    for axis in axes.flat:
        axis.axis("off")
    # !a: what a reader finds in noise may have letters that no font has
    read = [f"reads {text!a}: " for text in words] or [""] * len(images)
    for axis, image, prompt, reward, text in zip(axes.flat, images, prompts, rewards, read):
        pixels = image.float().clamp(0, 1).movedim(0, -1).cpu().numpy()
        axis.imshow(pixels, interpolation="nearest")
        end = f"\n{text}{float(reward):.2f}"
        captions.put(axis, prompt, end, lines=3, size=7, y=-0.02, pad=0, va="top")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def save_strips(
    path: Path,
    clips: torch.Tensor,
    prompts: list[str],
    rewards: Iterable[float | torch.Tensor],
    frames: int = 8,
) -> None:
    """Save a PNG with a line for each of n clips [n, F, 3, H, W] in [0, 1].

    A line has at most `frames` frames of the clip, evenly spaced, below its prompt and reward.
    """
    from torchvision.utils import make_grid

    from common.reporting import captions

    plt = pyplot()
    number = clips.shape[1]
    chosen = torch.linspace(0, number - 1, min(frames, number)).round().long()
    size = (1.5 * len(chosen), 1.9 * len(clips))
    figure, axes = plt.subplots(len(clips), 1, figsize=size, squeeze=False)
    for axis, clip, prompt, reward in zip(axes.flat, clips[:, chosen], prompts, rewards):
        strip = make_grid(clip.float().clamp(0, 1), nrow=len(chosen), padding=1, pad_value=1.0)
        axis.imshow(strip.movedim(0, -1).cpu().numpy(), interpolation="nearest")
        captions.put(axis, prompt, f"   {float(reward):.2f}", lines=1, size=8)
        axis.axis("off")
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


def save_clips(path: Path, clips: torch.Tensor, fps: float, columns: int = 4) -> None:
    """Save an MP4 of clips [n, F, 3, H, W] in [0, 1] side by side, small ones enlarged."""
    from diffusers.utils import export_to_video
    from torchvision.utils import make_grid

    scale = max(1, 96 // clips.shape[-2])
    clips = clips.float().clamp(0, 1).cpu()
    clips = clips.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    frames = []
    for moment in clips.unbind(1):
        frame = make_grid(moment, nrow=min(columns, len(clips)), padding=4, pad_value=1.0)
        height, width = frame.shape[1:]
        # video codecs want multiples of 16
        frame = pad(frame, (0, -width % 16, 0, -height % 16), value=1.0)
        frames.append(frame.movedim(0, -1).numpy())
    export_to_video(frames, str(path), fps=fps)


def save_all_curves(folder: Path, rows: list[dict[str, Any]], curves: Iterable[str]) -> None:
    """Save FOLDER/reward.png, and for each NAME in `curves` a plot of the metrics NAME, NAME_..."""
    labels = {"reward_mean": "training samples", "eval_reward": "held-out prompts, noise-free"}
    save_curves(folder / "reward.png", rows, labels, "reward")
    metrics = dict.fromkeys(name for row in rows for name in row)
    for curve in curves:
        labels = {
            name: name.removeprefix(f"{curve}_")
            for name in metrics
            if f"{name}_".startswith(f"{curve}_")
        }
        if labels:
            save_curves(folder / f"{curve}.png", rows, labels, curve)


def save_curves(
    path: Path, rows: list[dict[str, Any]], labels: dict[str, str], quantity: str
) -> None:
    """Save a PNG of metrics over the steps.

    rows: of metrics.jsonl; labels: {metric: its name in the legend}; quantity: the y axis. Metrics
    that few steps have get points.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name, label in labels.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        style = "-" if len(points) > len(rows) / 2 else "o-"
        if points:  # a run without held-out prompts lacks their curve
            axis.plot(*zip(*points), style, label=label, markersize=4)
    axis.set(xlabel="step", ylabel=quantity)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def pyplot() -> ModuleType:
    """Return matplotlib.pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
