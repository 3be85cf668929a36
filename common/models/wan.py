"""Wan 2.1 and 2.2 (diffusers' WanPipeline and WanImageToVideoPipeline): classifier-free guidance,
one expert or two."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from common.errors import InputError
from common.models import assumed, lora_file
from common.models.assumed import Values
from common.models.family import Family, of_rows
from common.prompts import image_of
from common.prompts.pictures import read_image


class Wan(Family):
    """Run Wan: latents [b, C, F', h, w].

    With a boundary_ratio there are two experts: `transformer` computes the velocity while the
    timestep is at or above boundary_ratio * 1000, `transformer_2` below. Each is trained on the
    steps that it computes.
    """

    pipeline = WanPipeline
    trained = ("transformer", "transformer_2")
    encoders = ("text_encoder",)
    blocks = ("WanTransformerBlock",)
    lora_targets = r".*blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"
    negative = True
    video = True
    vae_dtype = torch.float32  # as in diffusers' own examples

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder. Wan's control models have more inputs."""
        vae = configs["vae"]
        channels = inputs = vae.get("z_dim", 0)
        if cls.images:  # the latents of the image, and its mask for each frame of a latent
            inputs = 2 * channels + vae.get("scale_factor_temporal", 4)
        expert = {
            "in_channels": (inputs,),
            "out_channels": (None, channels),
            "patch_size": list,
            "pos_embed_seq_len": (None,),  # of models between a first and a last frame
        }
        experts = {name: expert for name in cls.trained if name in configs}
        return {
            "scheduler": assumed.flow(configs["scheduler"]),
            **experts,
            "vae": {"z_dim": int, "latents_mean": list, "latents_std": list},
        }

    def __init__(
        self,
        pipe: WanPipeline | WanImageToVideoPipeline,
        height: int = 0,
        width: int = 0,
        frames: int = 0,
        **settings,
    ) -> None:
        super().__init__(pipe, **settings)
        if pipe.config.expand_timesteps and self.images:
            raise InputError(
                "model: Wan2.2 TI2V with a first frame is not supported. Give its WanPipeline, "
                "which is text to video, or an I2V model."
            )
        if len(self.trainable) > 1 and pipe.config.boundary_ratio is None:
            raise InputError(
                "model: its model_index.json has a transformer_2 and no boundary_ratio, the noise "
                "level at which the second expert takes over. Give another --model."
            )
        space = pipe.vae_scale_factor_spatial
        time = pipe.vae_scale_factor_temporal
        unit = space * pipe.transformer.config.patch_size[1]
        self.height, self.width = self._size(unit, height or 480, width or 832)
        self.frames = self._length(time, frames or 53)
        length = (self.frames - 1) // time + 1
        size = self.height // space, self.width // space
        self.noise_shape = (pipe.vae.config.z_dim, length, *size)
        self.longest = min(512, pipe.tokenizer.model_max_length)  # tokens of a prompt

    def trained_at(self, sigma: float | torch.Tensor) -> str:
        """Return the name of the expert, for high noise or for low noise, that computes a sigma."""
        boundary = self.pipe.config.boundary_ratio
        if boundary is None:
            return "transformer"
        # in float32, as the pipeline compares: shift 3 puts a step exactly on the boundary
        timestep = float(torch.as_tensor(sigma, dtype=torch.float32) * 1000)
        return "transformer" if timestep >= boundary * 1000 else "transformer_2"

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return {"encoder_hidden_states": [S, D]}, zero after the caption's tokens."""
        text, _ = self.pipe.encode_prompt(
            caption, None, False, device=self.device, max_sequence_length=self.longest
        )
        return {"encoder_hidden_states": text[0]}

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        shape = self.longest, self.pipe.transformer.config.text_dim
        return {"encoder_hidden_states": torch.zeros(shape, dtype=self.dtype)}

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity, float32 and shaped like x [b, C, F', h, w].

        sigma is a scalar: one expert computes all rows.
        """
        expert = self.trained_at(sigma)
        scale = self.guidance if expert == "transformer" else self.guidance_2
        cond = dict(cond)
        if "still" in cond:
            x = torch.cat([x, cond.pop("still")], 1)
        # Wan2.2 TI2V's pipeline passes a timestep for each token, because given first frames have
        # no noise. In text to video all are equal, so one for each row gives the same result.
        timestep = of_rows(sigma, x) * 1000
        return self.guided(self.trainable[expert], scale, cond, hidden_states=x, timestep=timestep)

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode latents [b, *noise_shape] to clips [b, F, 3, H, W] in [0, 1], in vae.dtype."""
        vae = self.pipe.vae
        mean = torch.tensor(vae.config.latents_mean).to(x0)[:, None, None, None]
        std = torch.tensor(vae.config.latents_std).to(x0)[:, None, None, None]
        clips = vae.decode((x0 * std + mean).to(vae.dtype)).sample.float()
        return self.pipe.video_processor.postprocess_video(clips, output_type="pt")

    def save_lora(
        self, folder: str | Path, layers: dict[str, dict[str, torch.Tensor]], alpha: float
    ) -> None:
        """Save the first expert's LoRA in folder, the second's in folder/transformer_2.

        The second loads with load_lora_weights(..., load_into_transformer_2=True).
        """
        for name, weights in layers.items():
            place = folder if name == "transformer" else f"{folder}/{name}"
            self.pipe.save_lora_weights(
                place, save_function=lora_file.writer(alpha), transformer_lora_layers=weights
            )

    def load_lora(self, path: str | Path) -> dict[str, Path]:
        """Load the LoRA of each expert, from a folder like save_lora's if there are two.

        Returns {trained module: its file}.
        """
        files = super().load_lora(path)
        if "transformer_2" in self.trainable:
            second = lora_file.find(Path(path) / "transformer_2")
            self.pipe.load_lora_weights(str(second), load_into_transformer_2=True)
            files["transformer_2"] = second
        return files


class WanImageToVideo(Wan):
    """Run Wan with a conditioning image for each prompt.

    Prompt files have lines IMAGE <tab> CAPTION.
    """

    pipeline = WanImageToVideoPipeline
    encoders = ("text_encoder", "image_encoder")
    images = 1

    def embed(self, prompt: str) -> dict[str, torch.Tensor]:
        """Return {"encoder_hidden_states": [S, D], "still": [4 + C, F', h, w]}.

        "still" is the mask and the latents of the image. Wan 2.1 also has CLIP's embeddings of it.
        """
        _, still = self.pipe.prepare_latents(
            self._image(prompt),
            1,
            num_channels_latents=self.pipe.vae.config.z_dim,
            height=self.height,
            width=self.width,
            num_frames=self.frames,
            dtype=torch.float32,
            device=self.device,
        )
        cond = {**super().embed(prompt), "still": still[0]}
        if self.pipe.transformer.config.image_dim is not None:
            picture = read_image(image_of(prompt))
            cond["encoder_hidden_states_image"] = self.pipe.encode_image(picture, self.device)[0]
        return cond

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt and its image, {name: [...]}."""
        config = self.pipe.transformer.config
        channels, *shape = self.noise_shape
        still = torch.zeros(config.in_channels - channels, *shape)
        cond = {**super().blank(), "still": still}
        if config.image_dim is not None:
            clip = self.pipe.image_encoder.config
            tokens = (clip.image_size // clip.patch_size) ** 2 + 1
            image = torch.zeros(tokens, config.image_dim, dtype=self.dtype)
            cond["encoder_hidden_states_image"] = image
        return cond

    def still(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the conditioning images as still videos, [b, F, 3, H, W] in [0, 1]."""
        images = torch.cat([self._image(prompt) for prompt in prompts]) / 2 + 0.5
        return images[:, None].expand(-1, self.frames, -1, -1, -1)

    def _image(self, prompt: str) -> torch.Tensor:
        """Return the conditioning image of a prompt, [1, 3, H, W] in [-1, 1]."""
        picture = read_image(image_of(prompt))
        image = self.pipe.video_processor.preprocess(picture, height=self.height, width=self.width)
        return image.to(self.device, torch.float32)
