"""FLUX.2 klein (diffusers' Flux2KleinPipeline): a language model's embeddings, classifier-free
guidance, latents packed into tokens."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch.nn.functional import pixel_shuffle

from common.errors import InputError
from common.models import assumed
from common.models.assumed import Values
from common.models.family import Family, of_rows

LONGEST = 512  # tokens of a prompt, the pipeline's default


class Flux2Klein(Family):
    """Run FLUX.2 klein: latents [b, L, C], L = H/16 * W/16 tokens of C = 128 channels.

    16 is the VAE's factor 8 times the patch size 2.
    """

    pipeline = Flux2KleinPipeline
    encoders = ("text_encoder",)
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    negative = True

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder, {part: {name: values}}."""
        channels = 4 * configs["vae"].get("latent_channels", 0)
        return {
            "scheduler": assumed.flow(configs["scheduler"]),
            "transformer": {
                "in_channels": (channels,),
                "out_channels": (None, channels),
                "patch_size": (1,),
                "joint_attention_dim": int,
                "guidance_embeds": (False,),
            },
            "vae": {"latent_channels": int, "patch_size": ([2, 2],), "batch_norm_eps": float},
        }

    def __init__(
        self, pipe: Flux2KleinPipeline, height: int = 0, width: int = 0, **settings
    ) -> None:
        super().__init__(pipe, **settings)
        if pipe.config.is_distilled and self.guidance != 1:
            raise InputError(
                f"--guidance {self.guidance:g}: this model is distilled and takes no guidance. "
                "Give --guidance 1."
            )
        unit = 2 * pipe.vae_scale_factor  # height and width of a token in pixels
        own = pipe.default_sample_size * pipe.vae_scale_factor
        self.height, self.width = self._size(unit, height or own, width or own)
        self.grid = self.height // unit, self.width // unit
        self.noise_shape = (self.grid[0] * self.grid[1], pipe.transformer.config.in_channels)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline's __call__ passes to its scheduler's set_timesteps."""
        mu = compute_empirical_mu(self.noise_shape[0], steps)
        if self.pipe.scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps, "mu": mu}
        return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": mu}

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return {"encoder_hidden_states": [512, D]}.

        The padding after the caption's tokens is not masked, as in the pipeline.
        """
        text, _ = self.pipe.encode_prompt(caption, self.device, max_sequence_length=LONGEST)
        return {"encoder_hidden_states": text[0]}

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        shape = LONGEST, self.pipe.transformer.config.joint_attention_dim
        return {"encoder_hidden_states": torch.zeros(shape, dtype=self.dtype)}

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, L, C] float32 at x [b, L, C] and sigma, a scalar or [b]."""
        # the transformer multiplies by 1000 itself
        timestep = of_rows(sigma, x)
        module = partial(
            self.trainable["transformer"],
            img_ids=positions(x.device, rows=self.grid[0], columns=self.grid[1]),
            txt_ids=positions(x.device, words=LONGEST),
        )
        return self.guided(module, self.guidance, cond, hidden_states=x, timestep=timestep)

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode latents [b, *noise_shape] to images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        # tokens are normalised by the statistics of a layer of the VAE
        mean = vae.bn.running_mean.to(x0)
        std = (vae.bn.running_var.to(x0) + vae.config.batch_norm_eps).sqrt()
        tokens = x0 * std + mean
        # a token is 2x2 latent pixels, channel by channel
        z = pixel_shuffle(tokens.mT.unflatten(2, self.grid), 2)
        images = vae.decode(z.to(vae.dtype)).sample.float()
        return self.pipe.image_processor.postprocess(images, output_type="pt")


def positions(
    device: torch.device, rows: int = 1, columns: int = 1, words: int = 1
) -> torch.Tensor:
    """Return (0, row, column, word) of each token, [rows * columns * words, 4] integers."""
    axes = (torch.arange(size, device=device) for size in (1, rows, columns, words))
    return torch.cartesian_prod(*axes)
