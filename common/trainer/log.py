"""What a run records: metrics.jsonl, the tracker, pictures, report.html and the progress bar."""

import html
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import errors, models
from common.args import Args
from common.errors import RunError
from common.models.family import Family
from common.prompts import caption_of, image_of
from common.reporting import page, pictures
from common.reporting.files import line_of, rows_before, write_rows
from common.trainer import run_folder
from common.trainer.processes import Processes

SHOWN = 16  # samples in a picture


class Log:
    """The record of a run: metrics, samples, and what is printed at its end.

    output: the run's folder, which has a config.json; start: the first step, from which on the rows
    of an earlier run are dropped. Only the main process
    writes; every process keeps `rows`, one dictionary a step. Raises InputError if the tracker
    does not start.
    """

    def __init__(self, args: Args, output: Path, processes: Processes, start: int) -> None:
        from tqdm import tqdm

        self.args = args
        self.output = output
        self.processes = processes
        self.path = output / "metrics.jsonl"
        self.rows = rows_before(self.path, start)
        self.tracker = None
        if processes.is_main:
            write_rows(self.path, self.rows)
            self.tracker = start_tracker(args, output)
        self.bar = tqdm(
            initial=start,
            total=args.steps,
            disable=not processes.is_main,
            dynamic_ncols=True,
            unit="step",
            leave=False,  # after an error nothing is drawn below its line
        )

    def row(self, step: int, metrics: dict[str, float | torch.Tensor]) -> None:
        """Append the metrics of a step, numbers or tensors of one element; without any do nothing.

        The bar counts the steps that have a reward_mean.
        """
        if not metrics:
            return
        values = {name: float(value) for name, value in metrics.items()}
        row = {"step": step, **values}
        self.rows.append(row)
        if not self.processes.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line_of(row))
        if self.tracker:
            self.tracker.log(values, step=step)
        if "reward_mean" in row:
            reward = f"{row['reward_mean']:.3f}"
            ratio_error = f"{row.get('ratio_error', math.nan):.0e}"
            self.bar.set_postfix(reward=reward, ratio_error=ratio_error, refresh=False)
            self.bar.update()

    def samples(
        self,
        step: int,
        media: torch.Tensor,
        prompts: list[str],
        rewards: torch.Tensor,
        words: Sequence[str] = (),
    ) -> None:
        """Save the first 16 samples with their prompts and rewards [n], and draw the curves anew.

        media: images [n, 3, H, W] in [0, 1], or clips [n, F, 3, H, W]. words: the text that a
        reward reads in each of the images, if one does.
        """
        if not self.processes.is_main:
            return
        media = media[:SHOWN]
        if media.ndim == 4 and image_of(prompts[0]):  # an edit
            media = pictures.beside_sources(self.output, media, prompts[: len(media)])
        captions = [caption_of(prompt) for prompt in prompts[:SHOWN]]
        scores = [float(reward) for reward in rewards[:SHOWN]]
        path = pictures.save_samples(
            self.output,
            step,
            media=media,
            prompts=captions,
            rewards=scores,
            fps=self.args.fps,
            words=words,
        )
        if self.args.tracker == "tensorboard":
            show_in_tensorboard(
                self.tracker.tracker, step, path=path, prompts=captions, rewards=scores
            )
        if self.args.tracker == "wandb":
            show_in_wandb(
                self.tracker.tracker, step, path=path, media=media, prompts=captions, rewards=scores
            )
        self.plot()

    def plot(self) -> None:
        """Draw the curves from the rows, and write report.html."""
        if self.processes.is_main:
            curves = ("share", *self.args.CURVES)
            pictures.save_all_curves(self.output, self.rows, curves)
            page.write(self.output)

    def finish(self, model: Family, exported: str) -> "Log":
        """Draw, close the bar and the tracker, print the result, and write the model card.

        model: that was trained; exported: the line that loads the export. --push-to-hub sends the
        export to the hub. Raises RunError, on every process, if the card cannot be written or
        sent.
        """
        self.plot()
        self.bar.leave = True
        self.bar.close()
        if self.tracker:
            self.tracker.finish()
        held_out = [row["eval_reward"] for row in self.rows if "eval_reward" in row]
        if held_out:
            first, last = held_out[0], held_out[-1]
            self.processes.print(
                f"held-out reward {first:.3f} -> {last:.3f} ({last - first:+.3f}; fixed prompts, "
                "fixed starting noise, noise-free sampling)"
            )
        shown = run_folder.shown(self.args, self.output)
        places = f"{shown}/report.html"
        if (self.output / "samples").exists():
            places += f" and {shown}/samples"
        self.processes.print(f"look at {places}; the trained model: {exported}")
        self._publish(model)
        return self

    def ends(self, name: str, number: int) -> tuple[float, float]:
        """Return the mean of a metric over the first `number` rows that have it, and the last.

        Used by self_paced.py --calibrate.
        """
        values = [row[name] for row in self.rows if math.isfinite(row.get(name, math.nan))]
        first, last = values[:number], values[-number:]
        return sum(first) / len(first), sum(last) / len(last)

    def _publish(self, model: Family) -> None:
        """Write the model card, and push the export if --push-to-hub asks for it."""
        main = self.processes.is_main
        reason = self.processes.together(main, lambda: self._card_and_push(model))
        if not reason:
            return
        repository, shown = self.args.push_to_hub, run_folder.shown(self.args, self.output)
        if not repository:
            raise RunError(f"the model card: {reason}. The run itself is complete.")
        raise RunError(
            f"--push-to-hub {repository}: {reason}. The run itself is complete. Push it later: "
            f"`hf upload {repository} {shown}/export`"
        )

    def _card_and_push(self, model: Family) -> None:
        from common import hub
        from common.reporting import card

        base = card.Base(
            source=models.source_of(self.args.model, self.args.source),
            task=model.task(),
            pipeline=model.pipeline.__name__,
            two_experts=len(model.trainable) > 1,
        )
        card.write(self.output, self.args, base)
        if self.args.push_to_hub:
            address = hub.push(self.args.push_to_hub, self.output / "export")
            self.processes.print(f"pushed to {address}")


