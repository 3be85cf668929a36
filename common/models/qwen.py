"""Qwen-Image (diffusers' QwenImagePipeline): a language model's embeddings with a mask, guidance
that keeps a norm."""

from functools import partial

import torch
from diffusers import QwenImagePipeline
from torch.nn.functional import pad, pixel_shuffle

from common.models.family import Family

LONGEST = 512  # words of a prompt; the pipeline's own
UNREAD = ("attn.to_add_out", "txt_mlp")  # of the last block, whose text goes nowhere


class QwenImage(Family):
    """b rows; L = H/16 * W/16 tokens of 64 channels (the VAE's factor and a 2x2 patch)."""

    pipeline = QwenImagePipeline
    encoders = ("text_encoder",)
    blocks = ("QwenImageTransformerBlock",)
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2))"
    )
    negative = True

    def __init__(
        self, pipe: QwenImagePipeline, height: int = 0, width: int = 0, **settings
    ) -> None:
        super().__init__(pipe, **settings)
        self.unit, own = 2 * pipe.vae_scale_factor, pipe.default_sample_size * pipe.vae_scale_factor
        self.height, self.width = self._size(self.unit, height or own, width or own)
        self.grid = self.height // self.unit, self.width // self.unit
        self.noise_shape = (self.grid[0] * self.grid[1], pipe.transformer.config.in_channels)
        last = pipe.transformer.config.num_layers - 1
        self.unread = tuple(f"transformer_blocks.{last}.{part}." for part in UNREAD)
        self.lora_targets = (
            rf"(?!transformer_blocks\.{last}\.({'|'.join(UNREAD)}))" + self.lora_targets
        )

    def learns(self, name: str) -> bool:
        """Whether a weight of this name is in what is computed, and so has a gradient."""
        return not name.startswith(self.unread)

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """{"encoder_hidden_states": [S, D], zeros after the caption's own,
        "encoder_hidden_states_mask": [S] bool}"""
        # without a prompt it is led away from a space, as its authors do
        text, _ = self.pipe.encode_prompt(caption or " ", self.device, max_sequence_length=LONGEST)
        own = text.shape[1]
        return {
            "encoder_hidden_states": pad(text[0], (0, 0, 0, LONGEST - own)),
            "encoder_hidden_states_mask": torch.arange(LONGEST, device=text.device) < own,
        }

    def blank(self) -> dict[str, torch.Tensor]:
        """Zeros like the conditioning of one prompt, {name: [...]}."""
        return {
            "encoder_hidden_states": torch.zeros(
                LONGEST, self.pipe.transformer.config.joint_attention_dim, dtype=self.dtype
            ),
            "encoder_hidden_states_mask": torch.ones(LONGEST, dtype=torch.bool),
        }

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """x [b, L, C], sigma a scalar or [b] -> velocity [b, L, C] float32"""
        # the transformer multiplies by 1000 itself
        timestep = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        module = partial(self.trainable["transformer"], img_shapes=[[(1, *self.grid)]])
        return self.guided(module, self.guidance, cond, hidden_states=x, timestep=timestep)

    def led(self, towards: torch.Tensor, away: torch.Tensor, scale: float) -> torch.Tensor:
        """As long in every token as the velocity towards the prompt is."""
        led = super().led(towards, away, scale)
        return led * (towards.norm(dim=-1, keepdim=True) / led.norm(dim=-1, keepdim=True))

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents [b, *noise_shape] -> images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        mean, std = (
            torch.tensor(s).to(x0)[:, None, None]
            for s in (vae.config.latents_mean, vae.config.latents_std)
        )
        z = (
            pixel_shuffle(x0.mT.unflatten(2, self.grid), 2) * std + mean
        )  # a token is 2x2 latent pixels
        image = vae.decode(z[:, :, None].to(vae.dtype)).sample[:, :, 0]
        return self.pipe.image_processor.postprocess(image.float(), output_type="pt")
