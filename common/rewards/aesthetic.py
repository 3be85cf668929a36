"""LAION's aesthetic predictor v2 (github.com/christophschuhmann/improved-aesthetic-predictor), the
weights `sac+logos+ava1-l14-linearMSE`: what people would rate an image from 1 to 10, whatever the
prompt."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.rewards import weights
from common.rewards.clip import Clip


def linear_head(width: int) -> torch.nn.Sequential:
    """The head of this predictor and of ImageReward: [b, width] -> [b, 1], five linear layers and
    nothing between them.

    The layers are numbered as in the checkpoints, `layers.0` to `layers.7`, where dropout stood
    between some."""
    widths = (width, 1024, 128, 64, 16, 1)
    layers = [torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
    return torch.nn.Sequential(OrderedDict(zip("02467", layers)))


def head_weights(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Of a checkpoint the weights of the head, under the names of `linear_head`."""
    prefix += "layers."
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


class Aesthetic:
    """Reward: the predicted rating, typically 4 to 7; no bounds. Apache-2.0.

    Five linear layers on the normalised embedding of `clip` (OpenAI's ViT-L/14, whose weights are
    found as those of `clip`, `--reward-path clip=...` included). The head:
    `trl-lib/ddpo-aesthetic-predictor`, a copy of the original file. Checked against the official
    formula (tests/test_rewards_clip.py). Scale: an estimate."""

    repo, file = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
    video = False
    scale = 0.25
    range = (None, None)

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Fetches the weights; raises InputError if they are missing or do not fit."""
        self.clip = Clip()
        self.clip.load(source.of("clip"), batch)
        path = source.find(self.repo, self.file)
        head = linear_head(self.clip.module.visual.output_dim)
        self.head = weights.fill(
            source.name, head, head_weights(weights.read(source.name, path)), path
        )

    @torch.no_grad()
    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """media [b, 3, H, W] in [0, 1], prompts b strings (not read) -> [b] float32."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        self.clip.module = weights.placed(self.clip.module, media.device)
        self.head = self.head.to(
            media.device
        )  # stays in float32: it is small, and its numbers are added up
        with weights.autocast(media.device):
            embedded = torch.cat(
                [self.clip.media(part).float() for part in media.split(self.clip.batch)]
            )
        return self.head(F.normalize(embedded, dim=-1))[:, 0]
