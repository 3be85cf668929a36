"""Stable Diffusion 1.x (diffusers' StableDiffusionPipeline) as a rectified flow.

The U-Net predicts the noise of z = a x0 + b eps with a^2 + b^2 = 1. A change of variables makes
this the interpolation of common/sde.py: with sigma = b / (a + b) and
h = sqrt((1 - sigma)^2 + sigma^2),

    x = h z = (1 - sigma) x0 + sigma eps,    a = (1 - sigma) / h,    b = sigma / h,
    velocity = eps - x0

The ODE step is then DDIM with eta = 0, `--sde ddim` is DDIM with eta (DDPO 2305.13301), and the
flow schedules work too."""

from pathlib import Path
from typing import Literal

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from common.errors import InputError
from common.models import lora_file
from common.models.family import Family


class StableDiffusion(Family):
    """Run Stable Diffusion 1.x: latents [b, C, H/8, W/8]."""

    pipeline = StableDiffusionPipeline
    trained = ("unet",)
    encoders = ("text_encoder", "image_encoder", "safety_checker")
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    lora_targets = r".*attn[12]\.(to_[qkv]|to_out\.0)"
    negative = True

    def __init__(
        self, pipe: StableDiffusionPipeline, height: int = 0, width: int = 0, **settings
    ) -> None:
        super().__init__(pipe, **settings)
        factor = pipe.vae_scale_factor
        own = pipe.unet.config.sample_size * factor
        self.height, self.width = self._size(8, height or own, width or own)
        size = self.height // factor, self.width // factor
        self.noise_shape = (pipe.unet.config.in_channels, *size)
        self.ddim = DDIMScheduler.from_config(pipe.scheduler.config)
        if self.ddim.config.prediction_type != "epsilon":
            raise InputError(
                f"model: the U-Net predicts {self.ddim.config.prediction_type!s:.60}. Supported is "
                "epsilon."
            )
        self.table = _sigma(self.ddim.alphas_cumprod.double())  # sigma of every training timestep
        self.last = _sigma(self.ddim.final_alpha_cumprod.double())  # sigma at which sampling ends

    def sigmas(self, steps: int, shift: float | Literal["scheduler"]) -> torch.Tensor:
        """Return the sigmas of DDIM's timesteps and the last one, [T+1].

        Raises InputError unless shift is 1 or "scheduler", which mean the same here.
        """
        if shift not in (1, "scheduler"):
            raise InputError(f"--shift {shift:g}: this model has its own schedule. Give --shift 1.")
        self.ddim.set_timesteps(steps)
        return torch.cat([self.table[self.ddim.timesteps], self.last[None]]).float()

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return {"encoder_hidden_states": [S, D]}."""
        text, _ = self.pipe.encode_prompt(caption, self.device, 1, False)
        return {"encoder_hidden_states": text[0]}

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros like the conditioning of one prompt, {name: [...]}."""
        shape = self.pipe.tokenizer.model_max_length, self.pipe.unet.config.cross_attention_dim
        return {"encoder_hidden_states": torch.zeros(shape, dtype=self.dtype)}

    def velocity(
        self, x: torch.Tensor, sigma: float | torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the velocity [b, C, h, w] float32 at x [b, C, h, w] and sigma, a scalar or [b]."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu().expand(len(x))
        # the timestep of the schedule with exactly this sigma
        timestep = (self.table - sigma[:, None]).abs().argmin(1).to(x.device)
        sigma = sigma.to(x)[:, None, None, None]
        h = torch.hypot(1 - sigma, sigma)
        inputs = {"sample": x / h, "timestep": timestep}
        noise = self.guided(self.trainable["unet"], self.guidance, cond, **inputs)
        return (noise - x) / (1 - sigma)  # eps - x0, with x0 = (x - sigma eps) / (1 - sigma)

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode latents [b, *noise_shape] to images [b, 3, H, W] in [0, 1], in the VAE's dtype."""
        vae = self.pipe.vae
        z = x0 / torch.hypot(1 - self.last, self.last).to(x0) / vae.config.scaling_factor
        images = vae.decode(z.to(vae.dtype)).sample.float()
        return self.pipe.image_processor.postprocess(images, output_type="pt")

    def save_lora(
        self, folder: str | Path, layers: dict[str, dict[str, torch.Tensor]], alpha: float
    ) -> None:
        """Save the LoRA for diffusers, and in folder/kohya with kohya's names for the weights.

        ComfyUI and older web interfaces read the latter.
        """
        from diffusers.utils import convert_state_dict_to_kohya
        from safetensors.torch import load_file

        super().save_lora(folder, layers, alpha)
        weights = load_file(Path(folder) / "pytorch_lora_weights.safetensors")
        weights = convert_state_dict_to_kohya(weights)
        (Path(folder) / "kohya").mkdir()
        lora_file.writer(alpha)(weights, Path(folder) / "kohya/lora.safetensors")


def _sigma(signal: torch.Tensor) -> torch.Tensor:
    """Return sigma = b / (a + b) for a^2."""
    return (1 - signal).sqrt() / (signal.sqrt() + (1 - signal).sqrt())
