"""FLUX (diffusers' FluxPipeline) and FLUX Kontext (FluxKontextPipeline): embedded guidance, latents
packed into tokens, and for Kontext the image to be edited."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from torch.nn.functional import pixel_shuffle

from common.models import assumed, references
from common.models.assumed import Values
from common.models.family import Family, of_rows


class Flux(Family):
    """Run FLUX: latents [b, L, C], for FLUX.1-dev L = H/16 * W/16 tokens of C = 64 channels.

    16 is the VAE's factor 8 times the patch size 2.
    """

    pipeline = FluxPipeline
    encoders = ("text_encoder", "text_encoder_2")
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    # every linear layer inside the blocks; the projections outside them stay as they are
    lora_targets = (
        r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder. FLUX's Fill and Control models have more inputs."""
        vae = configs["vae"]
        channels = 4 * vae.get("latent_channels", 0)
        return {
            "scheduler": assumed.flow(configs["scheduler"]),
            "transformer": {
                "in_channels": (channels,),
                "out_channels": (None, channels),
                "patch_size": (None, 1),
                "guidance_embeds": (True, False),
            },
            "vae": {
                "latent_channels": int,
                "sample_size": int,
                "scaling_factor": float,
                "shift_factor": float,
            },
        }

    def __init__(
        self,
        pipe: FluxPipeline | FluxKontextPipeline,
        height: int = 0,
        width: int = 0,
        **settings,
    ) -> None:
        super().__init__(pipe, **settings)
        own = pipe.vae.config.sample_size
        unit = 2 * pipe.vae_scale_factor  # height and width of a token in pixels
        self.height, self.width = self._size(unit, height or own, width or own)
        self.grid = self.height // unit, self.width // unit
        self.noise_shape = (self.grid[0] * self.grid[1], pipe.transformer.config.in_channels)
        self.longest = min(512, pipe.tokenizer_2.model_max_length)  # tokens of a prompt

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline's __call__ passes to its scheduler's set_timesteps."""
        mu = self.dynamic_shift(self.noise_shape[0])
        if self.pipe.scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps, "mu": mu}
        return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": mu}

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return {"encoder_hidden_states": [S, D], "pooled_projections": [D']}."""
        text, pooled, _ = self.pipe.encode_prompt(
            caption, None, device=self.device, max_sequence_length=self.longest
        )
        return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        config = self.pipe.transformer.config
        shape = self.longest, config.joint_attention_dim
        return {
            "encoder_hidden_states": torch.zeros(shape, dtype=self.dtype),
            "pooled_projections": torch.zeros(config.pooled_projection_dim, dtype=self.dtype),
        }

    def positions(self, device: torch.device) -> torch.Tensor:
        """Return the position of each token, [L, 3] float32."""
        return image_ids(*self.grid, device)

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, L, C] float32 at x [b, L, C] and sigma, a scalar or [b]."""
        b = len(x)
        device = x.device
        guidance = None
        if self.pipe.transformer.config.guidance_embeds:
            guidance = torch.full((b,), self.guidance, device=device)
        return self.trainable["transformer"](
            hidden_states=x,
            # the transformer multiplies timestep and guidance by 1000 itself
            timestep=of_rows(sigma, x),
            guidance=guidance,
            txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=device),
            img_ids=self.positions(device),
            return_dict=False,
            **cond,
        )[0].float()

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode latents [b, *noise_shape] to images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        # a token is 2x2 latent pixels, channel by channel
        z = pixel_shuffle(x0.mT.unflatten(2, self.grid), 2)
        z = z / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(z.to(vae.dtype)).sample.float()
        return self.pipe.image_processor.postprocess(images, output_type="pt")


class FluxKontext(Flux):
    """Run FLUX Kontext: the image of a prompt is edited.

    Its latents, at the size of the sample, are L reference tokens with a 1 in their positions.
    """

    pipeline = FluxKontextPipeline
    images = 1

    def embed(self, prompt: str) -> dict[str, torch.Tensor]:
        """Return what Flux.embed does, and {"references": [L, C]}."""
        pictures = references.pictures(self, prompt)
        (image,) = references.for_vae(self, pictures, self.height, self.width)
        return {**super().embed(prompt), "references": references.tokens(self, image)}

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt and its image, {name: [...]}."""
        return {**super().blank(), "references": torch.zeros(self.noise_shape)}

    def positions(self, device: torch.device) -> torch.Tensor:
        """Return the position of each token and each reference, [2 L, 3] float32."""
        own = super().positions(device)
        marked = own.clone()
        marked[:, 0] = 1.0
        return torch.cat([own, marked])

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, L, C] float32 at x [b, L, C] and sigma, a scalar or [b]."""
        return references.velocity_before(super().velocity, x, sigma, cond)


def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the position (0, row, column) of each of L = height * width tokens, [L, 3] float32."""
    rows = torch.arange(float(height), device=device)
    columns = torch.arange(float(width), device=device)
    return torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)
