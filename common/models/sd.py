"""Stable Diffusion 1.x (diffusers' StableDiffusionPipeline) as a rectified flow.

The U-Net predicts the noise of z = a x0 + b eps with a^2 + b^2 = 1. A change of variables makes
this the interpolation of common/sde.py: with sigma = b / (a + b) and
h = sqrt((1 - sigma)^2 + sigma^2),

    x = h z = (1 - sigma) x0 + sigma eps,    a = (1 - sigma) / h,    b = sigma / h,
    velocity = eps - x0

The ODE step is then DDIM with eta = 0, `--sde ddim` is DDIM with eta (DDPO 2305.13301), and the
flow schedules work too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from common.errors import InputError
from common.models import lora_file
from common.models.assumed import Values
from common.models.family import Family, of_rows

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")  # the schedules that DDIM knows


class StableDiffusion(Family):
    """Run Stable Diffusion 1.x: latents [b, C, H/8, W/8]."""

    pipeline = StableDiffusionPipeline
    trained = ("unet",)
    encoders = ("text_encoder", "image_encoder", "safety_checker")
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    lora_targets = r".*attn[12]\.(to_[qkv]|to_out\.0)"
    negative = True

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what is assumed of a folder.

        Inpainting U-Nets have more inputs, latent consistency models an embedding of the guidance.
        """
        scheduler = configs["scheduler"]
        betas = {"beta_start": float, "beta_end": float, "beta_schedule": BETAS}
        if scheduler.get("trained_betas"):
            betas = {"trained_betas": list}
        channels = configs["vae"].get("latent_channels")
        return {
            "scheduler": {
                **betas,
                "num_train_timesteps": int,
                "prediction_type": (None, "epsilon"),  # the default of all schedulers with betas
                "timestep_type": (None, "discrete"),
                "use_flow_sigmas": (None, False),
                "thresholding": (None, False),
            },
            "unet": {
                "in_channels": (channels,),
                "out_channels": (None, channels),
                "sample_size": int,
                "time_cond_proj_dim": (None,),
                "class_embed_type": (None,),
                "num_class_embeds": (None,),
                "addition_embed_type": (None,),
                "encoder_hid_dim_type": (None,),
            },
            "vae": {"latent_channels": int},
        }

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
        self.table = _sigma(self.ddim.alphas_cumprod.double())  # sigma of every training timestep
        self.last = _sigma(self.ddim.final_alpha_cumprod.double())  # sigma at which sampling ends
        self.sigmas(2, 1.0)  # refuses a schedule without a first step

    def sigmas(self, steps: int, shift: float | Literal["scheduler"]) -> torch.Tensor:
        """Return the sigmas of DDIM's timesteps and the last one, [T+1].

        Raises InputError unless shift is 1 or "scheduler", which mean the same here.
        """
        if shift not in (1, "scheduler"):
            raise InputError(f"--shift {shift:g}: this model has its own schedule. Give --shift 1.")
        self.ddim.set_timesteps(steps)
        sigmas = torch.cat([self.table[self.ddim.timesteps], self.last[None]]).float()
        if sigmas[0] == 1:
            config = self.ddim.config
            raise InputError(
                "model: its scheduler_config.json starts at pure noise (timestep_spacing "
                f"{config.timestep_spacing}, rescale_betas_zero_snr "
                f"{config.rescale_betas_zero_snr}), where a U-Net that predicts the noise says "
                "nothing about the image. Set rescale_betas_zero_snr to false there, or "
                "timestep_spacing to leading."
            )
        return sigmas

    def cudnn_serves(self) -> bool:
        """Return False: cuDNN serves heads of 160 in a forward pass without gradients only."""
        return False

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
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu()
        # the timestep of the schedule with exactly this sigma
        timestep = (self.table - sigma[..., None]).abs().argmin(-1)
        sigma = of_rows(sigma, x, x.dtype)[:, None, None, None]
        h = torch.hypot(1 - sigma, sigma)
        inputs = {"sample": x / h, "timestep": of_rows(timestep, x, torch.int64)}
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
