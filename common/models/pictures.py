"""Conditioning images of image-to-video models: whether all prompts have one, and reading them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from common.errors import InputError, text
from common.prompts import image_of

if TYPE_CHECKING:  # which imports this file
    from common.models.family import Family

READ = 500  # images that are read to their end before a run


def check(family: "type[Family]", prompts: Sequence[str]) -> None:
    """Raises InputError for the first prompt that lacks the image which a class of models wants, or
    has one that it does not take, and for an image that cannot be read."""
    for prompt in prompts:
        image = image_of(prompt)
        if family.images and not image:
            raise InputError(
                f"prompts: {prompt[:60]!r} has no image; write lines IMAGE <tab> CAPTION for "
                "this model"
            )
        if image and not family.images:
            raise InputError(
                f"prompts: {prompt[:60]!r} has an image, which this model does not take"
            )
    images = [image for image in dict.fromkeys(map(image_of, prompts)) if image]
    for i, image in enumerate(images):
        if not Path(image).is_file():
            raise InputError(
                f"prompts: there is no image {image}; paths count from the prompt file's folder"
            )
        if i < READ:
            read_image(image, small=True)


def read_image(path: str, small: bool = False) -> Image.Image:
    """The image as PIL's, in RGB; small: a JPEG is read whole but decoded small. Raises
    InputError."""
    try:
        with Image.open(path) as picture:
            if small:
                picture.draft("RGB", (64, 64))
            return picture.convert("RGB")
    except Exception as error:  # whatever a broken file makes PIL say; a huge one, too
        raise InputError(f"prompts: {path} is no picture that can be read: {text(error)}") from None
