"""Qwen-Image (diffusers' QwenImagePipeline): a language model's embeddings with a mask, and
classifier-free guidance that keeps the norm."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from torch.nn.functional import pad, pixel_shuffle

from common.models import assumed
from common.models.assumed import Values
from common.models.family import CUDNN_NAN, Family, of_rows

LONGEST = 512  # tokens of a prompt, the pipeline's default
UNUSED = ("attn.to_add_out", "txt_mlp")  # layers of the last block whose output is not used


class QwenImage(Family):
    """Run Qwen-Image: latents [b, L, C], L = H/16 * W/16 tokens of C = 64 channels.

    16 is the VAE's factor 8 times the patch size 2.
    """

    pipeline = QwenImagePipeline
    encoders = ("text_encoder",)
    blocks = ("QwenImageTransformerBlock",)
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2))"
    )
    negative = True
    longest = LONGEST

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder. Layered models have more inputs."""
        channels = configs["vae"].get("z_dim", 0)
        return {
            "scheduler": assumed.flow(configs["scheduler"]),
            "transformer": {
                "in_channels": (4 * channels,),
                "out_channels": (None, channels),
                "patch_size": (2,),
                "num_layers": int,
                "guidance_embeds": (None, False),
                "zero_cond_t": (None, False),
                "use_additional_t_cond": (None, False),
                "use_layer3d_rope": (None, False),
            },
            "vae": {"z_dim": int, "latents_mean": list, "latents_std": list},
        }

    def __init__(
        self, pipe: DiffusionPipeline, height: int = 0, width: int = 0, **settings
    ) -> None:
        super().__init__(pipe, **settings)
        unit = 2 * pipe.vae_scale_factor  # height and width of a token in pixels
        own = pipe.default_sample_size * pipe.vae_scale_factor
        self.height, self.width = self._size(unit, height or own, width or own)
        self.grid = self.height // unit, self.width // unit
        self.noise_shape = (self.grid[0] * self.grid[1], pipe.transformer.config.in_channels)
        last = pipe.transformer.config.num_layers - 1
        self.unused = tuple(f"transformer_blocks.{last}.{part}." for part in UNUSED)
        not_unused = rf"(?!transformer_blocks\.{last}\.({'|'.join(UNUSED)}))"
        self.lora_targets = not_unused + self.lora_targets

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline's __call__ passes to its scheduler's set_timesteps."""
        mu = self.dynamic_shift(self.noise_shape[0])
        return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": mu}

    def cudnn_serves(self) -> bool:
        """Return whether cuDNN's backward pass is finite for this number of tokens and a mask."""
        every, wrong = CUDNN_NAN
        return (self.noise_shape[0] + self.longest) % every != wrong

    def learns(self, name: str) -> bool:
        """Return whether the velocity depends on a weight, so that it gets gradients."""
        return not name.startswith(self.unused)

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return {"encoder_hidden_states": [S, D], "encoder_hidden_states_mask": [S] bool}.

        The embeddings are zero after the caption's tokens.
        """
        # guidance is against a space instead of the empty prompt, as in the authors' code
        text, _ = self.pipe.encode_prompt(caption or " ", self.device, max_sequence_length=LONGEST)
        return self.padded(text[0])

    def padded(self, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the embeddings [S', D] of a prompt's tokens padded to the longest, and a mask."""
        own = len(text)
        return {
            "encoder_hidden_states": pad(text, (0, 0, 0, self.longest - own)),
            "encoder_hidden_states_mask": torch.arange(self.longest, device=text.device) < own,
        }

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        shape = self.longest, self.pipe.transformer.config.joint_attention_dim
        return {
            "encoder_hidden_states": torch.zeros(shape, dtype=self.dtype),
            "encoder_hidden_states_mask": torch.ones(self.longest, dtype=torch.bool),
        }

    def shapes(self, tokens: int) -> list[list[tuple[int, int, int]]]:
        """Return frames, height and width in tokens of each image in a row of tokens."""
        return [[(1, *self.grid)]]

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, L, C] float32 at x [b, L, C] and sigma, a scalar or [b]."""
        # the transformer multiplies by 1000 itself
        timestep = of_rows(sigma, x)
        module = partial(self.trainable["transformer"], img_shapes=self.shapes(x.shape[1]))
        return self.guided(module, self.guidance, cond, hidden_states=x, timestep=timestep)

    def extrapolate(self, towards: torch.Tensor, away: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the guided velocity, scaled per token to the norm of the one with the prompt."""
        guided = super().extrapolate(towards, away, scale)
        return guided * (towards.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode latents [b, *noise_shape] to images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        mean = torch.tensor(vae.config.latents_mean).to(x0)[:, None, None]
        std = torch.tensor(vae.config.latents_std).to(x0)[:, None, None]
        # a token is 2x2 latent pixels, channel by channel
        z = pixel_shuffle(x0.mT.unflatten(2, self.grid), 2) * std + mean
        images = vae.decode(z[:, :, None].to(vae.dtype)).sample[:, :, 0]
        return self.pipe.image_processor.postprocess(images.float(), output_type="pt")
