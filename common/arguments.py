"""The command line that all scripts share. `python X.py --help` prints it with the defaults of the chosen --model."""

import dataclasses
import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from common import models
from common.errors import InputError


@dataclass
class Args:
    # --- What is trained, on what ---
    model: str = "tiny-flux"
    """A named model (tiny-flux, flux), the folder of a diffusers pipeline, or a hub id."""
    reward: tuple[str, ...] = ()
    """Rewards to train on, NAME or NAME=WEIGHT, several separated by spaces: verifier, jpeg."""
    prompts: str = ""
    """Text file with one prompt a line."""
    eval_prompts: str = ""
    """Text file with held-out prompts for --eval-every and --sample-every; none: neither happens."""
    height: int = 0
    """Height of the samples in pixels; 0: the model's own."""
    width: int = 0
    """Width of the samples in pixels; 0: the model's own."""

    # --- Rollout ---
    steps: int = 100
    """Training steps: rollout, reward, advantage, update."""
    prompts_per_step: int = 8
    """P: prompts of a step, over all processes."""
    group_size: int = 12
    """G: samples of each prompt."""
    sampling_steps: int = 16
    """T: denoising steps."""
    noise_level: float = 0.3
    """eta: scale of the noise that sampling adds. More explores more and blurs more."""
    sde: Literal["dance", "flow"] = "dance"
    """Noise schedule: DanceGRPO's constant, or Flow-GRPO's, which grows with sigma."""
    shift: float = 3.0
    """Shift of the sigmas: larger spends more steps at high noise."""
    guidance: float = 3.5
    """Guidance scale, the same in rollout and update."""
    same_noise: bool = False
    """Start all samples of a group from the same noise."""
    sde_window: int = 0
    """Add noise in this many consecutive steps only, a new random window each training step; 0: in all steps."""

    # --- Update ---
    timestep_fraction: float = 1.0
    """Share of the noisy denoising steps that an update trains on, drawn at random for each update."""
    best_of: int = 0
    """Train on the n/2 best and n/2 worst samples of each group; advantages still come from all G. 0: train on all."""
    updates_per_step: int = 1
    """Optimizer updates on each rollout."""
    micro_batch: int = 8
    """Rows of one forward pass, in rollout and update alike."""
    clip_range: float = 1e-4
    """The ratio is clipped to 1 +- this."""
    adv_clip_max: float = 5.0
    """Advantages are clamped to +- this."""
    learning_rate: float = 1e-5
    """AdamW's learning rate, constant."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    lora_rank: int = 0
    """Rank of the LoRA that is trained; 0: all weights are."""
    kl_coef: float = 0.0
    """Weight of the KL term against the initial weights; above 0 it costs a second forward pass."""

    # --- Run ---
    seed: int = 0
    """Everything random follows from it."""
    output: str = ""
    """Folder of the run; default: runs/SCRIPT-MODEL-N with the next free N."""
    resume: str = ""
    """`latest`, or the folder of a checkpoint of this run: go on from there."""
    save_every: int = 20
    """Steps between checkpoints; the last step always saves. 0: only the last."""
    sample_every: int = 20
    """Steps between grids of samples; 0: never."""
    eval_every: int = 20
    """Steps between evaluations on --eval-prompts; first and last step always. 0: never."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where the metrics go besides metrics.jsonl."""


# (field, smallest, largest); the smallest value itself is allowed "from" there, not "above"
_BOUNDS = {
    "from": [
        ("height", 0, 1e5),
        ("width", 0, 1e5),
        ("steps", 1, 1e9),
        ("prompts_per_step", 1, 1e6),
        ("group_size", 2, 1e5),
        ("sampling_steps", 2, 1000),
        ("guidance", 0, 1000),
        ("sde_window", 0, 1000),
        ("best_of", 0, 1e5),
        ("updates_per_step", 1, 1000),
        ("micro_batch", 1, 1e6),
        ("weight_decay", 0, 1),
        ("lora_rank", 0, 4096),
        ("kl_coef", 0, 1e6),
        ("seed", 0, 2**31),
        ("save_every", 0, 1e9),
        ("sample_every", 0, 1e9),
        ("eval_every", 0, 1e9),
    ],
    "above": [
        ("noise_level", 0, 10),
        ("shift", 0, 100),
        ("timestep_fraction", 0, 1),
        ("clip_range", 0, 1),
        ("adv_clip_max", 0, 1e6),
        ("learning_rate", 0, 1),
        ("max_grad_norm", 0, 1e6),
    ],
}


def defaults(cls, model="tiny-flux", **values):
    """cls with the settings of a named model, and `values` on top."""
    fields = {f.name for f in dataclasses.fields(cls)}
    table = {name: value for name, value in models.settings(model).items() if name in fields}
    return cls(**{"model": model, **table, **values})


def parse(cls, description):
    """The command line -> cls. The defaults are those of its --model; a lone `--resume` means `--resume latest`."""
    argv = sys.argv[1:]
    for i, word in enumerate(argv):
        if word == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            argv = [*argv[: i + 1], "latest", *argv[i + 1 :]]
    named = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--model"]
    named += [word.partition("=")[2] for word in argv if word.startswith("--model=")]
    return tyro.cli(cls, args=argv, default=defaults(cls, *named[-1:]), description=description)


def check(args):
    """Raises InputError for the first setting that makes no sense; only a hub id as --model asks the network."""
    for kind, bounds in _BOUNDS.items():
        for name, low, high in bounds:
            value, flag = getattr(args, name), "--" + name.replace("_", "-")
            if not (math.isfinite(value) and (low <= value if kind == "from" else low < value) and value <= high):
                raise InputError(f"{flag} {value}: must be {kind} {low:g} and at most {high:g}")
    if args.best_of % 2 or args.best_of > args.group_size:
        raise InputError(f"--best-of {args.best_of}: must be even and at most --group-size {args.group_size}")
    if args.sde_window > args.sampling_steps - 1:
        raise InputError(
            f"--sde-window {args.sde_window}: only {args.sampling_steps - 1} of {args.sampling_steps} steps can "
            "be noisy, the last never is"
        )
    if args.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("--tracker wandb: the package is missing; pip install wandb, or use --tracker tensorboard")
    if args.model not in models.MODELS:
        models.family(args.model)  # a wrong model would lack the next two as well
    for name in ("reward", "prompts"):
        if not getattr(args, name):
            raise InputError(f"--{name} is missing: --model {args.model} has no default for it")
