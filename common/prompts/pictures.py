"""Check and read the pictures that prompts come with: first frames, and sources of edits."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import errors
from common.errors import InputError
from common.prompts import caption_of, images_of

if TYPE_CHECKING:  # importing the families loads torch alone
    from PIL import Image

READ = 500  # images that are decoded before a run; all of tens of thousands would take minutes


def check(prompts: Sequence[str], most: int) -> None:
    """Raise InputError for the first prompt without an image, or with more than `most`.

    most: 0 if the model takes none. All prompts must have the same number. Every image must exist,
    and the first 500 must be readable to their end. Warn if some of these have transparent pixels,
    because the model sees colours that viewers hide.
    """
    for prompt in prompts:
        number = len(images_of(prompt))
        if most and not number:
            raise InputError(
                f"prompts: {prompt[:60]!r} has no image. Write lines IMAGE <tab> CAPTION for this "
                "model, or lines of JSONL with the field image."
            )
        if number and not most:
            raise InputError(
                f"prompts: {prompt[:60]!r} has an image, which this model does not take. Write one "
                "caption a line, or choose a --model that takes images."
            )
        if number > most:
            raise InputError(
                f"prompts: {caption_of(prompt)[:60]!r} has {number} images, and this model takes "
                f"{most}. Leave out the others."
            )
        if number != len(images_of(prompts[0])):
            raise InputError(
                f"prompts: {caption_of(prompt)[:60]!r} has {number} images, and the first prompt "
                f"has {len(images_of(prompts[0]))}. Give all prompts of a run the same number."
            )
    images = list(dict.fromkeys(image for prompt in prompts for image in images_of(prompt)))
    transparent = []
    for number, image in enumerate(images):
        if not Path(image).is_file():
            raise InputError(
                f"prompts: there is no image {image}. Paths count from the prompt file's folder."
            )
        if number < READ:
            read_image(image, small=True)
            if is_transparent(image):
                transparent.append(image)
    if transparent:
        errors.warn(
            f"prompts: images with transparent pixels: {len(transparent)}, first {transparent[0]}. "
            "The model sees the hidden colours of these pixels, as in diffusers. Flatten the "
            "images onto a background."
        )


def is_transparent(path: str) -> bool:
    """Return whether any pixel of an image is not opaque."""
    from PIL import Image

    with Image.open(path) as picture:
        if not picture.has_transparency_data:
            return False
        return picture.convert("RGBA").getextrema()[3][0] < 255


def read_image(path: str, small: bool = False) -> "Image.Image":
    """Load an image in RGB, turned as its EXIF orientation says: diffusers.utils.load_image.

    small: read a JPEG to its end, but decode it at a small size, for a check. Raises InputError for
    a file that is not an image, is broken, or is too large for PIL, and for integers above 255 and
    floats, which PIL would make white or black.
    """
    from PIL import Image, ImageOps

    with errors.loading("image", path, do="replace it in the prompts"):
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"its mode {picture.mode} has more than 8 bits, save it with 8")
            if small:
                picture.draft("RGB", (64, 64))
            return ImageOps.exif_transpose(picture).convert("RGB")


def cropped(picture: "Image.Image", height: int, width: int) -> "Image.Image":
    """Return the largest part in the middle of a picture that has the ratio of height and width.

    A picture of that ratio is returned whole.
    """
    own_width, own_height = picture.size
    new_width = max(1, min(own_width, round(own_height * width / height)))
    new_height = max(1, min(own_height, round(own_width * height / width)))
    left, top = (own_width - new_width) // 2, (own_height - new_height) // 2
    return picture.crop((left, top, left + new_width, top + new_height))


def sources(prompts: Sequence[str], height: int, width: int) -> torch.Tensor:
    """Return the N images of b prompts at the size of the samples, [b, N, 3, H, W] in [0, 1].

    They are cropped as editing models see them. Raises InputError.
    """
    rows = [[_pixels(path, height, width) for path in images_of(prompt)] for prompt in prompts]
    return torch.stack([torch.stack(row) for row in rows]).float() / 255


@functools.lru_cache(maxsize=64)  # the samples of a group share their images
def _pixels(path: str, height: int, width: int) -> torch.Tensor:
    """Return an image at a size, [3, H, W] of 8 bits."""
    import numpy as np
    from PIL import Image

    picture = cropped(read_image(path), height, width)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)
