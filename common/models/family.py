"""The base class of all model families: encoding prompts, decoding in slices, guidance."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from common import errors, sde
from common.errors import InputError, LocalError
from common.models import lora_file
from common.models.assumed import Values
from common.prompts import caption_of, pictures

CURE = "download the whole model again, or give another --model"
# (divisor, remainder) of the numbers of tokens for which cuDNN's backward pass of attention with a
# mask gives NaN on H100 and H200 (pytorch issue 196678).
CUDNN_NAN = (128, 64)
# begins the names of a prompt's own embeddings that guidance leads away from
UNWANTED = "unwanted_"
KEPT = 2**30  # bytes of embeddings that are kept: 256 prompts of FLUX or Wan


def of_rows(
    value: float | torch.Tensor, x: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return a scalar or [b] as [b] on the device of x [b, ...].

    A scalar is filled in on the device: a copy from the CPU would wait until the GPU has finished.
    """
    value = torch.as_tensor(value)
    if value.ndim or value.device == x.device:
        return value.to(x.device, dtype).expand(len(x))
    return torch.full((len(x),), value.item(), dtype=dtype, device=x.device)


class Family:
    """Wrap a diffusers pipeline with the methods that GRPO needs.

    A family sets the class attributes and defines text (or embed), blank, velocity and pixels.

    height, width, frames: size of a sample, 0 for the model's default. guidance: scale of the
    guidance inside `velocity`; guidance_2: that of the second expert, 0 for the same.
    batched_guidance: compute both halves of classifier-free guidance in one forward pass.
    decode_batch: rows that the VAE decodes at once, 0 for all. offload_encoders: keep the text and
    image encoders on the CPU, and move them to the device for new prompts. Raises InputError for
    settings that the family does not support.
    """

    source = Path()  # the folder of the pipeline; models.load sets it
    pipeline = None  # the diffusers class
    trained = ("transformer",)  # names of the components that are trained
    encoders = ()  # names of the components that only `embed` needs
    lora_targets = ""  # regular expression of the layers that a LoRA adapts
    blocks = ()  # names of the classes of the blocks, which sharding wraps one by one
    video = False  # whether samples are clips
    vae_dtype = None  # dtype of the VAE if it differs from the other components'
    left_out = ()  # components that a folder may lack although the pipeline's signature has them
    images = 0  # how many a prompt comes with, at most
    sources = 1  # images of each prompt, for counting memory
    negative = False  # whether guidance is classifier-free, against the empty prompt

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
        self.pipe = pipe
        self.guidance = guidance
        self.guidance_2 = guidance_2 or guidance
        self.batched_guidance = batched_guidance
        self.decode_batch = decode_batch
        self.offload_encoders = offload_encoders
        self.embedded = {}  # {prompt: {name: [...]}} on the CPU, used last at the end
        self.unwanted = {}  # embedding of the empty prompt, on the device
        modules = {name: getattr(pipe, name, None) for name in self.trained}
        self.trainable = {name: module for name, module in modules.items() if module is not None}
        self._check_settings(frames, guidance_2)

    def _check_settings(self, frames: int, guidance_2: float) -> None:
        kind = type(self.pipe).__name__
        if frames and not self.video:
            raise InputError(f"--frames {frames}: a {kind} makes images. Leave it out.")
        if guidance_2 and len(self.trainable) < 2:
            raise InputError(
                f"--guidance-2 {guidance_2:g}: it is for the second expert, and this model has "
                "one. Leave it out."
            )
        for flag, scale in (("--guidance", self.guidance), ("--guidance-2", self.guidance_2)):
            if self.negative and scale < 1:
                raise InputError(
                    f"{flag} {scale:g}: below 1 samples follow the prompt less than without "
                    "guidance, which is 1. Give 1 or more."
                )
        if self.batched_guidance and not self.negative:
            raise InputError(
                f"--batched-guidance: a {kind} takes its guidance as an input, in a single pass. "
                "Leave it out."
            )

    @classmethod
    def task(cls) -> str:
        """Return the task in the hub's words: text-to-image, and so on."""
        return f"{'image' if cls.images else 'text'}-to-{'video' if cls.video else 'image'}"

    @classmethod
    def assumed(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
        """Return what velocity and pixels assume of the configurations, {part: {name: values}}.

        configs: the folder's, {part: configuration}. A folder that has another value is refused.
        """
        return {}

    @classmethod
    def check(cls, prompts: Sequence[str]) -> None:
        """Raise InputError for the first prompt that this family cannot take."""
        pictures.check(prompts, cls.images)

    @property
    def device(self) -> torch.device:
        """Return the device of samples and conditioning."""
        return self.pipe.vae.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the text encoders' outputs."""
        return self.pipe.text_encoder.dtype

    def sigmas(self, steps: int, shift: float | Literal["scheduler"]) -> torch.Tensor:
        """Return the sigmas [T+1] that sampling visits, float32, from 1 (noise) to 0.

        shift: as for sde.shifted_sigmas, or "scheduler" for the sigmas that the model's own
        pipeline visits. Raises InputError if the scheduler has no such sigmas.
        """
        if shift != "scheduler":
            return sde.shifted_sigmas(steps, shift)
        with errors.loading("model", self.source / "scheduler", do="give --shift a number"):
            scheduler = copy.deepcopy(self.pipe.scheduler)
            scheduler.set_timesteps(**self.schedule(steps))
            sigmas = scheduler.sigmas.float()
            falls = (sigmas.diff() < 0).all() and sigmas[0] <= 1 and sigmas[-1] == 0
            if len(sigmas) != steps + 1 or not falls:
                raise ValueError(
                    f"the sigmas of {type(scheduler).__name__} are not {steps + 1} falling from "
                    "1 to 0"
                )
        return sigmas

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what the pipeline's __call__ passes to its scheduler's set_timesteps."""
        return {"num_inference_steps": steps}

    def dynamic_shift(self, tokens: int) -> float:
        """Return mu, the shift of a scheduler with dynamic shifting for a number of tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipe.scheduler.config
        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def trained_at(self, sigma: float | torch.Tensor) -> str:
        """Return the name of the trained module that computes the velocity at a sigma."""
        return next(iter(self.trainable))

    def cudnn_serves(self) -> bool:
        """Return whether cuDNN's attention serves rollout and update alike.

        torch prefers it on H100, H200 and B200. If it served only one of the two, rollout and
        update would use different kernels, which round differently.
        """
        return True

    def learns(self, name: str) -> bool:
        """Return whether gradients reach a weight of a trained module.

        DistributedDataParallel would wait forever for the gradient of another weight.
        """
        return True

    # --- Conditioning ---

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], ahead: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Return the conditioning of b prompts, {name: [b, ...]}, on the device.

        Embeddings are kept on the CPU; the least recently used are dropped first. ahead: prompts
        that will be needed soon. With --offload-encoders they are embedded now as well, as far as
        the cache has room.
        """
        with errors.phase("the text encoders", memory="add --offload-encoders"):
            asked = list(dict.fromkeys(prompts))
            if any(prompt not in self.embedded for prompt in asked):
                self._embed(asked, ahead)
            for prompt in asked:  # used last
                self.embedded[prompt] = self.embedded.pop(prompt)
            for prompt in list(self.embedded)[: -self._room(asked)]:
                del self.embedded[prompt]
            rows = {prompt: self._to_device(self.embedded[prompt]) for prompt in asked}
            return {
                name: torch.stack([rows[prompt][name] for prompt in prompts])
                for name in rows[asked[0]]
            }

    def _embed(self, asked: Sequence[str], ahead: Sequence[str]) -> None:
        """Embed the new prompts of `asked`, and with offloaded encoders also those of `ahead`."""
        from diffusers.training_utils import offload_models

        modules = [getattr(self.pipe, name) for name in self.encoders]
        modules = [module for module in modules if module is not None]
        visit = offload_models(*modules, device=self.device, offload=self.offload_encoders)
        with visit, self._no_autocast():
            for prompt in asked:  # one by one: an embedding must not depend on its neighbours
                if prompt not in self.embedded:
                    self.embedded[prompt] = self._to_cpu(self.embed(prompt))
            if self.negative and not self.unwanted:
                self.unwanted = self._to_device(self.embed_nothing())
            if not self.offload_encoders:
                return
            for prompt in ahead[: self._room(asked) - len(asked)]:
                embedding = self.embedded.pop(prompt, None)
                self.embedded[prompt] = embedding or self._to_cpu(self.embed(prompt))

    def embed(self, prompt: str) -> dict[str, torch.Tensor]:
        """Return the conditioning of one prompt, {name: [...]} without the batch dimension."""
        return self.text(caption_of(prompt))

    def embed_nothing(self) -> dict[str, torch.Tensor]:
        """Return what guidance leads away from, {name: [...]}; {} if each prompt has its own.

        A prompt's own are the entries of `embed` whose names begin with UNWANTED.
        """
        return self.text("")

    def _room(self, asked: Sequence[str]) -> int:
        """Return the number of embeddings to keep, at least that of `asked`."""
        size = sum(value.nbytes for value in self.embedded[asked[0]].values())
        return max(len(asked), KEPT // size)

    def _to_cpu(self, embedding: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return an embedding on the CPU, in pinned memory. 50,000 of them would fill any GPU."""
        embedding = {name: value.cpu() for name, value in embedding.items()}
        if self.device.type == "cuda":
            embedding = {name: value.pin_memory() for name, value in embedding.items()}
        return embedding

    def _to_device(self, embedding: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in embedding.items()}

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast("cuda" if self.device.type == "cuda" else "cpu", enabled=False)

    # --- Decoding ---

    @torch.no_grad()
    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode x0 [b, *noise_shape] to images [b, 3, H, W] or clips [b, F, 3, H, W] in [0, 1].

        The VAE computes in its own dtype, under autocast too.
        """
        memory = "lower --decode-batch or the size of the samples (--height, --width, --frames)"
        size = self.decode_batch or len(x0)
        with errors.phase("the VAE", memory=memory), self._no_autocast():
            media = None
            for start in range(0, len(x0), size):
                pixels = self.pixels(x0[start : start + size])
                if media is None:  # filled in place: concatenation would hold all parts twice
                    media = pixels.new_empty(len(x0), *pixels.shape[1:])
                media[start : start + size] = pixels
            return media

    # --- The smoke test ---

    @torch.no_grad()
    def try_out(self, prompt: str) -> torch.Tensor:
        """Return a decoded sample [1, ...] of zeros after forward passes at two noise levels.

        With two experts both compute. Raises InputError if parts do not fit together or a result is
        not finite, LocalError if the memory is not enough.
        """
        memory = "lower the size of the samples (--height, --width, --frames)"
        try:
            cond = self.encode([prompt])
            with errors.phase("a forward pass", memory=memory):
                x = torch.zeros(1, *self.noise_shape, device=self.device)
                found = [self.velocity(x, torch.tensor(sigma), cond) for sigma in (0.97, 0.03)]
            found.append(self.decode(x))
        except LocalError as error:
            if errors.out_of_memory(error.__cause__):
                raise
            raise InputError(f"model {self.source}: {error}; {CURE}.") from error.__cause__
        if not all(media.isfinite().all() for media in found):
            raise InputError(
                f"model {self.source}: its results are not finite{self._not_finite()}; {CURE}."
            )
        return found[-1]

    def _not_finite(self) -> str:
        """Return the name of the first weight that is not finite, "" if all are finite."""
        for name, part in self.pipe.components.items():
            for key, weight in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
                if not weight.isfinite().all():
                    return f", nor is {key} of its {name}"
        return ""

    # --- Guidance ---

    def guided(
        self, module: Callable, scale: float, cond: dict[str, torch.Tensor], **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity [b, ...] with classifier-free guidance, against the empty prompt.

        module(**inputs, **cond) computes it; inputs and cond are {name: [b, ...]}. The empty
        prompt's conditioning is that of `embed_nothing`, or a part of cond. A scale of 1 takes one
        forward pass, others two, or one of twice the rows with --batched-guidance.
        """
        unwanted = {n.removeprefix(UNWANTED): v for n, v in cond.items() if n.startswith(UNWANTED)}
        cond = {name: value for name, value in cond.items() if not name.startswith(UNWANTED)}
        if scale == 1:
            return module(**inputs, **cond, return_dict=False)[0].float()
        b = len(next(iter(inputs.values())))
        shared = {name: value.expand(b, *value.shape) for name, value in self.unwanted.items()}
        unwanted = {**cond, **shared, **unwanted}
        if self.batched_guidance:
            twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
            both = {name: torch.cat([value, unwanted[name]]) for name, value in cond.items()}
            towards, away = module(**twice, **both, return_dict=False)[0].float().chunk(2)
        else:
            towards = module(**inputs, **cond, return_dict=False)[0].float()
            away = module(**inputs, **unwanted, return_dict=False)[0].float()
        return self.extrapolate(towards, away, scale)

    def extrapolate(self, towards: torch.Tensor, away: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the guided velocity [b, ...] of those with and without the prompt."""
        return away + scale * (towards - away)

    # --- Sizes ---

    def resized(self, height: int, width: int) -> "Family":
        """Return this model with samples of another height and width in pixels, 0 for its own.

        Both models share the trained weights. Raises InputError for a size that the model does not
        support.
        """
        settings = {
            "height": height or self.height,
            "width": width or self.width,
            "guidance": self.guidance,
            "batched_guidance": self.batched_guidance,
            "decode_batch": self.decode_batch,
            "offload_encoders": self.offload_encoders,
        }
        if self.video:
            settings["frames"] = self.frames
        if len(self.trainable) > 1:
            settings["guidance_2"] = self.guidance_2
        other = type(self)(self.pipe, **settings)
        other.trainable = self.trainable
        other.source = self.source
        return other

    def _size(self, unit: int, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) in pixels. Raises InputError unless both are multiples of unit."""
        if height % unit or width % unit or not height or not width:
            raise InputError(
                f"--height {height} --width {width}: both must be multiples of {unit} for this "
                "model."
            )
        return height, width

    def _length(self, factor: int, frames: int) -> int:
        """Return the number of frames. Raises InputError unless it is n * factor + 1."""
        if frames % factor != 1:
            raise InputError(
                f"--frames {frames}: must be one more than a multiple of {factor} for this model."
            )
        return frames

    # --- LoRA files ---

    def save_lora(
        self, folder: str | Path, layers: dict[str, dict[str, torch.Tensor]], alpha: float
    ) -> None:
        """Save LoRA weights, {trained module: weights}, for the pipeline's load_lora_weights.

        alpha: that of the training, kept in the file for --init-lora. The weights already contain
        the factor alpha / rank.
        """
        layers = {f"{name}_lora_layers": weights for name, weights in layers.items()}
        self.pipe.save_lora_weights(folder, save_function=lora_file.writer(alpha), **layers)

    def load_lora(self, path: str | Path) -> dict[str, Path]:
        """Load a LoRA from a file or folder, with the pipeline's load_lora_weights.

        Returns {trained module: its file}.
        """
        file = lora_file.find(path)
        self.pipe.load_lora_weights(str(file))
        return {next(iter(self.trainable)): file}
