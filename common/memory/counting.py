"""Bytes that a run takes: weights and samples of a process, activations of a pass, checkpoints on
the disk."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from common.args import Args
from common.trainer import sharding

if TYPE_CHECKING:  # they load more than torch
    from common.models.family import Family
    from common.trainer.runtime import Runtime

ON_THE_HOST = (
    "trained weights",
    "frozen weights",
    "gradients",
    "optimizer",
)  # of shards between passes, offloaded


def memory(
    model: "Family",
    args: Args,
    precision: int,
    shards: int = 1,
    initial: bool = False,
    activations: int = 0,
    scorers: Iterable = (),
) -> dict[str, float]:
    """Bytes that one of `shards` processes holds, by kind: weights from start to end, activations
    of a pass for a moment. precision: bytes of a weight in the forward pass; initial: whether a
    copy of the initial weights is kept; activations: bytes of a pass; scorers: the rewards. The
    model's modules are as the Runtime makes them before it moves them: a LoRA is there already."""
    weights = {name: number(module) for name, module in modules(model)}
    trained = trained_number(model, args)
    master = 4 * trained / shards
    base = precision * (
        sum(weights[name] for name in model.trainable) - trained * bool(args.lora_rank)
    )
    waiting = model.encoders if args.offload_encoders else ()
    others = sum(
        number for name, number in weights.items() if name not in (*model.trainable, *waiting)
    )
    unsharded = shards == 1 or not args.exchange_often
    return {
        "trained weights": master,
        "frozen weights": base / shards if args.lora_rank or initial else 0.0,
        "gradients": 4 * trained if unsharded else master,
        "optimizer": 2 * master,
        "average": master * bool(args.ema),
        "encoders, VAE": precision * others,
        "rewards": sum(precision * number(module) for module in reward_modules(scorers)),
        "weights of a pass": _whole_weights(model, args, precision, shards),
        # with --offload-encoders they come for a moment, too, before there are activations
        "activations": max(activations, precision * sum(weights.get(name, 0) for name in waiting)),
    }


def _whole_weights(model: "Family", args: Args, precision: int, shards: int) -> int:
    """Of shards two blocks are whole for a moment, the one that computes and the next, and the
    gradients of one. Else autocast holds a copy of all trained weights, where they have another
    precision."""
    if shards > 1:
        parts = (part for module in model.trainable.values() for part in module.modules())
        largest = max(
            (number(part) for part in parts if type(part).__name__ in model.blocks), default=0
        )
        return (2 * precision + 4 * (not args.lora_rank)) * largest
    return precision * trained_number(model, args) if precision < 4 else 0


def reward_modules(scorers: Iterable) -> list[torch.nn.Module]:
    """The modules of rewards, each once, a judge in this process among them."""
    found = {}
    for scorer in scorers:
        for owner in (scorer, *vars(scorer).values()):
            for part in [owner, *vars(owner).values()] if hasattr(owner, "__dict__") else ():
                if isinstance(part, torch.nn.Module):
                    found[id(part)] = part
    inner = {id(part) for module in found.values() for part in list(module.modules())[1:]}
    return [module for key, module in found.items() if key not in inner]


def samples(model: "Family", args: Args, world: int = 1) -> dict[str, float]:
    """Bytes that one of `world` processes holds of its samples, by kind: the latents of a rollout
    with all steps, what they are conditioned on, and the pixels of a micro-batch."""
    rows = args.prompts_per_step * args.group_size / world
    pixels = 3 * model.height * model.width * getattr(model, "frames", 1)
    return {
        "latents": 4 * rows * (args.sampling_steps + 1) * math.prod(model.noise_shape),
        "conditioning": rows * sum(value.nbytes for value in model.blank().values()),
        "pixels": 4 * min(args.micro_batch, rows) * pixels,
    }


def held(
    run: "Runtime",
    model: "Family",
    args: Args,
    shards: int,
    initial: bool,
    activations: int,
    scorers: Iterable,
) -> dict[str, float]:
    """`memory` and `samples` of one process of a run, on its accelerator."""
    kinds = memory(model, args, run.dtype.itemsize, shards, initial, activations, scorers)
    if run.world > 1 and shards == 1:
        kinds["gradients"] *= 2  # data parallelism has a copy of them, in buckets
    if run.sharding and sharding.offloads(run.sharding, run.device.type):
        kinds |= dict.fromkeys(ON_THE_HOST, 0)
    return kinds | samples(model, args, max(run.world, shards))


# --- Activations, counted on tensors without contents ---


