"""Draws README's pictures from a finished run on tiny-flux: docs/before_after.png and docs/reward.png.

python -m lab.before_after runs/bpgo-tiny-flux-1
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

from common import heldout, models, sde
from common.prompts import read_prompts
from common.rewards.verifier import verify


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """The folder of the run."""
    output: str = "docs"
    """Where the pictures go."""
    columns: int = 8
    """Prompts to show, the first of the held-out file."""


def main(args):
    config = json.loads((Path(args.run) / "config.json").read_text())
    prompts = read_prompts(config["eval_prompts"])[: args.columns]
    sigmas = sde.shifted_sigmas(config["sampling_steps"], config["shift"])
    figure, axes = plt.subplots(2, args.columns, figsize=(1.5 * args.columns, 4.0))
    for line, (name, source) in enumerate((("before", config["model"]), ("after", f"{args.run}/export"))):
        model = models.load(source, torch.float32, config["height"], config["width"], config["guidance"])
        images = heldout.sample(model, prompts, torch.arange(len(prompts)), sigmas, config["micro_batch"])
        rewards = verify(images, prompts)["score"]
        for axis, image, prompt, reward in zip(axes[line], images, prompts, rewards):
            axis.imshow(image.movedim(0, -1), interpolation="nearest")
            axis.set(xticks=[], yticks=[], xlabel=f"{reward:.2f}")
            if line == 0:
                axis.set_title(
                    prompt.replace(" and ", "\nand ").replace(" a ", "\na ", prompt.count(" of ")), fontsize=8
                )
        axes[line, 0].set_ylabel(name)
    figure.tight_layout()
    Path(args.output).mkdir(exist_ok=True)
    figure.savefig(Path(args.output) / "before_after.png", dpi=100)
    shutil.copy(Path(args.run) / "reward.png", Path(args.output) / "reward.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
