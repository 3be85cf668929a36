"""What a run leaves to look at: metrics.jsonl, trackers, sample grids, curves, report.html,
progress bar, last line."""

import html
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import pad

from common import errors
from common.prompts import caption_of
from common.reporting import card, page
from common.trainer import signals
from common.trainer.run_folder import line_of, rows_before, write_rows

if TYPE_CHECKING:  # a picture can do without
    import wandb
    from torch.utils.tensorboard import SummaryWriter

    from common.trainer.runtime import Runtime


class Report:
    """Writes on the main process only. A resumed run writes metrics.jsonl again from row `start`
    on.

    Besides reward.png there is a NAME.png of the metrics NAME and NAME_..., for each name in CURVES
    of a script's Args."""

    def __init__(self, run: "Runtime", start: int) -> None:
        self.run, self.path = run, run.output / "metrics.jsonl"
        self.curves = ("share", *getattr(run.args, "CURVES", ()))
        self.rows = rows_before(self.path, start)  # on every process: `ends` is asked on all
        if run.is_main:
            write_rows(self.path, self.rows)
        start_tracker(run)

    def steps(self, start: int, stop: int) -> Iterator[int]:
        """The step numbers, behind a progress bar with reward, ratio error and the time left.
        Between them, once one is finished, raises what `check_signals` does."""
        from tqdm import tqdm

        self.bar = tqdm(
            range(start, stop),
            initial=start,
            total=stop,
            disable=not self.run.is_main,
            dynamic_ncols=True,
            unit="step",
        )
        with signals.end_the_step(self.run):
            for step in self.bar:
                yield step
                self.run.finish(step + 1)
                self.run.check_signals()

    def log(self, step: int, metrics: dict[str, float | torch.Tensor]) -> None:
        """Appends a row to metrics.jsonl and sends it to the tracker; tensors of one element."""
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        self.rows.append(row)
        self.run.accelerator.log(
            {name: value for name, value in row.items() if name != "step"}, step=step
        )
        if self.run.is_main:
            with self.path.open("a") as file:
                file.write(line_of(row))
            if "reward_mean" in row:
                self.bar.set_postfix(
                    reward=f"{row['reward_mean']:.3f}", ratio_error=f"{row['ratio_error']:.0e}"
                )

    def samples(
        self, step: int, media: torch.Tensor, prompts: list[str], rewards: torch.Tensor
    ) -> None:
        """samples/step_NNNNNN.png: up to 16 images [n, 3, H, W] in [0, 1] with their prompts and
        rewards [n]; of clips [n, F, 3, H, W] up to 8 frames each, and all of them side by side in
        step_NNNNNN.mp4."""
        if self.run.is_main:
            path = self.run.output / "samples" / f"step_{step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            shown = media[:16], [caption_of(prompt) for prompt in prompts[:16]], rewards[:16]
            if media.ndim == 4:
                save_grid(path, *shown)
            else:
                save_strips(path, *shown)
                save_clips(path.with_suffix(".mp4"), media[:16], self.run.args.fps)
            for tracker in self.run.accelerator.trackers:
                SHOW[tracker.name](tracker.tracker, step, path, *shown)
            self.plot()

    def plot(self) -> None:
        """reward.png: the training reward of each step, and the held-out one; the other curves; and
        report.html."""
        if not self.run.is_main:
            return
        rewards = {"reward_mean": "training samples", "eval_reward": "held-out prompts, noise-free"}
        save_curves(self.run.output / "reward.png", self.rows, rewards, "reward")
        for curve in self.curves:
            names = dict.fromkeys(
                name for row in self.rows for name in row if f"{name}_".startswith(f"{curve}_")
            )
            labels = {name: name.removeprefix(f"{curve}_") for name in names}
            if labels:
                save_curves(self.run.output / f"{curve}.png", self.rows, labels, curve)
        page.write(self.run.output)

    def finish(self, step: int, metrics: dict[str, float | torch.Tensor], export: str) -> "Report":
        """Logs the last evaluation, closes everything, says what came out and where to look
        (`export` is the line that loads the model), and returns the report. Raises RunError where
        the export's card cannot be written or sent."""
        if metrics:
            self.log(step, metrics)
        self.plot()
        self.bar.close()
        for tracker in (
            self.run.accelerator.trackers
        ):  # no end_training: the processes' group is errors.run's to end
            tracker.finish()
        (
            errors.rescues.clear(),
            errors.alarms.clear(),
        )  # nothing is left to save, and they hold the model
        held_out = [row["eval_reward"] for row in self.rows if "eval_reward" in row]
        if held_out:
            self.run.print(
                f"held-out reward {held_out[0]:.3f} -> {held_out[-1]:.3f} "
                f"({held_out[-1] - held_out[0]:+.3f}; "
                "fixed prompts, fixed starting noise, noise-free sampling)"
            )
        samples = self.run.output / "samples"
        shown = f" and {samples}" * samples.exists()
        self.run.print(f"look at {self.run.output}/report.html{shown}; the trained model: {export}")
        card.leave(self.run)
        return self

    def ends(self, name: str, number: int) -> tuple[float, float]:
        """Mean of a metric in the first `number` training steps that have it, and in the last."""
        values = [row[name] for row in self.rows if math.isfinite(row.get(name, math.nan))]
        return sum(values[:number]) / number, sum(values[-number:]) / number


