"""What the families of models have in common: embeddings computed once, decoding in slices, one
trained module."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common import sde
from common.errors import InputError, of_the_machine, text
from common.models import pictures
from common.models.embeddings import Embeddings

CURE = "download the whole model again, or give another --model"


class Family(Embeddings):
    """A diffusers pipeline as GRPO sees it. A family states the class attributes and defines embed,
    velocity, pixels.

    height, width, frames: of a sample; 0: the model's own. guidance: the scale, inside `velocity`;
    guidance_2: of the second expert where there is one, 0: the same. batched_guidance: both halves
    of classifier-free guidance in one forward pass. decode_batch: rows that the VAE decodes at
    once, 0: all. offload_encoders: text and image encoders wait on the CPU between prompts. Raises
    InputError for what the family cannot do."""

    source = "it"  # its folder, in what it says
    pipeline = None  # the diffusers class
    trained = ("transformer",)  # components that are trained
    encoders = ()  # components that only `embed` needs
    lora_targets = ""  # regular expression of the layers that a LoRA adapts
    blocks = ()  # classes of the blocks, which sharding wraps one by one
    video = False  # makes clips
    vae_dtype = None  # of the VAE, where it is not that of all others
    # components that its folder may lack, though the pipeline's signature does not say so
    left_out = ()
    images = False  # each prompt comes with a conditioning image
    negative = False  # guidance is classifier-free, against the empty prompt

    def __init__(
        self,
        pipe: Any,
        height: int = 0,
        width: int = 0,
        frames: int = 0,
        guidance: float = 1.0,
        guidance_2: float = 0.0,
        batched_guidance: bool = False,
        decode_batch: int = 0,
        offload_encoders: bool = False,
    ) -> None:
        self.pipe, self.guidance, self.guidance_2 = pipe, guidance, guidance_2 or guidance
        self.batched_guidance, self.decode_batch = batched_guidance, decode_batch
        self.offload_encoders = offload_encoders
        self.trainable = {
            name: getattr(pipe, name)
            for name in self.trained
            if getattr(pipe, name, None) is not None
        }
        self.embedded, self.unwanted = {}, {}
        if frames and not self.video:
            raise InputError(f"--frames has no meaning: {type(pipe).__name__} makes images")
        if guidance_2 and len(self.trainable) < 2:
            raise InputError(
                "--guidance-2 belongs to a model with two experts, and this one has one"
            )
        for flag, scale in (("--guidance", guidance), ("--guidance-2", self.guidance_2)):
            if self.negative and scale < 1:
                raise InputError(
                    f"{flag} {scale:g}: below 1 it follows the prompt less than with none, which "
                    "is 1"
                )
        if batched_guidance and not self.negative:
            raise InputError(
                f"--batched-guidance has no meaning: {type(pipe).__name__} takes its guidance as "
                "an input"
            )

    @classmethod
    def task(cls) -> str:
        """In the hub's words: text-to-image, and so on."""
        return f"{'image' if cls.images else 'text'}-to-{'video' if cls.video else 'image'}"

    @classmethod
    def check(cls, prompts: Sequence[str]) -> None:
        """Raises InputError for the first prompt that this family cannot take. The first images are
        read to their end, once; of tens of thousands it would take minutes, so of the others only
        whether they are there."""
        pictures.check(cls, prompts)

    @torch.no_grad()
    def try_out(self, prompt: str) -> torch.Tensor:
        """A sample of noise, decoded, [1, ...], once the model has computed with it at two noise
        levels, in both experts. Raises InputError where its parts do not fit together, or what
        comes out is no number."""
        try:
            cond, x = self.encode([prompt]), torch.zeros(1, *self.noise_shape, device=self.device)
            found = [self.velocity(x, torch.tensor(sigma), cond) for sigma in (0.97, 0.03)]
            found.append(self.decode(x))
        except (
            Exception
        ) as error:  # a configuration of another size, a tokenizer without a length, ...
            if of_the_machine(error):
                raise
            raise InputError(f"model: {self.source} does not work: {text(error)}; {CURE}") from None
        if not all(media.isfinite().all() for media in found):
            raise InputError(
                f"model: {self.source} computes no numbers{self._not_finite()}; {CURE}"
            )
        return found[-1]

    def _not_finite(self) -> str:
        for name, part in self.pipe.components.items():
            for key, weight in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
                if not weight.isfinite().all():
                    return f", as {key} of its {name} holds none: it is broken, or was saved after training diverged"
        return f" in {self.pipe.dtype}, though all its weights are numbers"

    @property
    def device(self) -> torch.device:
        """Where samples and conditioning are."""
        return self.pipe.vae.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what the text encoders give."""
        return self.pipe.text_encoder.dtype

    def sigmas(self, steps: int, shift: float) -> torch.Tensor:
        """The sigmas [T+1] that sampling visits, 1 (noise) first."""
        return sde.shifted_sigmas(steps, shift)

    def trained_at(self, sigma: float | torch.Tensor) -> str:
        """Name of the trained module that computes the velocity at a sigma."""
        return next(iter(self.trainable))

    def learns(self, name: str) -> bool:
        """Whether gradients reach a weight of a trained module: DDP would wait for one that gets
        none."""
        return True

    @torch.no_grad()
    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """x0 [b, *noise_shape] -> images [b, 3, H, W] or clips [b, F, 3, H, W], in [0, 1]; in the
        VAE's own dtype"""
        size = self.decode_batch or len(x0)
        for start in range(0, len(x0), size):
            with self._no_autocast():  # the initial weights sample under it
                pixels = self.pixels(x0[start : start + size])
            if not start:  # in place: to join the parts would hold them twice
                media = pixels.new_empty(len(x0), *pixels.shape[1:])
            media[start : start + size] = pixels
        return media

    def guided(
        self, module: Callable, scale: float, cond: dict[str, torch.Tensor], **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Classifier-free guidance: module(**inputs, **cond), each {name: [b, ...]}, led away from
        the empty prompt. One forward pass for a scale of 1, else two, or one of twice the rows with
        --batched-guidance."""
        if scale == 1:
            return module(**inputs, **cond, return_dict=False)[0].float()
        b = len(next(iter(inputs.values())))
        unwanted = {
            **cond,
            **{name: value.expand(b, *value.shape) for name, value in self.unwanted.items()},
        }
        if self.batched_guidance:
            twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
            both = {name: torch.cat([value, unwanted[name]]) for name, value in cond.items()}
            towards, away = module(**twice, **both, return_dict=False)[0].float().chunk(2)
        else:
            towards = module(**inputs, **cond, return_dict=False)[0].float()
            away = module(**inputs, **unwanted, return_dict=False)[0].float()
        return self.led(towards, away, scale)

    def led(self, towards: torch.Tensor, away: torch.Tensor, scale: float) -> torch.Tensor:
        """Two velocities [b, ...] -> the guided one [b, ...]."""
        return away + scale * (towards - away)

    def _size(self, unit: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels, once they are known to be multiples of `unit`."""
        if height % unit or width % unit or not height or not width:
            raise InputError(
                f"--height and --width must be multiples of {unit} for this model, not "
                f"{height}x{width}"
            )
        return height, width

    def _length(self, factor: int, frames: int) -> int:
        """The number of frames, once it is known to be one more than a multiple of `factor`."""
        if frames % factor != 1:
            raise InputError(
                f"--frames must be one more than a multiple of {factor} for this model, not "
                f"{frames}"
            )
        return frames

    def save_lora(self, folder: str | Path, layers: dict[str, dict[str, torch.Tensor]]) -> None:
        """layers {trained module: its LoRA's weights} -> files that the pipeline's
        load_lora_weights reads."""
        self.pipe.save_lora_weights(
            folder, **{f"{name}_lora_layers": weights for name, weights in layers.items()}
        )

    def load_lora(self, folder: str | Path) -> None:
        """The reverse, as a user of the plain pipeline does it."""
        self.pipe.load_lora_weights(folder)
