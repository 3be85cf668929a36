"""FLUX (diffusers' FluxPipeline): embedded guidance, latents packed into tokens."""

import torch
from diffusers import FluxPipeline
from torch.nn.functional import pixel_shuffle

from common.models.family import Family


class Flux(Family):
    """b rows; L = H/16 * W/16 tokens of 64 channels for FLUX.1-dev (the VAE's factor and a 2x2
    patch)."""

    pipeline = FluxPipeline
    encoders = ("text_encoder", "text_encoder_2")
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    # every linear layer inside the blocks; the projections outside them stay as they are
    lora_targets = (
        r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )

    def __init__(self, pipe: FluxPipeline, height: int = 0, width: int = 0, **settings) -> None:
        super().__init__(pipe, **settings)
        own = pipe.vae.config.sample_size
        self.unit = 2 * pipe.vae_scale_factor  # pixels of a token
        self.height, self.width = self._size(self.unit, height or own, width or own)
        self.noise_shape = (
            self.height // self.unit * (self.width // self.unit),
            pipe.transformer.config.in_channels,
        )

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """{"encoder_hidden_states": [S, D], "pooled_projections": [D']}"""
        longest = min(512, self.pipe.tokenizer_2.model_max_length)
        text, pooled, _ = self.pipe.encode_prompt(
            caption, None, device=self.device, max_sequence_length=longest
        )
        return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}

    def blank(self) -> dict[str, torch.Tensor]:
        """Zeros like the conditioning of one prompt, {name: [...]}."""
        config, longest = (
            self.pipe.transformer.config,
            min(512, self.pipe.tokenizer_2.model_max_length),
        )
        return {
            "encoder_hidden_states": torch.zeros(
                longest, config.joint_attention_dim, dtype=self.dtype
            ),
            "pooled_projections": torch.zeros(config.pooled_projection_dim, dtype=self.dtype),
        }

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """x [b, L, C], sigma a scalar or [b] -> velocity [b, L, C] float32"""
        b, device = len(x), x.device
        return self.trainable["transformer"](
            hidden_states=x,
            timestep=torch.as_tensor(sigma, dtype=torch.float32, device=device).expand(b),
            # the transformer multiplies both by 1000 itself
            guidance=torch.full((b,), self.guidance, device=device)
            if self.pipe.transformer.config.guidance_embeds
            else None,
            txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=device),
            img_ids=image_ids(self.height // self.unit, self.width // self.unit).to(device),
            return_dict=False,
            **cond,
        )[0].float()

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents [b, *noise_shape] -> images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        # a token is 2x2 latent pixels, channel by channel
        z = pixel_shuffle(
            x0.mT.unflatten(2, (self.height // self.unit, self.width // self.unit)), 2
        )
        z = z / vae.config.scaling_factor + vae.config.shift_factor
        return self.pipe.image_processor.postprocess(
            vae.decode(z.to(vae.dtype)).sample.float(), output_type="pt"
        )


def image_ids(height: int, width: int) -> torch.Tensor:
    """Where each of height * width image tokens stands: [L, 3] float32, (0, row, column)"""
    return torch.cartesian_prod(
        torch.zeros(1), torch.arange(float(height)), torch.arange(float(width))
    )
