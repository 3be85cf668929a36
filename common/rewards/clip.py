"""CLIP scores and HPSv2: rewards that are open_clip models.

    clip       openai/CLIP ViT-L/14 (arXiv 2103.00020)            MIT
    clip-h     DFN5B ViT-H/14 at 378 pixels (arXiv 2309.17425)    Apple's own licence, for research: read it first
    hpsv2      Human Preference Score v2 (arXiv 2306.09341)       Apache-2.0
    hpsv2.1    the same model on more data                        Apache-2.0

All four are the cosine of image and prompt, without the logit scale. The scales are estimates from published scores.
"""

import json
from functools import partial

import open_clip

from common.errors import InputError
from common.rewards import pixels, weights
from common.rewards.cosine import Cosine

RESIZES = {"shortest": pixels.shortest_side, "longest": pixels.longest_side, "squash": pixels.squashed}


class OpenClip(Cosine):
    """A named open_clip model with weights from the hub; or, by --reward-path, those of a file, or a folder with
    open_clip_config.json (open_clip's own layout) and open_clip_model.safetensors: any model, of any size."""

    resize = "shortest"

    def build(self, source):
        config, tokens, file = open_clip.get_model_config(self.architecture), self.architecture, self.file
        self.mean_std, interpolation = pixels.OPENAI, "bicubic"
        if source.given and (source.given / "open_clip_config.json").is_file():
            config, about = read_config(source.given)
            tokens, file = f"local-dir:{source.given}", "open_clip_model.safetensors"
            self.mean_std = about.get("mean", pixels.OPENAI[0]), about.get("std", pixels.OPENAI[1])
            self.resize, interpolation = about.get("resize_mode", self.resize), about.get("interpolation", "bicubic")
        self.tokens = open_clip.get_tokenizer(tokens)
        size = config["vision_cfg"]["image_size"]
        # the longest side is always bicubic
        kwargs = {} if self.resize == "longest" else {"mode": interpolation}
        self.resized = partial(RESIZES[self.resize], size=size, **kwargs)
        path = source.find(self.repo, file)
        return weights.fill(source.name, open_clip.CLIP(**config), weights.read(source.name, path), path)

    def media(self, images):
        images = self.resized(pixels.levels(images))
        return self.module.encode_image(pixels.normalised(images, self.mean_std))

    def texts(self, prompts, device):
        return self.module.encode_text(self.tokens(prompts).to(device))


def read_config(folder):
    """A folder's open_clip_config.json -> the model's settings and the preprocessing's; raises InputError."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text())
        return config["model_cfg"], config.get("preprocess_cfg", {})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"reward: {folder}/open_clip_config.json is no open_clip configuration ({error!r})") from None


class Clip(OpenClip):
    """Reward: CLIP score of OpenAI's ViT-L/14, 224 pixels: shortest side, bicubic, middle. Typically 0.2 to 0.35.

    Checked against open_clip's own transform and model (tests/test_rewards_clip.py).
    """

    architecture = "ViT-L-14-quickgelu"
    repo, file = "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"
    scale = 0.02


class ClipH(OpenClip):
    """Reward: CLIP score of DFN5B ViT-H/14, 378 pixels, squashed to a square. Typically 0.2 to 0.45.

    The hub calls it -378 today; -384, as many papers write, leads there. Checked as `clip` is.
    """

    architecture, resize = "ViT-H-14-378-quickgelu", "squash"
    repo, file = "apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_pytorch_model.bin"
    scale = 0.03


class HPSv2(OpenClip):
    """Reward: Human Preference Score v2, 224 pixels: longest side, padded with black. Typically 0.2 to 0.35.

    Checked against the official `hpsv2` scorer (tests/test_rewards_clip.py).
    """

    architecture, resize = "ViT-H-14", "longest"
    repo, file = "xswu/HPSv2", "HPS_v2_compressed.pt"
    scale = 0.01


class HPSv21(HPSv2):
    """Reward: Human Preference Score v2.1."""

    file = "HPS_v2.1_compressed.pt"
