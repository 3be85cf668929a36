"""LAION's aesthetic predictor v2: the rating of 1 to 10 that people would give an image.

It ignores the prompt. Code: github.com/christophschuhmann/improved-aesthetic-predictor, weights:
`sac+logos+ava1-l14-linearMSE`.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.rewards import weights
from common.rewards.clip import Clip


def linear_head(width: int) -> torch.nn.Sequential:
    """Return the head of this predictor and of ImageReward: five linear layers.

    It maps [b, width] to [b, 1]. The layers are numbered as in the checkpoints, which have dropout
    layers between some of them.
    """
    widths = (width, 1024, 128, 64, 16, 1)
    layers = [torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
    return torch.nn.Sequential(OrderedDict(zip("02467", layers)))


def head_weights(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights of the head, under the names of `linear_head`."""
    prefix += "layers."
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


class Aesthetic:
    """Score images by the predicted rating, typically 4 to 7 and without bounds. Apache-2.0.

    The model is five linear layers on the normalised embedding of `clip` (OpenAI's ViT-L/14, with
    the weights of the reward `clip`, also those of `--reward-path clip=...`). The head comes from
    `trl-lib/ddpo-aesthetic-predictor`, a copy of the original file. Tests compare it with the
    official formula (tests/test_rewards_clip.py). The scale is an estimate.
    """

    repo, file = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
    video = False
    scale = 0.25
    range = (None, None)

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Load the weights. Raises InputError if they are missing or do not fit."""
        self.clip = Clip()
        self.clip.load(source.of("clip"), batch)
        path = source.find(self.repo, self.file)
        head = linear_head(self.clip.module.visual.output_dim)
        self.head = weights.fill(
            source.name, head, head_weights(weights.read(source.name, path)), path
        )

    @torch.no_grad()
    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, H, W] in [0, 1]. Prompts are ignored."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        self.clip.module = weights.placed(self.clip.module, media.device)
        self.head = self.head.to(media.device)  # in float32, because it is small
        with weights.autocast(media.device):
            embedded = torch.cat(
                [self.clip.media(part).float() for part in media.split(self.clip.batch)]
            )
        return self.head(F.normalize(embedded, dim=-1))[:, 0]