class Clock:
    """Seconds between laps, of finished work: waits for the accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the clock was made."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def start_tracker(run: "Runtime") -> None:
    """Under the run's name, by which TensorBoard calls its folder; in W&B a run that goes on is the
    same one. Raises InputError for a tracker that does not start."""
    name, settings = run.output.name, {name: str(value) for name, value in vars(run.args).items()}
    wandb = {"name": name, "id": run.name or None, "resume": "allow", "dir": str(run.output)}
    try:
        run.accelerator.init_trackers(
            "vgrpo" if run.args.tracker == "wandb" else name, settings, {"wandb": wandb}
        )
    except Exception as error:  # W&B's own: nobody is logged in, no network
        if errors.of_the_machine(error):
            raise
        raise errors.InputError(
            f"--tracker {run.args.tracker} does not start ({errors.text(error)}); for W&B `wandb "
            "login`, or set "
            "WANDB_MODE=offline, or take --tracker tensorboard"
        ) from None


def show_in_tensorboard(
    writer: "SummaryWriter",
    step: int,
    path: Path,
    media: torch.Tensor,
    prompts: list[str],
    rewards: torch.Tensor,
) -> None:
    """The picture of the samples (prompts and rewards are in it), and a table of both, which can be
    searched."""
    from PIL import Image

    with Image.open(path) as picture:
        writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    said = (html.escape(prompt).replace("|", "\\|").replace("\n", " ") for prompt in prompts)
    lines = [f"| {prompt} | {float(reward):.3f} |" for prompt, reward in zip(said, rewards)]
    writer.add_text("samples", "\n".join(["| prompt | reward |", "| --- | --- |", *lines]), step)


def show_in_wandb(
    run: "wandb.Run",
    step: int,
    path: Path,
    media: torch.Tensor,
    prompts: list[str],
    rewards: torch.Tensor,
) -> None:
    """Each image with its prompt and reward under it; clips side by side, under them what they are,
    in their order."""
    import wandb

    said = [f"{prompt} ({float(reward):.3f})" for prompt, reward in zip(prompts, rewards)]
    if media.ndim == 4:
        pictures = (media.float().clamp(0, 1).movedim(1, -1) * 255).round().byte().cpu().numpy()
        shown = [wandb.Image(picture, caption=words) for picture, words in zip(pictures, said)]
    else:
        words = "; ".join(f"{number}: {words}" for number, words in enumerate(said, 1))
        shown = wandb.Video(str(path.with_suffix(".mp4")), caption=words, format="mp4")
    run.log({"samples": shown}, step=step)


SHOW = {"tensorboard": show_in_tensorboard, "wandb": show_in_wandb}


def save_grid(
    path: Path,
    images: torch.Tensor,
    prompts: list[str],
    rewards: Iterable[float | torch.Tensor],
    columns: int = 4,
) -> None:
    """A PNG of images [n, 3, H, W] in [0, 1], each with its prompt and reward, of n, under it."""
    from common.reporting import captions

    plt, lines = pyplot(), -(-len(images) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(2.4 * columns, 2.9 * lines),
        squeeze=False,
        gridspec_kw=dict(hspace=0.35),
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, prompt, reward in zip(axes.flat, images, prompts, rewards):
        axis.imshow(image.float().clamp(0, 1).movedim(0, -1).cpu().numpy(), interpolation="nearest")
        captions.put(
            axis, prompt, f"\n{float(reward):.2f}", lines=3, size=7, y=-0.02, pad=0, va="top"
        )
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def save_strips(
    path: Path,
    clips: torch.Tensor,
    prompts: list[str],
    rewards: Iterable[float | torch.Tensor],
    frames: int = 8,
) -> None:
    """A PNG with a line for each of n clips [n, F, 3, H, W] in [0, 1]: some of its frames, its
    prompt and reward."""
    from torchvision.utils import make_grid

    from common.reporting import captions

    plt, chosen = (
        pyplot(),
        torch.linspace(0, clips.shape[1] - 1, min(frames, clips.shape[1])).round().long(),
    )
    figure, axes = plt.subplots(
        len(clips), 1, figsize=(1.5 * len(chosen), 1.9 * len(clips)), squeeze=False
    )
    for axis, clip, prompt, reward in zip(axes.flat, clips[:, chosen], prompts, rewards):
        strip = make_grid(clip.float().clamp(0, 1), nrow=len(chosen), padding=1, pad_value=1.0)
        axis.imshow(strip.movedim(0, -1).cpu().numpy(), interpolation="nearest")
        captions.put(axis, prompt, f"   {float(reward):.2f}", lines=1, size=8)
        axis.axis("off")
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


def save_clips(path: Path, clips: torch.Tensor, fps: float, columns: int = 4) -> None:
    """An MP4 of clips [n, F, 3, H, W] in [0, 1] side by side; small ones are enlarged."""
    from diffusers.utils import export_to_video
    from torchvision.utils import make_grid

    scale = max(1, 96 // clips.shape[-2])
    clips = (
        clips.float().clamp(0, 1).cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    )
    frames = [
        make_grid(frame, nrow=min(columns, len(clips)), padding=4, pad_value=1.0)
        for frame in clips.unbind(1)
    ]
    height, width = frames[0].shape[1:]
    frames = [
        pad(frame, (0, -width % 16, 0, -height % 16), value=1.0) for frame in frames
    ]  # as video codecs want it
    export_to_video([frame.movedim(0, -1).numpy() for frame in frames], str(path), fps=fps)


def save_curves(
    path: Path, rows: list[dict[str, float]], labels: dict[str, str], quantity: str
) -> None:
    """A PNG of metrics over the steps: rows of metrics.jsonl, labels {metric: what the legend calls
    it}; those of a few steps get points."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name, label in labels.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        style = "-" if len(points) > len(rows) / 2 else "o-"
        if points:  # a run without held-out prompts has no such curve
            axis.plot(*zip(*points), style, label=label, markersize=4)
    axis.set(xlabel="step", ylabel=quantity)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def pyplot() -> ModuleType:
    """matplotlib without a screen. It takes seconds to import, as do torchvision and diffusers:
    only when drawing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
