"""Bytes that one process of a training run needs, by kind, counted from shapes alone."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from common.args import Args, score_batch
from common.models import eight_bits
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


# Bytes of a step's latents above which they are in the host's memory, as those of clips are.
# Copying two of them for each row of a pass takes a thousandth of the pass's time.
LARGE_LATENTS = 2**30
# Kinds of memory that are needed one after another, not together.
MOMENTS = (
    ("weights of a pass", "activations"),
    ("encoders for new prompts",),
    ("decoding", "pixels"),
)


def process_bytes(
    model: Family,
    args: Args,
    launch: Launch,
    shards: int = 1,
    keep_initial: bool = False,
    activations: int = 0,
    decoding: int = 0,
    rewards: int = 0,
) -> dict[str, float]:
    """Return the bytes of one process on its device, {kind: bytes}. `total` adds them up.

    model: with its LoRA, if one is trained; weights that are not trained do not require gradients.
    shards: processes that share one copy of the weights; 1 means data parallelism, or one process.
    keep_initial: whether a copy of the initial weights is kept.
    activations: bytes of one pass; decoding: bytes of decoding one row; rewards: bytes of the
    reward models.
    """
    precision = launch.dtype.itemsize
    sharded = launch.sharded or shards > 1
    kinds = weight_bytes(
        model, args, precision, shards=shards, sharded=sharded, keep_initial=keep_initial
    )
    if launch.world > 1 and not sharded:
        kinds["gradients"] *= 2  # data parallelism copies them into buckets
    if launch.offloads:
        kinds.update(dict.fromkeys(ON_THE_HOST, 0))

    if args.frozen_8bit:
        layers = itertools.chain.from_iterable(eight_bits.blocks_of(model))
        kinds["frozen weights"] -= eight_bits.saved_bytes(layers, precision)
        kinds["weights of a pass"] += eight_bits.cast_up_bytes(model, precision)
    others = 0
    waiting = 0
    for name, module in modules(model):
        if name in model.trainable:
            continue
        if args.offload_encoders and name in model.encoders:
            waiting += module_bytes(module)
        else:
            others += module_bytes(module)
    if args.frozen_8bit:
        saved = eight_bits.saved_bytes(eight_bits.encoders_layers(model), precision)
        if args.offload_encoders:
            waiting -= saved
        else:
            others -= saved
    kinds["encoders, VAE"] = others
    kinds["rewards"] = rewards
    kinds["activations"] = activations
    kinds["encoders for new prompts"] = waiting
    kinds["decoding"] = decoding * args.decode_batch
    kinds.update(sample_bytes(model, args, launch, shards))
    return kinds


def total(kinds: dict[str, float]) -> float:
    """Return the bytes of all kinds at the moment that needs the most."""
    return sum(at_once(kinds).values())


def at_once(kinds: dict[str, float]) -> dict[str, float]:
    """Return {kind: bytes} of what exists at the moment that needs the most."""
    largest = max(MOMENTS, key=lambda names: sum(kinds[name] for name in names))
    return at_moment(kinds, largest)


def at_pass(kinds: dict[str, float]) -> float:
    """Return the bytes of all kinds during a pass of the update."""
    return sum(at_moment(kinds, MOMENTS[0]).values())


def at_moment(kinds: dict[str, float], moment: tuple[str, ...]) -> dict[str, float]:
    """Return {kind: bytes} of what exists at one of MOMENTS."""
    others = {name for names in MOMENTS for name in names} - set(moment)
    return {name: size for name, size in kinds.items() if name not in others}


def weight_bytes(
    model: Family,
    args: Args,
    precision: int,
    shards: int = 1,
    sharded: bool = False,
    keep_initial: bool = False,
) -> dict[str, float]:
    """Return the bytes of what is trained: weights, gradients, optimizer, EMA, {kind: bytes}.

    precision: bytes of one weight in the forward pass. Trained weights are float32. sharded:
    whether the weights are gathered block by block, as one process with offloaded weights does too.
    """
    every = sum(number(module) for module in model.trainable.values())
    trained = trained_number(model)
    master = 4 * trained / shards
    frozen = 0
    if args.lora_rank:
        frozen = precision * (every - trained) / shards
        if keep_initial and args.init_lora:
            frozen += master  # the copy of the initial LoRA
    elif keep_initial:
        frozen = precision * every / shards
    whole_gradients = not sharded or not args.exchange_often
    pass_bytes = precision * trained if precision < 4 else 0  # autocast's copies
    if sharded:
        pass_bytes = _gathered_bytes(model, precision, lora=bool(args.lora_rank))
    return {
        "trained weights": master,
        "frozen weights": frozen,
        "gradients": 4 * trained if whole_gradients else master,
        "optimizer": 2 * master,
        "average": master if args.ema else 0,
        "weights of a pass": pass_bytes,
    }


def _gathered_bytes(model: Family, precision: int, lora: bool) -> int:
    """Return the bytes of the sharded weights that are whole at one moment of a pass.

    These are two blocks (the current and the next) and the weights outside of all blocks, which
    FSDP gathers together. The gradients of one block and of the weights outside are added.
    """
    gradients = 0 if lora else 4
    sizes = [0]
    for module in model.trainable.values():
        blocks = [number(part) for part in module.modules() if type(part).__name__ in model.blocks]
        outside = number(module) - sum(blocks)
        largest = max(blocks, default=0)
        sizes.append((2 * precision + gradients) * largest + (precision + gradients) * outside)
    return max(sizes)


def sample_bytes(model: Family, args: Args, launch: Launch, shards: int = 1) -> dict[str, float]:
    """Return the bytes of one process's samples on its device, {kind: bytes}.

    These are the latents of all denoising steps and the last ones, which are decoded, the
    conditioning, and the pixels that are scored together.
    """
    rows = args.prompts_per_step * args.group_size / max(launch.world, shards)
    pixels = 3 * model.height * model.width * getattr(model, "frames", 1)
    scored = score_batch(args.micro_batch, args.reward_batch)
    if args.eval_prompts:
        scored *= 2  # those of several passes are joined
    latents = latent_bytes(model, args, launch)
    return {
        "latents": 0 if latents_on_host(model, args, launch) else latents,
        "last latents": latents / (args.sampling_steps + 1),
        "conditioning": rows * sum(value.nbytes for value in model.blank().values()),
        "pixels": 4 * min(scored, 2 * rows) * pixels,
    }


def latent_bytes(model: Family, args: Args, launch: Launch) -> float:
    """Return the bytes of the latents of one process's rows at all noise levels."""
    rows = args.prompts_per_step * args.group_size / launch.world
    return 4 * rows * (args.sampling_steps + 1) * math.prod(model.noise_shape)


def latents_on_host(model: Family, args: Args, launch: Launch) -> bool:
    """Return whether the latents of a step are in the host's memory: on GPUs, if they are large."""
    return launch.device == "cuda" and latent_bytes(model, args, launch) > LARGE_LATENTS


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


def module_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of a module's weights."""
    return sum(weight.nbytes for weight in module.parameters())
