"""What the rewards share that compare an embedding of the media with one of the prompt."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.rewards import weights

REMEMBERED = 20_000  # prompts whose embeddings are kept, 80 MB at 1024 numbers each


class Cosine:
    """Reward: the cosine of media and prompt, the i-th with the i-th and no other, times `factor`.

    A subclass has
        build(source)                   fetches the weights (weights.Source) and returns the module
        media(images) -> [b, D]         embeddings of media as they come from the model
        texts(prompts, device) -> [n, D]
    Neither has to be normalised. Each distinct prompt is embedded once, `batch` of them or of the
    media at a time."""

    video = False
    range = (-1.0, 1.0)
    factor = 1.0

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Fetches the weights; raises InputError if they are missing or do not fit."""
        self.batch, self.known = batch, {}
        self.module = self.build(source)

    @torch.no_grad()
    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """media [b, 3, H, W] (video [b, F, 3, H, W]) in [0, 1], prompts b strings -> [b]
        float32."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        self.module = weights.placed(self.module, media.device)
        with weights.autocast(media.device):
            embedded = torch.cat([self.media(part).float() for part in media.split(self.batch)])
            wanted = self.remembered(prompts, media.device)
        return self.factor * (F.normalize(embedded, dim=-1) * wanted).sum(-1)

    def remembered(self, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
        """b prompts -> their normalised embeddings [b, D] float32; those seen before are looked
        up."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if len(self.known) + len(new) > REMEMBERED:
            self.known, new = {}, list(dict.fromkeys(prompts))
        for i in range(0, len(new), self.batch):
            part = new[i : i + self.batch]
            self.known.update(zip(part, F.normalize(self.texts(part, device).float(), dim=-1)))
        return torch.stack([self.known[prompt] for prompt in prompts])
