"""The base class of rewards that compare embeddings of media and prompt."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.rewards import weights

REMEMBERED = 20_000  # prompts whose embeddings are kept, 80 MB at 1024 numbers each


class Cosine:
    """Score each sample by `factor` times the cosine with its prompt.

    A subclass defines
        build(source)                     loads the weights (weights.Source) and returns the module
        media(images) -> [b, D]           embeddings of media, not normalised
        texts(prompts, device) -> [n, D]  embeddings of prompts, not normalised
    Each distinct prompt is embedded once. A forward pass takes `batch` media or prompts.
    """

    video = False
    range = (-1.0, 1.0)
    factor = 1.0

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Load the weights. Raises InputError if they are missing or do not fit."""
        self.batch, self.known = batch, {}
        self.module = self.build(source)

    @torch.no_grad()
    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, H, W] or [b, F, 3, H, W] in [0, 1]."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        self.module = weights.placed(self.module, media.device)
        with weights.autocast(media.device):
            embedded = torch.cat([self.media(part).float() for part in media.split(self.batch)])
            wanted = self.remembered(prompts, media.device)
        return self.factor * (F.normalize(embedded, dim=-1) * wanted).sum(-1)

    def remembered(self, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
        """Return normalised embeddings [b, D] float32 of b prompts; known ones are reused."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if len(self.known) + len(new) > REMEMBERED:
            self.known, new = {}, list(dict.fromkeys(prompts))
        for i in range(0, len(new), self.batch):
            part = new[i : i + self.batch]
            self.known.update(zip(part, F.normalize(self.texts(part, device).float(), dim=-1)))
        return torch.stack([self.known[prompt] for prompt in prompts])
