"""PickScore (arXiv 2305.01569): CLIP ViT-H/14 tuned on half a million choices that people made
between two images."""

import json

import open_clip
import torch
from transformers import CLIPConfig, CLIPModel

from common.errors import InputError
from common.rewards import pixels, weights
from common.rewards.cosine import Cosine


class PickScore(Cosine):
    """Reward: exp(logit_scale) * cosine, typically 19 to 24. (Flow-GRPO divides by 26: `--reward
    pickscore=0.0385`.)

    `yuvalkirstain/PickScore_v1`, a transformers CLIPModel; MIT. Its prompts are those of CLIP's own
    byte-pair vocabulary, which open_clip ships; its images take the shortest side to 224, bicubic,
    and the middle. Checked against the model card's formula with transformers' processor
    (tests/test_rewards_pickscore.py). Scale: an estimate."""

    repo, file = "yuvalkirstain/PickScore_v1", "model.safetensors"
    scale = 0.6
    range = (-100.0, 100.0)

    def build(self, source: weights.Source) -> torch.nn.Module:
        """Fetches the weights and returns the module with them. Raises InputError."""
        path = source.find(self.repo, self.file)
        about = source.find(self.repo, "config.json", beside=True)
        try:
            config = CLIPConfig(**json.loads(about.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"reward {source.name}: {about} is no CLIP configuration ({error!r})"
            ) from None
        module = weights.fill(source.name, CLIPModel(config), weights.read(source.name, path), path)
        self.factor = module.logit_scale.exp().item()  # before it loses digits to half precision
        self.tokens = open_clip.get_tokenizer("ViT-H-14")
        self.size = config.vision_config.image_size
        return module

    def media(self, images: torch.Tensor) -> torch.Tensor:
        """Images [b, 3, H, W] in [0, 1] -> embeddings [b, D]."""
        # the processor's crop rounds down
        images = pixels.shortest_side(pixels.levels(images), self.size, crop=int)
        return self.module.get_image_features(pixel_values=pixels.normalised(images)).pooler_output

    def texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """n prompts -> embeddings [n, D]."""
        return self.module.get_text_features(
            input_ids=self.tokens(prompts).to(device)
        ).pooler_output
