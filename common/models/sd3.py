"""Stable Diffusion 3 and 3.5 (diffusers' StableDiffusion3Pipeline): two CLIPs and T5,
classifier-free guidance."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from common.models import assumed
from common.models.assumed import Values
from common.models.family import Family, of_rows


class StableDiffusion3(Family):
    """Run Stable Diffusion 3: latents [b, C, H/8, W/8]."""

    pipeline = StableDiffusion3Pipeline
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
    blocks = ("JointTransformerBlock",)
    # attn2: 3.5 medium has a second attention in its first blocks
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    )
    negative = True
    # many folders lack T5 (9 GiB); the pipeline then uses zeros as its embeddings
    left_out = ("text_encoder_3", "tokenizer_3")

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder, {part: {name: values}}."""
        channels = configs["vae"].get("latent_channels")
        return {
            "scheduler": assumed.flow(configs["scheduler"]),
            "transformer": {
                "in_channels": (channels,),
                "out_channels": (None, channels),
                "patch_size": int,
                "sample_size": int,
            },
            "vae": {"latent_channels": int, "scaling_factor": float, "shift_factor": float},
        }

    def __init__(
        self, pipe: StableDiffusion3Pipeline, height: int = 0, width: int = 0, **settings
    ) -> None:
        super().__init__(pipe, **settings)
        factor = pipe.vae_scale_factor
        config = pipe.transformer.config
        unit = factor * config.patch_size
        own = config.sample_size * factor
        self.height, self.width = self._size(unit, height or own, width or own)
        self.noise_shape = (config.in_channels, self.height // factor, self.width // factor)
        self.longest = 256  # tokens of a prompt for T5
        if pipe.tokenizer_3:
            self.longest = min(256, pipe.tokenizer_3.model_max_length)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline's __call__ passes to its scheduler's set_timesteps.

        The scheduler of 3.5 then shifts twice: first its lowest training sigma, at which its steps
        end, then the sigma of every step.
        """
        found = super().schedule(steps)
        if self.pipe.scheduler.config.get("use_dynamic_shifting"):
            patch = self.pipe.transformer.config.patch_size
            tokens = (self.noise_shape[1] // patch) * (self.noise_shape[2] // patch)
            found["mu"] = self.dynamic_shift(tokens)
        return found

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return {"encoder_hidden_states": [S, D], "pooled_projections": [D']}.

        The embeddings are those of both CLIPs side by side, followed by T5's.
        """
        text, _, pooled, _ = self.pipe.encode_prompt(
            caption,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.longest,
        )
        return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        config = self.pipe.transformer.config
        shape = self.pipe.tokenizer_max_length + self.longest, config.joint_attention_dim
        return {
            "encoder_hidden_states": torch.zeros(shape, dtype=self.dtype),
            "pooled_projections": torch.zeros(config.pooled_projection_dim, dtype=self.dtype),
        }

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, C, h, w] float32 at x [b, C, h, w] and sigma, a scalar or [b]."""
        timestep = of_rows(sigma, x) * 1000
        module = self.trainable["transformer"]
        return self.guided(module, self.guidance, cond, hidden_states=x, timestep=timestep)

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode latents [b, *noise_shape] to images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        z = x0 / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(z.to(vae.dtype)).sample.float()
        return self.pipe.image_processor.postprocess(images, output_type="pt")
