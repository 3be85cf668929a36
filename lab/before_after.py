"""Draw README's pictures from a finished run on an embedded model: docs/letters_before_after.png,
and docs/reward.png of bash run.sh.

    python -m lab.before_after runs/grpo_base-tiny-letters-1 --prefix letters_ --columns 6
    python -m lab.before_after runs/bpgo-tiny-flux-1
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from common import errors, models
from common.errors import InputError
from common.prompts import caption_of, read_prompts
from common.reporting.pictures import pyplot
from common.rewards import Rewards, own
from common.trainer.evaluator import sample
from evaluation import sampler, trained


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """Folder of the run."""
    output: str = "docs"
    """Folder of the pictures."""
    prefix: str = ""
    """What the names of the pictures begin with."""
    columns: int = 8
    """Number of prompts to show, the first of the held-out ones."""


def main(args):
    weights = trained.find(Path(args.run) / "export")
    reward = weights.config["reward"][-1]
    if own.MARK in reward:
        raise InputError(
            f"{args.run}: its reward is in a file of code, and a run's folder alone does not run "
            "code."
        )
    settings = replace(weights.settings(), reward=(reward,), watch=())
    prompts = read_prompts(settings.eval_prompts)[: args.columns]
    rewards = Rewards(settings, prompts)
    model = models.load(settings.model, torch.float32, prompts, **settings.model_settings())
    ratio = model.width / model.height
    width = 1.5 * max(1.0, ratio / 1.5)  # inches; signs get more
    height = 14.0 if model.video else 2 * (width / ratio + 0.5)
    plt = pyplot()
    figure, axes = plt.subplots(2, args.columns, figsize=(width * args.columns, height))
    draw(axes[0], "before", model, settings=settings, rewards=rewards, prompts=prompts)
    for axis, prompt in zip(axes[0], prompts):
        axis.set_title(in_lines(caption_of(prompt)), fontsize=8)
    trained.load(model, weights)
    draw(axes[1], "after", model, settings=settings, rewards=rewards, prompts=prompts)
    figure.tight_layout()
    output = Path(args.output)
    output.mkdir(exist_ok=True)
    figure.savefig(output / f"{args.prefix}before_after.png", dpi=100)
    shutil.copy(Path(args.run) / "reward.png", output / f"{args.prefix}reward.png")


def draw(axes, name, model, settings, rewards, prompts):
    """Draw a sample of each prompt and its reward in a line of the picture."""
    media = sample(
        model,
        prompts,
        streams=torch.arange(len(prompts)),
        sigmas=model.sigmas(settings.sampling_steps, settings.shift),
        micro_batch=len(prompts),
    )
    scores = rewards.score(media, prompts)
    sampler.check(rewards, scores, prompts)
    (scores,) = scores.values()
    if media.ndim == 5:
        media = torch.cat(media.unbind(1), 2)  # a clip's frames, one under another
    words = rewards.words(media) or [""] * len(prompts)
    for axis, image, reward, text in zip(axes, media, scores, words):
        axis.imshow(image.movedim(0, -1), interpolation="nearest")
        axis.set(xticks=[], yticks=[], xlabel=f"{text} {reward:.2f}".strip())
    axes[0].set_ylabel(name)


def in_lines(caption):
    """Return a caption in lines that are as short as a picture is wide."""
    lines = caption.replace(" and ", "\nand ").replace(" moving ", "\nmoving ")
    return lines.replace(" a ", "\na ", caption.count(" of "))


if __name__ == "__main__":
    errors.run(main, tyro.cli(Args, description=__doc__))
