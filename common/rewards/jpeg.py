"""Compressibility (DDPO, arXiv 2305.13301, section 4.1), a reward for images without weights."""

import io
from collections.abc import Sequence

import torch
from torchvision.transforms.functional import to_pil_image


class JpegSize:
    """Score images by minus the bytes per pixel of a JPEG of quality 95.

    0 would be an empty file, -3 no compression. DDPO's reward is minus the whole size in
    kilobytes. Per pixel, one scale fits both 32x32 and 1024x1024. `--reward jpeg=-1` rewards
    incompressibility.
    """

    video = False
    scale = 0.05
    range = (None, 0.0)

    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, C, H, W] in [0, 1]. Prompts are ignored."""
        assert len(media) == len(prompts)
        pixels = media.shape[-1] * media.shape[-2]
        sizes = [self._bytes(image) for image in media.float().clamp(0, 1).cpu()]
        return -torch.tensor(sizes, dtype=torch.float32).to(media.device) / pixels

    def _bytes(self, frame: torch.Tensor) -> int:
        file = io.BytesIO()
        to_pil_image(frame).save(file, format="JPEG", quality=95)
        return file.tell()
