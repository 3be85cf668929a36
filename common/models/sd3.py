"""Stable Diffusion 3 and 3.5 (diffusers' StableDiffusion3Pipeline): two CLIPs and T5,
classifier-free guidance."""

import torch
from diffusers import StableDiffusion3Pipeline

from common.models.family import Family


class StableDiffusion3(Family):
    """b rows of latents [C, H/8, W/8]."""

    pipeline = StableDiffusion3Pipeline
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
    blocks = ("JointTransformerBlock",)
    # 3.5 medium has a second attention in its first blocks
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    )
    negative = True
    left_out = (
        "text_encoder_3",
        "tokenizer_3",
    )  # T5, 9 GiB: the pipeline puts zeros in the place of its words

    def __init__(
        self, pipe: StableDiffusion3Pipeline, height: int = 0, width: int = 0, **settings
    ) -> None:
        super().__init__(pipe, **settings)
        factor, config = pipe.vae_scale_factor, pipe.transformer.config
        own = config.sample_size * factor
        self.height, self.width = self._size(
            factor * config.patch_size, height or own, width or own
        )
        self.noise_shape = (config.in_channels, self.height // factor, self.width // factor)
        self.longest = min(
            256, pipe.tokenizer_3.model_max_length if pipe.tokenizer_3 else 256
        )  # words for T5

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """{"encoder_hidden_states": [S, D], both CLIPs' words side by side, then T5's,
        "pooled_projections": [D']}"""
        settings = dict(do_classifier_free_guidance=False, max_sequence_length=self.longest)
        text, _, pooled, _ = self.pipe.encode_prompt(
            caption, None, None, device=self.device, **settings
        )
        return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}

    def blank(self) -> dict[str, torch.Tensor]:
        """Zeros like the conditioning of one prompt, {name: [...]}."""
        config = self.pipe.transformer.config
        shape = self.pipe.tokenizer_max_length + self.longest, config.joint_attention_dim
        return {
            "encoder_hidden_states": torch.zeros(shape, dtype=self.dtype),
            "pooled_projections": torch.zeros(config.pooled_projection_dim, dtype=self.dtype),
        }

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """x [b, C, h, w], sigma a scalar or [b] -> velocity [b, C, h, w] float32"""
        timestep = (torch.as_tensor(sigma, dtype=torch.float32, device=x.device) * 1000).expand(
            len(x)
        )
        module = self.trainable["transformer"]
        return self.guided(module, self.guidance, cond, hidden_states=x, timestep=timestep)

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents [b, *noise_shape] -> images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        z = x0 / vae.config.scaling_factor + vae.config.shift_factor
        return self.pipe.image_processor.postprocess(
            vae.decode(z.to(vae.dtype)).sample.float(), output_type="pt"
        )
