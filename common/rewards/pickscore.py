"""PickScore (arXiv 2305.01569): CLIP ViT-H/14 tuned on people's choices between two images."""

import json

import open_clip
import torch
from transformers import CLIPConfig, CLIPModel

from common.rewards import pixels, weights
from common.rewards.cosine import Cosine


class PickScore(Cosine):
    """Score images by exp(logit_scale) * cosine, typically 19 to 24.

    Flow-GRPO divides it by 26: `--reward pickscore=0.0385`. The weights are
    `yuvalkirstain/PickScore_v1`, a CLIPModel of transformers; MIT. Prompts are tokenized with
    CLIP's byte-pair vocabulary, which open_clip ships. The shortest side is resized to 224 pixels,
    bicubic, and the centre is cropped. Tests compare it with the model card's formula and
    transformers' processor (tests/test_rewards_pickscore.py). The scale is an estimate.
    """

    repo, file = "yuvalkirstain/PickScore_v1", "model.safetensors"
    scale = 0.6
    range = (-100.0, 100.0)

    def build(self, source: weights.Source) -> torch.nn.Module:
        """Load the weights and return the module with them."""
        path = source.find(self.repo, self.file)
        about = source.find(self.repo, "config.json", beside=True)
        config = CLIPConfig(**json.loads(about.read_text(encoding="utf-8")))
        module = weights.fill(source.name, CLIPModel(config), weights.read(source.name, path), path)
        self.factor = module.logit_scale.exp().item()  # before it loses digits to half precision
        self.tokens = open_clip.get_tokenizer("ViT-H-14")
        self.size = config.vision_config.image_size
        return module

    def media(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings [b, D] of images [b, 3, H, W] in [0, 1]."""
        # the processor's crop rounds down
        images = pixels.shortest_side(pixels.levels(images), self.size, crop=int)
        return self.module.get_image_features(pixel_values=pixels.normalised(images)).pooler_output

    def texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """Return embeddings [n, D] of n prompts."""
        return self.module.get_text_features(
            input_ids=self.tokens(prompts).to(device)
        ).pooler_output
