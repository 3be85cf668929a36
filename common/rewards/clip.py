"""CLIP scores and HPSv2, rewards from open_clip models.

    clip       openai/CLIP ViT-L/14 (arXiv 2103.00020)            MIT
    clip-h     DFN5B ViT-H/14 at 378 pixels (arXiv 2309.17425)    Apple's licence, for research
    hpsv2      Human Preference Score v2 (arXiv 2306.09341)       Apache-2.0
    hpsv2.1    the same model, trained on more data               Apache-2.0

Each score is the cosine of image and prompt, without the logit scale. The scales are estimates
from published scores.
"""

import json
from functools import partial
from pathlib import Path

import open_clip
import torch

from common.rewards import pixels, weights
from common.rewards.cosine import Cosine

RESIZES = {
    "shortest": pixels.shortest_side,
    "longest": pixels.longest_side,
    "squash": pixels.squashed,
}


class OpenClip(Cosine):
    """Score with a named open_clip model, whose weights come from the hub or --reward-path.

    The path is a file, or a folder in open_clip's layout (open_clip_config.json and
    open_clip_model.safetensors) with a model of any size.
    """

    resize = "shortest"

    def build(self, source: weights.Source) -> torch.nn.Module:
        """Load the weights and return the module with them."""
        path, config, about, tokens = self._described(source)
        resize = RESIZES[about["resize_mode"]]
        kwargs = {"size": config["vision_cfg"]["image_size"]}
        if resize is not pixels.longest_side:  # which is always bicubic
            kwargs["mode"] = about["interpolation"]
        self.resized = partial(resize, **kwargs)
        self.mean_std = about["mean"], about["std"]
        self.tokens = open_clip.get_tokenizer(tokens)
        module = open_clip.CLIP(**config)
        return weights.fill(source.name, module, weights.read(source.name, path), path)

    def _described(self, source: weights.Source) -> tuple[Path, dict, dict, str]:
        """Return the weights' path, the settings of module and pictures, and the tokenizer."""
        about = {
            "mean": pixels.OPENAI[0],
            "std": pixels.OPENAI[1],
            "resize_mode": self.resize,
            "interpolation": "bicubic",
        }
        local = source.given and source.given / "open_clip_config.json"
        if local and local.is_file():
            path = source.find(self.repo, "open_clip_model.safetensors")
            config = json.loads(local.read_text(encoding="utf-8"))
            about |= config.get("preprocess_cfg", {})
            return path, config["model_cfg"], about, f"local-dir:{source.given}"
        path = source.find(self.repo, self.file)
        return path, open_clip.get_model_config(self.architecture), about, self.architecture

    def media(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings [b, D] of images [b, 3, H, W] in [0, 1]."""
        images = self.resized(pixels.levels(images))
        return self.module.encode_image(pixels.normalised(images, self.mean_std))

    def texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """Return embeddings [n, D] of n prompts."""
        return self.module.encode_text(self.tokens(prompts).to(device))


class Clip(OpenClip):
    """Score with OpenAI's CLIP ViT-L/14. Scores are typically 0.2 to 0.35.

    The shortest side is resized to 224 pixels, bicubic, and the centre is cropped. Tests compare
    it with open_clip's transform and model (tests/test_rewards_clip.py).
    """

    architecture = "ViT-L-14-quickgelu"
    repo, file = "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"
    scale = 0.02


class ClipH(OpenClip):
    """Score with DFN5B's CLIP ViT-H/14. Scores are typically 0.2 to 0.45.

    Images are squashed to a square of 378 pixels. The hub names the model -378; the name -384 of
    many papers redirects to it. Tests compare it in the same way as `clip`.
    """

    architecture, resize = "ViT-H-14-378-quickgelu", "squash"
    repo, file = "apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_pytorch_model.bin"
    scale = 0.03


class HPSv2(OpenClip):
    """Score with Human Preference Score v2. Scores are typically 0.2 to 0.35.

    The longest side is resized to 224 pixels, and black fills the rest. Tests compare it with the
    official `hpsv2` scorer (tests/test_rewards_clip.py).
    """

    architecture, resize = "ViT-H-14", "longest"
    repo, file = "xswu/HPSv2", "HPS_v2_compressed.pt"
    scale = 0.01


class HPSv21(HPSv2):
    """Score with Human Preference Score v2.1."""

    file = "HPS_v2.1_compressed.pt"