class Kept:
    """Inside, counts the bytes that autograd keeps for the backward pass, weights left out, each
    storage once."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self.weights = {
            weight.untyped_storage()._cdata for module in modules for weight in module.parameters()
        }
        self.seen, self.tensors = {}, []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor that autograd keeps, once for each storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.seen[storage._cdata] = storage.nbytes()
            self.tensors.append(tensor)  # alive, so that no other storage gets its address
        return tensor

    @property
    def bytes(self) -> int:
        """Of all that was kept so far."""
        return sum(self.seen.values())

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)


def activations(model: "Family", dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes that autograd keeps of one row's velocity, of a model whose weights need not be there.
    With gradient checkpointing: the blocks' inputs, and all of the largest block, which is computed
    again. Guidance against the empty prompt is a second pass."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        for part in (
            model.trainable[model.trained_at(1.0)],
            model.pipe.vae,
        ):  # the VAE's is the model's device
            stack.enter_context(_on_fake_cpu(part))
        return count(model, dtype, checkpointing)


def count(model: "Family", dtype: torch.dtype, checkpointing: bool) -> int:
    """The same on tensors that are there."""
    module, largest, at = (
        model.trainable[model.trained_at(1.0)],
        0,
        {},
    )  # at: bytes kept when a block began

    def entered(block: torch.nn.Module, *_) -> None:
        at[block] = kept.bytes

    def left(block: torch.nn.Module, *_) -> None:
        nonlocal largest
        largest = max(largest, kept.bytes - at[block])

    def velocity() -> None:
        cond = {name: value[None] for name, value in blank.items()}
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model.velocity(torch.zeros(1, *model.noise_shape), 1.0, cond)

    before, blank = model.unwanted, model.blank()
    model.unwanted = {
        name: value for name, value in blank.items() if name == "encoder_hidden_states"
    }
    if checkpointing:
        parts = [part for part in module.modules() if type(part).__name__ in model.blocks]
        handles = [part.register_forward_pre_hook(entered) for part in parts]
        handles += [part.register_forward_hook(left) for part in parts]
        with Kept([module]) as kept:
            velocity()
        for handle in handles:
            handle.remove()
        module.enable_gradient_checkpointing()
    with Kept([module]) as kept:
        velocity()
    if checkpointing:
        module.disable_gradient_checkpointing()
    model.unwanted = before
    return kept.bytes + largest


@contextlib.contextmanager
def _on_fake_cpu(module: torch.nn.Module) -> Iterator[None]:
    """Inside FakeTensorMode: the module's weights stand on a CPU that holds nothing; attention is
    counted as GPUs do it."""
    before = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    for part, weights, buffers in before:
        for key, weight in weights.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                part._parameters[key] = torch.nn.Parameter(empty, weight.requires_grad)
        for key, buffer in buffers.items():
            part._buffers[key] = (
                None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
            )
    try:
        yield
    finally:
        for part, weights, buffers in before:
            part._parameters.update(weights)
            part._buffers.update(buffers)


# --- On the disk ---


def disk(
    model: "Family", args: Args, precision: int, start: int = 0, auto: int = 20
) -> tuple[int, int, int]:
    """(bytes of one checkpoint, how many are there at once, bytes of the export); precision: bytes
    of an exported weight; start: finished steps; auto: steps between the checkpoints of
    --save-every auto."""
    trained = trained_number(model, args)
    checkpoint = 4 * trained * (3 + bool(args.ema))
    every = auto if args.save_every == "auto" else args.save_every
    saves = math.ceil(args.steps / every) - start // every if every else 1
    pipeline = precision * sum(number(module) for _, module in modules(model))
    export = (1 + bool(args.ema)) * (4 * trained if args.lora_rank else pipeline)
    return (
        checkpoint,
        min(saves, args.keep_checkpoints + 1) if args.keep_checkpoints else saves,
        export,
    )


# --- Weights ---


def trained_number(model: "Family", args: Args) -> int:
    """How many weights are trained."""
    if args.lora_rank:
        return sum(
            w.numel()
            for module in model.trainable.values()
            for w in module.parameters()
            if w.requires_grad
        )
    return sum(map(number, model.trainable.values()))


def modules(model: "Family") -> list[tuple[str, torch.nn.Module]]:
    """[(name, module)] of the parts of a model's pipeline that have weights."""
    return [
        (name, part)
        for name, part in model.pipe.components.items()
        if isinstance(part, torch.nn.Module)
    ]


def number(module: torch.nn.Module) -> int:
    """How many weights a module has."""
    return sum(weight.numel() for weight in module.parameters())
