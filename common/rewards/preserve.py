"""How much an edited image resembles its source: the cosine of CLIP's image embeddings."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.rewards import weights
from common.rewards.clip import Clip


class Preserve:
    """Score edited images by the cosine of their embedding with that of their source, at most 1.

    The model is that of `clip` (OpenAI's ViT-L/14, with the weights of the reward `clip`, also
    those of `--reward-path clip=...`). A copy of the source scores 1, so add a reward for the
    instruction, or watch it. With several images it is the most similar one. The scale is an
    estimate. Tests compare it with open_clip's model (tests/test_editing.py).
    """

    video = False
    scale = 0.05
    range = (-1.0, 1.0)
    fields = ("source",)

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Load the weights. Raises InputError if they are missing or do not fit."""
        self.clip = Clip()
        self.clip.load(source.of("clip"), batch)

    @torch.no_grad()
    def score(
        self, media: torch.Tensor, prompts: Sequence[str], source: torch.Tensor
    ) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, H, W] and source [b, N, 3, H, W].

        Both are in [0, 1]. Prompts are ignored.
        """
        assert len(media) == len(source) == len(prompts)
        self.clip.module = weights.placed(self.clip.module, media.device)
        with weights.autocast(media.device):
            edited = self._embedded(media)
            before = self._embedded(source.flatten(0, 1)).view(*source.shape[:2], -1)
        return (edited[:, None] * before).sum(-1).amax(1)

    def _embedded(self, images: torch.Tensor) -> torch.Tensor:
        parts = [self.clip.media(part).float() for part in images.split(self.clip.batch)]
        return F.normalize(torch.cat(parts), dim=-1)
