"""What tests of editing models share: source images, and the areas at which Qwen-Image-Edit sees
them, which are small here: the real ones take minutes."""

import numpy as np
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as official
from PIL import Image

from common.models.qwen_edit import QwenImageEdit

AREA = 64**2
official.CONDITION_IMAGE_SIZE = QwenImageEdit.seen_area = AREA
official.VAE_IMAGE_SIZE = QwenImageEdit.reference_area = AREA


def save(path, width, height, seed=0, **settings):
    """Save a picture of coloured squares."""
    pixels = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    large = np.kron(pixels, np.ones((8, 8, 1), dtype=int))[:height, :width]
    Image.fromarray(large.astype(np.uint8)).save(path, **settings)
    return path