class Clock:
    """Seconds between laps. A lap waits for the accelerator to finish its work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, or since the clock was made."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = self.last
        self.last = time.perf_counter()
        return self.last - before


def start_tracker(args: Args, output: Path) -> Any:
    """Return accelerate's tracker of --tracker, started, or None. Raises InputError.

    TensorBoard writes into OUTPUT/NAME of the run; in W&B a resumed run is the same run.
    """
    if args.tracker == "none":
        return None
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    advice = "use --tracker tensorboard, or none"
    if args.tracker == "wandb":
        advice = "run `wandb login`, set WANDB_MODE=offline, or use --tracker tensorboard"
    with errors.loading("--tracker", args.tracker, do=advice):
        if args.tracker == "tensorboard":
            tracker = TensorBoardTracker(output.name, output)
        else:
            tracker = WandBTracker(
                "vgrpo",
                name=output.name,
                id=json.loads((output / "config.json").read_text(encoding="utf-8")).get("run"),
                resume="allow",
                dir=str(output),
            )
        tracker.start()
        tracker.store_init_configuration({name: str(value) for name, value in vars(args).items()})
    return tracker


def show_in_tensorboard(
    writer: Any, step: int, path: Path, prompts: list[str], rewards: list[float]
) -> None:
    """Add a picture of samples to a SummaryWriter, and a table of their prompts and rewards."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    writer.add_image("samples", pixels, step, dataformats="HWC")
    lines = ["| prompt | reward |", "| --- | --- |"]
    for prompt, reward in zip(prompts, rewards):
        words = html.escape(prompt).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {words} | {reward:.3f} |")
    writer.add_text("samples", "\n".join(lines), step)


def show_in_wandb(
    wandb_run: Any,
    step: int,
    path: Path,
    media: torch.Tensor,
    prompts: list[str],
    rewards: list[float],
) -> None:
    """Log images, each with its prompt and reward, or one video of all clips, to a W&B run."""
    import wandb

    captions = [f"{prompt} ({reward:.3f})" for prompt, reward in zip(prompts, rewards)]
    if media.ndim == 4:
        pixels = (media.float().clamp(0, 1).movedim(1, -1) * 255).round().byte().cpu().numpy()
        shown = [wandb.Image(image, caption=words) for image, words in zip(pixels, captions)]
    else:
        words = "; ".join(f"{number}: {words}" for number, words in enumerate(captions, 1))
        shown = wandb.Video(str(path.with_suffix(".mp4")), caption=words, format="mp4")
    wandb_run.log({"samples": shown}, step=step)
