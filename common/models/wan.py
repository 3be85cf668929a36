"""Wan 2.1 and 2.2 (diffusers' WanPipeline and WanImageToVideoPipeline): classifier-free guidance,
one expert or two."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from common.errors import InputError
from common.models.family import Family
from common.models.pictures import read_image
from common.prompts import image_of


class Wan(Family):
    """b rows of latents [C, F', h, w]. With a boundary_ratio, `transformer` moves the latents while
    the timestep is at or above boundary_ratio * 1000, `transformer_2` after that; both are trained,
    each on its own steps."""

    pipeline = WanPipeline
    trained = ("transformer", "transformer_2")
    encoders = ("text_encoder",)
    blocks = ("WanTransformerBlock",)
    lora_targets = r".*blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"
    negative, video = True, True
    vae_dtype = torch.float32  # as diffusers' own examples load it

    def __init__(
        self,
        pipe: WanPipeline | WanImageToVideoPipeline,
        height: int = 0,
        width: int = 0,
        frames: int = 0,
        **settings,
    ) -> None:
        super().__init__(pipe, **settings)
        if pipe.config.expand_timesteps:
            raise InputError(
                "model: Wan2.2 TI2V, with a timestep for each token, is not supported; take a "
                "T2V or I2V model"
            )
        space, time = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        unit = space * pipe.transformer.config.patch_size[1]
        self.height, self.width = self._size(unit, height or 480, width or 832)
        self.frames = self._length(time, frames or 53)
        z = pipe.vae.config.z_dim
        self.noise_shape = (
            z,
            (self.frames - 1) // time + 1,
            self.height // space,
            self.width // space,
        )

    def trained_at(self, sigma: float | torch.Tensor) -> str:
        """The expert of high noise, or that of low."""
        boundary = self.pipe.config.boundary_ratio
        # in float32, as the pipeline compares its timesteps: shift 3 puts a step on the boundary
        # exactly
        high = (
            boundary is None
            or float(torch.as_tensor(sigma, dtype=torch.float32) * 1000) >= boundary * 1000
        )
        return "transformer" if high else "transformer_2"

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """{"encoder_hidden_states": [S, D]}, zeros after the caption's own tokens"""
        longest = min(512, self.pipe.tokenizer.model_max_length)
        text, _ = self.pipe.encode_prompt(
            caption, None, False, device=self.device, max_sequence_length=longest
        )
        return {"encoder_hidden_states": text[0]}

    def blank(self) -> dict[str, torch.Tensor]:
        """Zeros like the conditioning of one prompt, {name: [...]}."""
        longest = min(512, self.pipe.tokenizer.model_max_length)
        shape = longest, self.pipe.transformer.config.text_dim
        return {"encoder_hidden_states": torch.zeros(shape, dtype=self.dtype)}

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """x [b, C, F', h, w], sigma a scalar, for one expert moves all rows -> velocity [b, C, F',
        h, w] float32"""
        expert = self.trained_at(sigma)
        scale = self.guidance if expert == "transformer" else self.guidance_2
        cond = dict(cond)
        x = torch.cat([x, cond.pop("still")], 1) if "still" in cond else x
        timestep = (torch.as_tensor(sigma, dtype=torch.float32, device=x.device) * 1000).expand(
            len(x)
        )
        return self.guided(self.trainable[expert], scale, cond, hidden_states=x, timestep=timestep)

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents [b, *noise_shape] -> clips [b, F, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        mean, std = (
            torch.tensor(statistic).to(x0)[:, None, None, None]
            for statistic in (vae.config.latents_mean, vae.config.latents_std)
        )
        clips = vae.decode((x0 * std + mean).to(vae.dtype)).sample.float()
        return self.pipe.video_processor.postprocess_video(clips, output_type="pt")

    def save_lora(self, folder: str | Path, layers: dict[str, dict[str, torch.Tensor]]) -> None:
        """The second expert's goes to folder/transformer_2: load_lora_weights(...,
        load_into_transformer_2=True)."""
        for name, weights in layers.items():
            self.pipe.save_lora_weights(
                folder if name == "transformer" else f"{folder}/{name}",
                transformer_lora_layers=weights,
            )

    def load_lora(self, folder: str | Path) -> None:
        """Of both experts, where there are two."""
        self.pipe.load_lora_weights(folder)
        if "transformer_2" in self.trainable:
            self.pipe.load_lora_weights(f"{folder}/transformer_2", load_into_transformer_2=True)


class WanImageToVideo(Wan):
    """The same from a conditioning image: each prompt has one (a line IMAGE <tab> CAPTION of the
    prompt file)."""

    pipeline = WanImageToVideoPipeline
    encoders = ("text_encoder", "image_encoder")
    images = True

    def embed(self, prompt: str) -> dict[str, torch.Tensor]:
        """{"encoder_hidden_states": [S, D], "still": [4 + C, F', h, w]: mask and latents of the
        image}"""
        image = self._image(prompt)
        shape = (self.pipe.vae.config.z_dim, self.height, self.width, self.frames)
        _, still = self.pipe.prepare_latents(
            image, 1, *shape, dtype=torch.float32, device=self.device
        )
        cond = {**super().embed(prompt), "still": still[0]}
        if (
            self.pipe.transformer.config.image_dim is not None
        ):  # Wan 2.1 also shows the image to CLIP
            picture = read_image(image_of(prompt))
            cond["encoder_hidden_states_image"] = self.pipe.encode_image(picture, self.device)[0]
        return cond

    def blank(self) -> dict[str, torch.Tensor]:
        """Zeros like the conditioning of one prompt, {name: [...]}. The image's part is among
        them."""
        config, (_, *shape) = self.pipe.transformer.config, self.noise_shape
        cond = {
            **super().blank(),
            "still": torch.zeros(config.in_channels - self.noise_shape[0], *shape),
        }
        if config.image_dim is not None:
            tokens = (
                self.pipe.image_encoder.config.image_size
                // self.pipe.image_encoder.config.patch_size
            ) ** 2 + 1
            cond["encoder_hidden_states_image"] = torch.zeros(
                tokens, config.image_dim, dtype=self.dtype
            )
        return cond

    def still(self, prompts: Sequence[str]) -> torch.Tensor:
        """The conditioning images as still videos: [b, F, 3, H, W] in [0, 1]"""
        images = torch.cat([self._image(prompt) for prompt in prompts]) / 2 + 0.5
        return images[:, None].expand(-1, self.frames, -1, -1, -1)

    def _image(self, prompt: str) -> torch.Tensor:
        """[1, 3, H, W] in [-1, 1]"""
        picture = read_image(image_of(prompt))
        image = self.pipe.video_processor.preprocess(picture, height=self.height, width=self.width)
        return image.to(self.device, torch.float32)
