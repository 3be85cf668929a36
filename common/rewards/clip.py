"""CLIP scores and HPSv2: rewards that are open_clip models.

    clip       openai/CLIP ViT-L/14 (arXiv 2103.00020)            MIT
    clip-h     DFN5B ViT-H/14 at 378 pixels (arXiv 2309.17425)    Apple's own licence, for research: read it first
    hpsv2      Human Preference Score v2 (arXiv 2306.09341)       Apache-2.0
    hpsv2.1    the same model on more data                        Apache-2.0

All four are the cosine of image and prompt, without the logit scale. The scales are estimates from
published scores."""

import json
from functools import partial

import open_clip
import torch

from common.errors import InputError
from common.rewards import pixels, weights
from common.rewards.cosine import Cosine

RESIZES = {
    "shortest": pixels.shortest_side,
    "longest": pixels.longest_side,
    "squash": pixels.squashed,
}


class OpenClip(Cosine):
    """A named open_clip model with weights from the hub; or, by --reward-path, those of a file, or
    a folder with open_clip_config.json (open_clip's own layout) and open_clip_model.safetensors:
    any model, of any size."""

    resize = "shortest"

    def build(self, source: weights.Source) -> torch.nn.Module:
        """Fetches the weights and returns the module with them. Raises InputError."""
        config, tokens, file = (
            open_clip.get_model_config(self.architecture),
            self.architecture,
            self.file,
        )
        about = dict(
            mean=pixels.OPENAI[0],
            std=pixels.OPENAI[1],
            resize_mode=self.resize,
            interpolation="bicubic",
        )
        local = source.given and source.given / "open_clip_config.json"
        if local and local.is_file():
            tokens, file = f"local-dir:{source.given}", "open_clip_model.safetensors"
        path = source.find(self.repo, file)  # before the model is built, which takes a while
        try:
            if local and local.is_file():
                config = json.loads(local.read_text())
                config, about = config["model_cfg"], {**about, **config.get("preprocess_cfg", {})}
            self.mean_std, resize = (about["mean"], about["std"]), RESIZES[about["resize_mode"]]
            kwargs = (
                {"mode": about["interpolation"]} if resize is not pixels.longest_side else {}
            )  # always bicubic
            self.resized = partial(resize, size=config["vision_cfg"]["image_size"], **kwargs)
            self.tokens, module = open_clip.get_tokenizer(tokens), open_clip.CLIP(**config)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                f"reward {source.name}: {local} describes no plain open_clip CLIP ({error!r})"
            ) from None
        return weights.fill(source.name, module, weights.read(source.name, path), path)

    def media(self, images: torch.Tensor) -> torch.Tensor:
        """Images [b, 3, H, W] in [0, 1] -> embeddings [b, D]."""
        images = self.resized(pixels.levels(images))
        return self.module.encode_image(pixels.normalised(images, self.mean_std))

    def texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """n prompts -> embeddings [n, D]."""
        return self.module.encode_text(self.tokens(prompts).to(device))


class Clip(OpenClip):
    """Reward: CLIP score of OpenAI's ViT-L/14, 224 pixels: shortest side, bicubic, middle.
    Typically 0.2 to 0.35.

    Checked against open_clip's own transform and model (tests/test_rewards_clip.py).
    """

    architecture = "ViT-L-14-quickgelu"
    repo, file = "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"
    scale = 0.02


class ClipH(OpenClip):
    """Reward: CLIP score of DFN5B ViT-H/14, 378 pixels, squashed to a square. Typically 0.2 to
    0.45.

    The hub calls it -378 today; -384, as many papers write, leads there. Checked as `clip` is.
    """

    architecture, resize = "ViT-H-14-378-quickgelu", "squash"
    repo, file = "apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_pytorch_model.bin"
    scale = 0.03


class HPSv2(OpenClip):
    """Reward: Human Preference Score v2, 224 pixels: longest side, padded with black. Typically 0.2
    to 0.35.

    Checked against the official `hpsv2` scorer (tests/test_rewards_clip.py).
    """

    architecture, resize = "ViT-H-14", "longest"
    repo, file = "xswu/HPSv2", "HPS_v2_compressed.pt"
    scale = 0.01


class HPSv21(HPSv2):
    """Reward: Human Preference Score v2.1."""

    file = "HPS_v2.1_compressed.pt"
