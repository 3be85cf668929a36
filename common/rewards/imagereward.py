"""ImageReward (arXiv 2304.05977): BLIP tuned on people's rankings of images for a prompt.

BLIP's text encoder attends to the image.
"""

import re
from collections.abc import Sequence

import torch
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from common.rewards import pixels, weights
from common.rewards.aesthetic import head_weights, linear_head

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the training data
LENGTH = 35  # tokens of a prompt
# BLIP's ViT-L/16 and text encoder at 224 pixels, with BLIP's own epsilon in the norms
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {"num_attention_heads": 12, "encoder_hidden_size": 1024}  # as in med_config.json

# transformers' names for the layers of BLIP's image encoder; those of the text encoder are the same
RENAMED = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
]


class Blip(torch.nn.Module):
    """Combine BLIP's image encoder and its text encoder, which attends to the image.

    vision, text: settings that replace those of ImageReward.
    """

    def __init__(self, vision: dict | None = None, text: dict | None = None) -> None:
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**{**VISION, **(vision or {})}))
        told = BlipTextConfig(
            is_decoder=True, **{**TEXT, **(text or {})}
        )  # a decoder has the layers that look across
        self.text = BlipTextModel(told, add_pooling_layer=False)

    def forward(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return [b, D] of images [b, 3, H, W] and the tokens and mask [b, S] of their prompts."""
        seen = self.vision(images).last_hidden_state
        return self.text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[
            :, 0
        ]


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of ImageReward.pt under the names of Blip, without the retrieval heads."""
    named = {}
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            key = key.removeprefix("blip.visual_encoder.")
            for pattern, name in RENAMED:
                key = re.sub(pattern, name, key)
            named[f"vision.{key}"] = value
        elif key.startswith("blip.text_encoder."):
            named[f"text.{key.removeprefix('blip.text_encoder.')}"] = value
    return named


class ImageReward:
    """Score how much people would prefer the image for the prompt.

    Scores are standardised: typically -2 to 2, without bounds. Weights: `THUDM/ImageReward`
    (ImageReward.pt), Apache-2.0; vocabulary: `google-bert/bert-base-uncased`. The shortest side is
    resized to 224 pixels, bicubic, and the centre is cropped. Prompts are cut at 35 tokens. Tests
    compare it with a float32 transcription of the official model
    (tests/test_rewards_imagereward.py). The scale is an estimate.
    """

    repo, file = "THUDM/ImageReward", "ImageReward.pt"
    vision, text = {}, {}  # settings of another size, over those above
    video = False
    scale = 0.5
    range = (None, None)

    def load(self, source: weights.Source, batch: int = 16) -> None:
        """Load the weights. Raises InputError if they are missing or do not fit."""
        path = source.find(self.repo, self.file)
        vocabulary = source.find("google-bert/bert-base-uncased", "vocab.txt", beside=True)
        self.tokenizer, self.batch = BertTokenizer(str(vocabulary)), batch
        state, module = weights.read(source.name, path), Blip(self.vision, self.text)
        self.size, head = (
            module.vision.config.image_size,
            linear_head(module.text.config.hidden_size),
        )
        self.module = weights.fill(source.name, module, renamed(state), path)
        self.head = weights.fill(source.name, head, head_weights(state, "mlp."), path)

    @torch.no_grad()
    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, H, W] in [0, 1] with b prompts."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        self.module = weights.placed(self.module, media.device)
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        ).to(media.device)
        with weights.autocast(media.device):
            parts = zip(
                media.split(self.batch),
                *(words[k].split(self.batch) for k in ("input_ids", "attention_mask")),
            )
            read = torch.cat(
                [self.module(self.pixels(images), ids, mask).float() for images, ids, mask in parts]
            )
        self.head = self.head.to(media.device)  # stays in float32, as that of `aesthetic`
        return (self.head(read)[:, 0] - MEAN) / STD

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Return the model's input [b, 3, size, size] for images [b, 3, H, W] in [0, 1]."""
        return pixels.normalised(pixels.shortest_side(pixels.levels(images), self.size))
