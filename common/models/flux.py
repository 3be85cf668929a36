"""FLUX (diffusers' FluxPipeline): embedded guidance, latents packed into tokens."""

import torch
from diffusers import FluxPipeline


class Flux:
    """b rows; L = H/16 * W/16 tokens of 64 channels for FLUX.1-dev (the VAE's factor and a 2x2 patch)."""

    # every linear layer inside the blocks; the projections outside them stay as they are
    lora_targets = (
        r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )

    def __init__(self, pipe, height=None, width=None, guidance=3.5):
        """height, width in pixels: multiples of the VAE's factor times two; the VAE's own size if None."""
        self.pipe, self.guidance = pipe, guidance
        unit = 2 * pipe.vae_scale_factor
        self.height, self.width = (size or pipe.vae.config.sample_size for size in (height, width))
        if self.height % unit or self.width % unit:
            raise ValueError(
                f"height and width must be multiples of {unit} for this model, not {self.height}x{self.width}"
            )
        self.trainable = {"transformer": pipe.transformer}
        self.noise_shape = (self.height // unit * (self.width // unit), pipe.transformer.config.in_channels)
        self.embedded = {}

    @classmethod
    def load(cls, source, dtype, **settings):
        return cls(FluxPipeline.from_pretrained(source, dtype=dtype), **settings)

    @torch.no_grad()
    def encode(self, prompts):
        """b prompts -> {"encoder_hidden_states": [b, S, D], "pooled_projections": [b, D']}.

        Each distinct prompt is encoded once in the model's life.
        """
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.embedded))
        for prompt in new:  # one by one: an embedding must not depend on its neighbours
            text, pooled, _ = self.pipe.encode_prompt(
                prompt, None, max_sequence_length=min(512, self.pipe.tokenizer_2.model_max_length)
            )
            self.embedded[prompt] = (text[0], pooled[0])
        text, pooled = zip(*(self.embedded[prompt] for prompt in prompts))
        return {"encoder_hidden_states": torch.stack(text), "pooled_projections": torch.stack(pooled)}

    def velocity(self, x, sigma, cond):
        """x [b, L, C], sigma a scalar or [b] -> velocity [b, L, C] float32"""
        b, device = len(x), x.device
        unit = 2 * self.pipe.vae_scale_factor
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=device).expand(b)
        return self.trainable["transformer"](
            hidden_states=x,
            timestep=sigma,  # the transformer multiplies by 1000 itself, and the guidance too
            guidance=torch.full((b,), self.guidance, device=device)
            if self.pipe.transformer.config.guidance_embeds
            else None,
            txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=device),
            img_ids=self.pipe._prepare_latent_image_ids(
                b, self.height // unit, self.width // unit, device, torch.float32
            ),
            return_dict=False,
            **cond,
        )[0].float()

    @torch.no_grad()
    def decode(self, x0):
        """x0 [b, L, C] -> images [b, 3, H, W] in [0, 1]"""
        vae = self.pipe.vae
        z = self.pipe._unpack_latents(x0, self.height, self.width, self.pipe.vae_scale_factor)
        z = z / vae.config.scaling_factor + vae.config.shift_factor
        return self.pipe.image_processor.postprocess(vae.decode(z.to(vae.dtype)).sample.float(), output_type="pt")
