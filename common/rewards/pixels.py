"""Prepare images for the learned rewards: 8-bit levels, resized as in the official code.

Images are [b, 3, H, W] float on any device. The official scorers read picture files. So every image
is first rounded to 8 bits a channel, as in a file. Values are levels 0 to 255 until `normalised`.

Most official code resizes with PIL, which computes in whole numbers and rounds after the rows and
again after the columns. `resize_as_pil` does the same with two matrix products, batched, on any
device, and gives equal pixels (tests/test_rewards_clip.py). torchvision's resize of a tensor rounds
once, and its pixels differ by up to 24 levels.
"""

import functools
from collections.abc import Callable, Sequence

import PIL
import torch
import torch.nn.functional as F

OPENAI = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # CLIP's mean and std of RGB
ONE = 2.0**22  # PIL's fixed-point one
HEIGHT_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13  # Python 3.10 has no Pillow 13
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def levels(images: torch.Tensor) -> torch.Tensor:
    """Return whole numbers 0 to 255, float32, of [..., H, W] in [0, 1]."""
    return (images.float().clamp(0, 1) * 255).round()


def normalised(
    images: torch.Tensor, mean_std: tuple[Sequence[float], Sequence[float]] = OPENAI
) -> torch.Tensor:
    """Return (images / 255 - mean) / std of levels [..., 3, H, W]."""
    mean, std = (images.new_tensor(value)[:, None, None] for value in mean_std)
    return (images / 255 - mean) / std


def resize_as_pil(
    images: torch.Tensor, height: int, width: int, mode: str = "bicubic"
) -> torch.Tensor:
    """Resize levels [b, 3, H, W] to [b, 3, height, width], as the installed Pillow does.

    The width is resized first. Since Pillow 13 the height is first if it shrinks while the width
    grows. mode: "bicubic" or "bilinear".
    """
    before = images.shape[-2:]
    height_first = HEIGHT_MAY_BE_FIRST and height < before[0] and width > before[1]
    for side in (0, 1) if height_first else (1, 0):
        if before[side] != (height, width)[side]:
            weights = pil_weights(before[side], (height, width)[side], mode).to(images.device)
            sums = images.double() @ weights.T if side else weights @ images.double()
            images = ((sums + ONE / 2) / ONE).floor().clamp(0, 255)
    return images.float()


@functools.lru_cache(maxsize=16)
def pil_weights(before: int, after: int, mode: str) -> torch.Tensor:
    """Return PIL's weights of `before` pixels in each of `after`: [after, before], units of 1/ONE.

    The filter grows with the factor when an image gets smaller (antialiasing). Pillow,
    src/libImaging/Resample.c."""
    support, kernel = {"bicubic": (2.0, _cubic), "bilinear": (1.0, _triangle)}[mode]
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (torch.arange(after, dtype=torch.float64) + 0.5)[:, None] * scale
    place = torch.arange(before, dtype=torch.float64)
    first = (centre - support * stretch + 0.5).trunc().clamp(min=0)
    last = (centre + support * stretch + 0.5).trunc().clamp(max=before)
    weights = kernel(((place - centre + 0.5) / stretch).abs()) * ((place >= first) & (place < last))
    weights = weights / weights.sum(1, keepdim=True) * ONE
    return (weights + 0.5 * weights.sign()).trunc()


def _cubic(x: torch.Tensor, a: float = -0.5) -> torch.Tensor:
    """Return Keys' cubic convolution at distances x >= 0."""
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x).clamp(min=0)


def shortest_side(
    images: torch.Tensor, size: int, mode: str = "bicubic", crop: Callable[[float], int] = round
) -> torch.Tensor:
    """Resize the shortest side to `size` and crop the centre: [b, 3, size, size].

    If the crop starts between two pixels, torchvision rounds half to even (crop=round), and
    transformers rounds down (crop=int).
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = (
        size if side == short else int(size * side / short) for side in (height, width)
    )
    images = resize_as_pil(images, height, width, mode)
    top, left = crop((height - size) / 2), crop((width - size) / 2)
    return images[..., top : top + size, left : left + size]


def squashed(images: torch.Tensor, size: int, mode: str = "bicubic") -> torch.Tensor:
    """Resize levels [b, 3, H, W] to [b, 3, size, size] without keeping proportions."""
    return resize_as_pil(images, size, size, mode)


def longest_side(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the longest side to `size` and pad evenly with black: [b, 3, size, size].

    This is HPSv2's transform. It resizes the tensor in one pass without rounding, so values may be
    slightly outside [0, 255].
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = round(height * scale), round(width * scale)
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))
