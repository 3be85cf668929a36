"""Z-Image (diffusers' ZImagePipeline): a language model's embeddings without padding, and
classifier-free guidance."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch.nn.functional import pad

from common.models import assumed
from common.models.assumed import Values
from common.models.family import Family, of_rows

LONGEST = 512  # tokens of a prompt, the pipeline's default


class ZImage(Family):
    """Run Z-Image: latents [b, C, H/8, W/8].

    guidance: the pipeline's guidance_scale plus 1, so that 1 disables it as in the other families.
    """

    pipeline = ZImagePipeline
    encoders = ("text_encoder",)
    blocks = ("ZImageTransformerBlock",)
    lora_targets = (
        r"(layers|noise_refiner|context_refiner)\.\d+\."
        r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
    )
    negative = True

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder, {part: {name: values}}.

        Omni models, which have more inputs, do not fit.
        """
        return {
            "scheduler": assumed.flow(configs["scheduler"]),
            "transformer": {
                "in_channels": (configs["vae"].get("latent_channels"),),
                "all_patch_size": ([2],),
                "all_f_patch_size": ([1],),
                "cap_feat_dim": int,
                "siglip_feat_dim": (None,),
            },
            "vae": {"latent_channels": int, "scaling_factor": float, "shift_factor": float},
        }

    def __init__(self, pipe: ZImagePipeline, height: int = 0, width: int = 0, **settings) -> None:
        super().__init__(pipe, **settings)
        factor = pipe.vae_scale_factor
        self.height, self.width = self._size(2 * factor, height or 1024, width or 1024)
        channels = pipe.transformer.config.in_channels
        self.noise_shape = (channels, self.height // factor, self.width // factor)
        # Compute this table here. Otherwise the first pass would compute and keep it, and that may
        # be the pass that counts memory on tensors without contents.
        rope = pipe.transformer.rope_embedder
        rope.freqs_cis = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, rope.theta)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline's __call__ passes to its scheduler's set_timesteps."""
        tokens = self.noise_shape[1] // 2 * (self.noise_shape[2] // 2)
        sigmas = torch.linspace(1, 1 / steps, steps).tolist()  # float32, unlike other pipelines
        return {"sigmas": sigmas, "mu": self.dynamic_shift(tokens)}

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return {"encoder_hidden_states": [512, D], "tokens": a scalar}.

        "tokens" is the number of the caption's tokens, after which the embeddings are zero.
        """
        (text,), _ = self.pipe.encode_prompt(
            caption, self.device, do_classifier_free_guidance=False, max_sequence_length=LONGEST
        )
        return {
            "encoder_hidden_states": pad(text, (0, 0, 0, LONGEST - len(text))),
            "tokens": torch.tensor(len(text)),
        }

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        shape = LONGEST, self.pipe.transformer.config.cap_feat_dim
        return {
            "encoder_hidden_states": torch.zeros(shape, dtype=self.dtype),
            "tokens": torch.tensor(LONGEST),
        }

    def cudnn_serves(self) -> bool:
        """Return False: captions of several lengths in a pass have a mask, of any length."""
        return False

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, C, h, w] float32 at x [b, C, h, w] and sigma, a scalar or [b]."""
        sigma = of_rows(sigma, x)
        return self.guided(self._transformer, self.guidance, cond, x=x, sigma=sigma)

    def _transformer(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        tokens: torch.Tensor,
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        """Return the velocity [b, C, h, w] without guidance, in a tuple.

        The transformer takes lists, because embeddings differ in length. Its time runs from 0
        (noise) to 1, so it predicts the negative velocity.
        """
        clips = list(x[:, :, None])  # the transformer takes clips; each has one frame
        texts = zip(encoder_hidden_states, tokens.tolist())  # this waits for a GPU
        texts = [text[:length] for text, length in texts]
        module = self.trainable["transformer"]
        found = module(clips, 1 - sigma, texts, return_dict=return_dict)[0]
        return (-torch.stack(found)[:, :, 0],)

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode latents [b, *noise_shape] to images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        z = x0 / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(z.to(vae.dtype)).sample.float()
        return self.pipe.image_processor.postprocess(images, output_type="pt")
