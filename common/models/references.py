"""Reference tokens of editing models: the latents of a prompt's images follow the noisy tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from common.models.family import Family
from common.prompts import images_of
from common.prompts.pictures import cropped, read_image

if TYPE_CHECKING:
    from PIL import Image


def pictures(model: Family, prompt: str) -> list["Image.Image"]:
    """Return the middle of each image of a prompt, in the ratio of the samples."""
    images = map(read_image, images_of(prompt))
    return [cropped(image, model.height, model.width) for image in images]


def for_vae(
    model: Family, pictures: list["Image.Image"], height: int, width: int
) -> list[torch.Tensor]:
    """Return pictures at a size, each [1, 3, height, width] in [-1, 1]."""
    prepare = model.pipe.image_processor.preprocess
    pixels = [prepare(picture, height, width) for picture in pictures]
    return [image.to(model.device, model.pipe.vae.dtype) for image in pixels]


def tokens(model: Family, pixels: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Return the packed latents [R, C] of images, by the pipeline's own code.

    pixels: as the pipeline's prepare_latents takes them.
    """
    _, references, *_ = model.pipe.prepare_latents(
        pixels,
        1,
        model.noise_shape[1] // 4,
        model.height,
        model.width,
        model.pipe.vae.dtype,
        model.device,
        None,
        latents=torch.zeros(1, *model.noise_shape),
    )
    return references[0].float()


def velocity_before(
    velocity: Callable,
    x: torch.Tensor,
    sigma: float | torch.Tensor,
    cond: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Return the velocity [b, L, C] of noisy tokens x [b, L, C] that references follow.

    velocity(tokens, sigma, cond) computes that of all tokens; cond has "references" [b, R, C].
    """
    cond = dict(cond)
    both = torch.cat([x, cond.pop("references").to(x)], 1)
    return velocity(both, sigma, cond)[:, : x.shape[1]]
