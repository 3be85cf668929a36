"""Draws README's pictures from a finished run on an embedded model: docs/before_after.png and
docs/reward.png.

python -m lab.before_after runs/bpgo-tiny-flux-1
python -m lab.before_after runs/bpgo-tiny-wan-1 --prefix wan_
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro

from common import errors, models, rewards
from common.errors import InputError
from common.prompts import caption_of, read_prompts
from common.trainer import heldout


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """The folder of the run."""
    output: str = "docs"
    """Where the pictures go."""
    prefix: str = ""
    """What their names begin with."""
    columns: int = 8
    """Prompts to show, the first of the held-out file."""


def main(args):
    config = json.loads((Path(args.run) / "config.json").read_text())
    prompts = read_prompts(config["eval_prompts"])[: args.columns]
    if rewards.own.MARK in config["reward"][-1]:
        raise InputError(
            f"{args.run} is trained on a reward in a file of code, which a run's folder alone "
            "does not run"
        )
    scorers = rewards.load(config["reward"][-1:], prompts, config.get("reward_path", ()))
    settings = {
        name: config[name] for name in ("height", "width", "frames", "guidance", "guidance_2")
    }
    figure, axes = plt.subplots(
        2, args.columns, figsize=(1.5 * args.columns, 4.0 if not config["frames"] else 14.0)
    )
    for line, (name, source) in enumerate(
        (("before", config["model"]), ("after", f"{args.run}/export"))
    ):
        model = models.load(source, torch.float32, prompts, **settings)
        sigmas = model.sigmas(config["sampling_steps"], config["shift"])
        media = heldout.sample(model, prompts, torch.arange(len(prompts)), sigmas, len(prompts))
        (scores,) = rewards.score(scorers, media, prompts).values()
        media = (
            media if media.ndim == 4 else torch.cat(media.unbind(1), 2)
        )  # a clip's frames, one under another
        for axis, image, prompt, reward in zip(axes[line], media, map(caption_of, prompts), scores):
            axis.imshow(image.movedim(0, -1), interpolation="nearest")
            axis.set(xticks=[], yticks=[], xlabel=f"{reward:.2f}")
            if line == 0:
                axis.set_title(
                    prompt.replace(" and ", "\nand ")
                    .replace(" moving ", "\nmoving ")
                    .replace(" a ", "\na ", prompt.count(" of ")),
                    fontsize=8,
                )
        axes[line, 0].set_ylabel(name)
    figure.tight_layout()
    Path(args.output).mkdir(exist_ok=True)
    figure.savefig(Path(args.output) / f"{args.prefix}before_after.png", dpi=100)
    shutil.copy(Path(args.run) / "reward.png", Path(args.output) / f"{args.prefix}reward.png")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Args, description=__doc__))
