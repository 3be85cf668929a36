"""HunyuanVideo (diffusers' HunyuanVideoPipeline): embedded guidance, an attention mask over the
text."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline

from common.models import assumed
from common.models.assumed import Values
from common.models.family import CUDNN_NAN, Family, of_rows

LONGEST = 256  # tokens of a prompt, the pipeline's default


class HunyuanVideo(Family):
    """Run HunyuanVideo: latents [b, C, F', h, w]."""

    pipeline = HunyuanVideoPipeline
    encoders = ("text_encoder", "text_encoder_2")
    blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    lora_targets = (
        r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )
    video = True

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder. Image-to-video models have more inputs."""
        channels = configs["vae"].get("latent_channels")
        return {
            "scheduler": assumed.flow(configs["scheduler"]),
            "transformer": {
                "in_channels": (channels,),
                "out_channels": (None, channels),
                "patch_size": int,
                "guidance_embeds": (True, False),
                "image_condition_type": (None,),
            },
            "vae": {"latent_channels": int, "scaling_factor": float},
        }

    def __init__(
        self,
        pipe: HunyuanVideoPipeline,
        height: int = 0,
        width: int = 0,
        frames: int = 0,
        **settings,
    ) -> None:
        super().__init__(pipe, **settings)
        space = pipe.vae_scale_factor_spatial
        time = pipe.vae_scale_factor_temporal
        unit = space * pipe.transformer.config.patch_size
        self.height, self.width = self._size(unit, height or 480, width or 480)
        self.frames = self._length(time, frames or 53)
        length = (self.frames - 1) // time + 1
        size = self.height // space, self.width // space
        self.noise_shape = (pipe.transformer.config.in_channels, length, *size)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline's __call__ passes to its scheduler's set_timesteps."""
        return {"sigmas": np.linspace(1, 0, steps + 1)[:-1]}

    def cudnn_serves(self) -> bool:
        """Return whether cuDNN's backward pass is finite for this number of tokens and a mask."""
        config = self.pipe.transformer.config
        _, length, height, width = self.noise_shape
        tokens = length // config.patch_size_t * (height * width // config.patch_size**2)
        every, wrong = CUDNN_NAN
        return (tokens + LONGEST) % every != wrong

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return the encoders' outputs for a caption.

        {"encoder_hidden_states": [S, D], "encoder_attention_mask": [S], "pooled_projections": [D']}
        """
        text, pooled, mask = self.pipe.encode_prompt(caption, device=self.device)
        return {
            "encoder_hidden_states": text[0],
            "encoder_attention_mask": mask[0],
            "pooled_projections": pooled[0],
        }

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        config = self.pipe.transformer.config
        return {
            "encoder_hidden_states": torch.zeros(LONGEST, config.text_embed_dim, dtype=self.dtype),
            "encoder_attention_mask": torch.ones(LONGEST, dtype=self.dtype),
            "pooled_projections": torch.zeros(config.pooled_projection_dim, dtype=self.dtype),
        }

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, C, F', h, w] float32 at x and sigma, a scalar or [b]."""
        # unlike FLUX's, this transformer multiplies neither timestep nor guidance by 1000
        b = len(x)
        guidance = None
        if self.pipe.transformer.config.guidance_embeds:
            guidance = torch.full((b,), 1000 * self.guidance, device=x.device)
        return self.trainable["transformer"](
            hidden_states=x,
            timestep=of_rows(sigma, x) * 1000,
            guidance=guidance,
            return_dict=False,
            **cond,
        )[0].float()

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode latents [b, *noise_shape] to clips [b, F, 3, H, W] in [0, 1], in vae.dtype."""
        vae = self.pipe.vae
        clips = vae.decode((x0 / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        return self.pipe.video_processor.postprocess_video(clips, output_type="pt")
