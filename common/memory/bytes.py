"""Bytes that one process of a training run needs, by kind, counted from shapes alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from common.args import Args
from common.models.family import Family

# Kinds that are on the host between passes when sharded weights are offloaded.
ON_THE_HOST = ("trained weights", "frozen weights", "gradients", "optimizer")


@dataclass(frozen=True)
class Launch:
    """How the processes were launched."""

    dtype: torch.dtype
    """Data type of the forward pass and of frozen weights."""
    device: str
    """"cuda" or "cpu"."""
    world: int = 1
    """Number of processes."""
    per_machine: int = 1
    """Processes of each machine; all of them when machines differ."""
    sharded: bool = False
    """Whether the launcher asked for FSDP2."""
    checkpointing: bool = False
    """Whether its configuration asks for gradient checkpointing."""
    offloads: bool = False
    """Whether its shards are on the CPU between passes."""


def process_bytes(
    model: Family,
    args: Args,
    launch: Launch,
    shards: int = 1,
    keep_initial: bool = False,
    activations: int = 0,
    rewards: int = 0,
) -> dict[str, float]:
    """Return the bytes of one process on its device, {kind: bytes}.

    model: with its LoRA, if one is trained; weights that are not trained do not require gradients.
    shards: processes that share one copy of the weights; 1 means data parallelism.
    keep_initial: whether a copy of the initial weights is kept.
    activations: bytes of one pass; rewards: bytes of the reward models.
    """
    precision = launch.dtype.itemsize
    kinds = weight_bytes(model, args, precision, shards=shards, keep_initial=keep_initial)
    if launch.world > 1 and shards == 1:
        kinds["gradients"] *= 2  # data parallelism copies them into buckets
    if launch.offloads:
        kinds.update(dict.fromkeys(ON_THE_HOST, 0))

    others = 0
    waiting = 0
    for name, module in modules(model):
        if name in model.trainable:
            continue
        if args.offload_encoders and name in model.encoders:
            waiting += precision * number(module)
        else:
            others += precision * number(module)
    kinds["encoders, VAE"] = others
    kinds["rewards"] = rewards
    # Offloaded encoders visit the device while no activations exist.
    kinds["activations"] = max(activations, waiting)
    kinds.update(sample_bytes(model, args, max(launch.world, shards)))
    return kinds


def weight_bytes(
    model: Family, args: Args, precision: int, shards: int = 1, keep_initial: bool = False
) -> dict[str, float]:
    """Return the bytes of what is trained: weights, gradients, optimizer, EMA, {kind: bytes}.

    precision: bytes of one weight in the forward pass. Trained weights are float32.
    """
    total = sum(number(module) for module in model.trainable.values())
    trained = trained_number(model)
    master = 4 * trained / shards
    frozen = 0
    if args.lora_rank:
        frozen = precision * (total - trained) / shards
        if keep_initial and args.init_lora:
            frozen += master  # the copy of the initial LoRA
    elif keep_initial:
        frozen = precision * total / shards
    whole_gradients = shards == 1 or not args.exchange_often
    return {
        "trained weights": master,
        "frozen weights": frozen,
        "gradients": 4 * trained if whole_gradients else master,
        "optimizer": 2 * master,
        "average": master if args.ema else 0,
        "weights of a pass": _pass_bytes(model, precision, shards, lora=bool(args.lora_rank)),
    }


def _pass_bytes(model: Family, precision: int, shards: int, lora: bool) -> int:
    """Return the bytes of the weights that exist only during a pass.

    Sharded: two whole blocks (the current and the next), and the gradients of one.
    Else: the copy of the trained weights that autocast makes in another precision.
    """
    if shards == 1:
        return precision * trained_number(model) if precision < 4 else 0
    sizes = [0]
    for module in model.trainable.values():
        for part in module.modules():
            if type(part).__name__ in model.blocks:
                sizes.append(number(part))
    gradients = 0 if lora else 4
    return (2 * precision + gradients) * max(sizes)


def sample_bytes(model: Family, args: Args, world: int = 1) -> dict[str, float]:
    """Return the bytes of one process's samples, {kind: bytes}.

    These are the latents of all denoising steps, their conditioning, and the pixels of a pass.
    """
    rows = args.prompts_per_step * args.group_size / world
    pixels = 3 * model.height * model.width * getattr(model, "frames", 1)
    return {
        "latents": 4 * rows * (args.sampling_steps + 1) * math.prod(model.noise_shape),
        "conditioning": rows * sum(value.nbytes for value in model.blank().values()),
        "pixels": 4 * min(args.micro_batch, rows) * pixels,
    }


def reward_modules(scorers: Iterable) -> list[torch.nn.Module]:
    """Return the modules of all scorers, each once; those of an in-process judge are included."""
    found = {}
    for scorer in scorers:
        for owner in (scorer, *_attributes(scorer)):
            for part in (owner, *_attributes(owner)):
                if isinstance(part, torch.nn.Module):
                    found[id(part)] = part
    inner = {id(part) for module in found.values() for part in list(module.modules())[1:]}
    return [module for key, module in found.items() if key not in inner]


def _attributes(thing: Any) -> list:
    return list(vars(thing).values()) if hasattr(thing, "__dict__") else []


def modules(model: Family) -> list[tuple[str, torch.nn.Module]]:
    """Return [(name, module)] of the pipeline's components that have weights."""
    components = model.pipe.components.items()
    return [(name, part) for name, part in components if isinstance(part, torch.nn.Module)]


def trained_number(model: Family) -> int:
    """Return the number of weights that are trained."""
    found = 0
    for module in model.trainable.values():
        found += sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    return found


def number(module: torch.nn.Module) -> int:
    """Return the number of a module's weights."""
    return sum(weight.numel() for weight in module.parameters())
