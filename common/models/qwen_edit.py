"""Qwen-Image-Edit 2509 and 2511 (diffusers' QwenImageEditPlusPipeline): one image or several are
edited, seen by the language model and as reference tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)
from PIL.Image import Image

from common.models import references
from common.models.assumed import Values
from common.models.family import CUDNN_NAN, UNWANTED
from common.models.qwen import QwenImage
from common.prompts import caption_of


class QwenImageEdit(QwenImage):
    """Run Qwen-Image-Edit: latents [b, L, C] as those of Qwen-Image.

    The images of a prompt are cropped to the ratio of the samples. The language model sees each at
    an area of 384x384 pixels. The VAE sees it at 1024x1024, which makes R reference tokens.
    """

    pipeline = QwenImageEditPlusPipeline
    images = 3  # as the models were trained
    longest = 1024  # tokens of a prompt with its images, the pipeline's default
    seen_area = CONDITION_IMAGE_SIZE  # pixels of an image as the language model sees it
    reference_area = VAE_IMAGE_SIZE  # pixels of an image as the VAE sees it

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder. The 2511 model has references without noise."""
        values = super().assumed(configs)
        values["transformer"]["zero_cond_t"] = (None, False, True)
        return values

    def __init__(
        self, pipe: QwenImageEditPlusPipeline, height: int = 0, width: int = 0, **settings
    ) -> None:
        super().__init__(pipe, height, width, **settings)
        ratio = self.width / self.height
        unit = 2 * pipe.vae_scale_factor
        self.seen_size = calculate_dimensions(self.seen_area, ratio)  # width, height
        self.reference_size = calculate_dimensions(self.reference_area, ratio)  # width, height
        self.reference_grid = self.reference_size[1] // unit, self.reference_size[0] // unit

    def cudnn_serves(self) -> bool:
        """Return whether cuDNN's backward pass is finite for these numbers of tokens and a mask."""
        every, wrong = CUDNN_NAN
        rows, columns = self.reference_grid
        tokens = self.noise_shape[0] + self.longest
        images = range(1, self.images + 1)
        return all((tokens + number * rows * columns) % every != wrong for number in images)

    def embed(self, prompt: str) -> dict[str, torch.Tensor]:
        """Return what QwenImage.text does, for the prompt and for none, and "references" [R, C]."""
        pictures = references.pictures(self, prompt)
        width, height = self.reference_size
        pixels = references.for_vae(self, pictures, height, width)
        # the VAE is a video's: the image is its only frame
        tokens = references.tokens(self, [image[:, :, None] for image in pixels])
        unwanted = self.seen("", pictures)
        return {
            **self.seen(caption_of(prompt), pictures),
            **{UNWANTED + name: value for name, value in unwanted.items()},
            "references": tokens,
        }

    def seen(self, caption: str, pictures: list[Image]) -> dict[str, torch.Tensor]:
        """Return what QwenImage.text does, for a caption that is read with pictures."""
        width, height = self.seen_size
        small = [self.pipe.image_processor.resize(image, height, width) for image in pictures]
        text, _ = self.pipe.encode_prompt(caption or " ", small, self.device)
        return self.padded(text[0])

    def embed_nothing(self) -> dict[str, torch.Tensor]:
        """Return {}: the language model sees the images of a prompt also without its caption."""
        return {}

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt and its images, {name: [...]}."""
        text = super().blank()
        rows, columns = self.reference_grid
        tokens = self.sources * rows * columns
        return {
            **text,
            **{UNWANTED + name: value for name, value in text.items()},
            "references": torch.zeros(tokens, self.noise_shape[1]),
        }

    def shapes(self, tokens: int) -> list[list[tuple[int, int, int]]]:
        """Return frames, height and width in tokens of each image in a row of tokens."""
        rows, columns = self.reference_grid
        number = (tokens - self.noise_shape[0]) // (rows * columns)
        return [[(1, *self.grid)] + [(1, rows, columns)] * number]

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, L, C] float32 at x [b, L, C] and sigma, a scalar or [b]."""
        return references.velocity_before(super().velocity, x, sigma, cond)
