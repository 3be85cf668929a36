"""Compressibility (DDPO, arXiv 2305.13301, section 4.1): a reward that needs no weights and fits any image model."""

import io

import torch
from torchvision.transforms.functional import to_pil_image


class JpegSize:
    """Minus the bytes per pixel of the image as a JPEG of quality 95: 0 is nothing at all, -3 is no compression.

    DDPO's reward is minus the whole size in kilobytes; per pixel, one scale fits 32x32 and 1024x1024. A video scores
    the mean of its frames. `--reward jpeg=-1` rewards incompressibility.
    """

    video = True  # and images
    scale = 0.05
    range = (None, 0.0)

    def score(self, media, prompts):
        """media [b, C, H, W] or [b, F, C, H, W] in [0, 1] -> [b] float32"""
        assert len(media) == len(prompts)
        clips = (media if media.ndim == 5 else media[:, None]).float().clamp(0, 1).cpu()
        pixels = media.shape[-1] * media.shape[-2]
        sizes = [[self._bytes(frame) for frame in clip] for clip in clips]
        return -torch.tensor(sizes, dtype=torch.float32).mean(1).to(media.device) / pixels

    def _bytes(self, frame):
        file = io.BytesIO()
        to_pil_image(frame).save(file, format="JPEG", quality=95)
        return file.tell()
