"""Check and read the conditioning images of image-to-video models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import errors
from common.errors import InputError
from common.prompts import image_of

if TYPE_CHECKING:  # importing the families loads torch alone
    from PIL import Image

READ = 500  # images that are decoded before a run; all of tens of thousands would take minutes


def check(prompts: Sequence[str], wanted: bool) -> None:
    """Raise InputError for the first prompt that lacks an image, or has one when none is wanted.

    Every image must exist, and the first 500 must be readable to their end. Warn if some of these
    have transparent pixels, because the model sees colours that viewers hide.
    """
    for prompt in prompts:
        image = image_of(prompt)
        if wanted and not image:
            raise InputError(
                f"prompts: {prompt[:60]!r} has no image. Write lines IMAGE <tab> CAPTION for this "
                "model."
            )
        if image and not wanted:
            raise InputError(
                f"prompts: {prompt[:60]!r} has an image, which this model does not take. Write one "
                "caption a line, or choose an image-to-video --model."
            )
    images = [image for image in dict.fromkeys(map(image_of, prompts)) if image]
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
