"""Measure the free memory, choose how the run fits, and take this process's turn to load."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from common import models
from common.args import Args
from common.errors import InputError
from common.memory import host, turns
from common.memory.bytes import Launch, at_once, number, reward_modules
from common.memory.ways import ROOM, Counter, MemoryPlan, as_asked, plan, resolved, ways
from common.models import lora
from common.models.family import Family
from common.prompts import images_of, read_prompts

SMALL = 2**30  # bytes of a model's files below which memory is not counted
LORA = 64  # rank of the LoRA that is proposed when all weights do not fit
OFFLOADED = "configs/fsdp2_offload.yaml"


class Plugin(Protocol):
    """The settings of the launcher's FSDP2 that are read here."""

    activation_checkpointing: bool


class Processes(Protocol):
    """The processes of a launch, as far as they are used here."""

    device: torch.device
    dtype: torch.dtype
    world: int
    per_machine: int
    fsdp: Plugin | None
    offloads: bool
    """Whether shards are on the CPU between passes."""

    def collect(self, thing: Any) -> list:
        """Return the `thing` of every process."""

    def mesh(self, shards: int) -> Any:
        """Make the mesh of sharded weights, all processes together."""

    def print(self, *words: object) -> None:
        """Print on rank 0."""


def settle(
    args: Args, processes: Processes, scorers: Mapping[str, object], keep_initial: bool
) -> MemoryPlan:
    """Return how the run fits into memory, print what was chosen, and take the turn to load.

    All processes call it together, before the model is loaded. `args` is not changed. Models whose
    files are below 1 GiB are not counted: they run as asked. Once it has returned a plan with a
    turn, processes must not wait for one another until that turn has ended.

    scorers: {name: scorer}, loaded; keep_initial: whether a copy of the initial weights is kept.
    Raises InputError with command lines that fit when no way to run does.
    """
    launch = launch_of(processes)
    _check_launch(args, launch)
    # before any process loads: what others load does not count, and all of them take part
    measured = processes.collect((free_bytes(processes.device, launch.per_machine), host.free()))
    free, free_host = (min(values) for values in zip(*measured))
    model = outline(args, launch.dtype)
    if model is None:
        return as_asked(args, launch)
    rewards = launch.dtype.itemsize * sum(map(number, reward_modules(scorers.values())))
    counter = Counter(model, launch, keep_initial, rewards)
    found = plan(args, counter, free)
    if found is None:
        raise InputError(_refusal(args, counter, free, free_host))
    for line in found.lines:
        processes.print(line)
    peak, kept = turns.loading_bytes(
        model, found.args, launch=launch, shards=found.shards, keep_initial=keep_initial
    )
    if turns.in_turns(args.model, peak, kept, free_host):
        if found.sharded:
            processes.mesh(found.shards)  # processes must not wait for one another in a turn
        return dataclasses.replace(found, turn=turns.Turn())
    return found


def launch_of(processes: Processes) -> Launch:
    """Return what counting needs to know of the processes."""
    fsdp = processes.fsdp
    return Launch(
        dtype=processes.dtype,
        device=processes.device.type,
        world=processes.world,
        per_machine=processes.per_machine,
        sharded=fsdp is not None,
        checkpointing=fsdp is not None and bool(fsdp.activation_checkpointing),
        offloads=fsdp is not None and processes.offloads,
    )


def _check_launch(args: Args, launch: Launch) -> None:
    """Raise InputError for a setting that does not belong to this launch."""
    if args.exchange_often and not launch.sharded:
        raise InputError(
            "--exchange-often: it needs sharded weights. Launch with configs/fsdp2.yaml, or give "
            "--no-exchange-often to continue a run that was sharded."
        )
    if args.frozen_8bit and (launch.world > 1 or launch.sharded):
        raise InputError(
            "--frozen-8bit: it is for one process without sharding. Launch with "
            "configs/one_process.yaml, or leave it out."
        )


def outline(args: Args, dtype: torch.dtype) -> Family | None:
    """Return the model without contents, with the LoRA that would be trained; None if it is small.

    Weights that are not trained do not require gradients.
    """
    model = models.outline(args.model, dtype, SMALL, **args.model_settings())
    if model is None:
        return None
    if model.images > 1:
        model.sources = len(images_of(read_prompts(args.prompts)[0]))
    for module in model.trainable.values():
        module.requires_grad_(not args.lora_rank)
    if args.lora_rank:
        with torch.device("meta"):
            lora.adapt_model(
                model,
                **args.lora_settings(),
                init=args.init_lora,
                seed=args.seed,
                autocast=dtype != torch.float32,
            )
    return model


def free_bytes(device: torch.device, per_machine: int) -> float:
    """Return the bytes of memory that this process can take now.

    On a CPU the processes of a machine share what it, or their container, has.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host.free() / per_machine


# --- When no way fits ---


def _refusal(args: Args, counter: Counter, free: float, free_host: float) -> str:
    """Return why the run does not fit: the bytes of the way that needs the least, by kind."""
    asked = as_asked(args, counter.launch)
    kinds = at_once(counter.kinds(ways(asked.args, counter.launch)[-1], asked.batch))
    listed = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in kinds.items() if size)
    advice = "Make smaller samples (--height, --width, --frames), or use more GPUs."
    if fits := commands_that_fit(args, counter, free, free_host):
        advice = f"Commands that fit: {'; '.join(fits)}"
    return (
        f"--model {args.model}: each process needs at least {sum(kinds.values()) / 2**30:.1f} GiB "
        f"({listed}) and may take {ROOM * free / 2**30:.1f} GiB. {advice}"
    )


def commands_that_fit(args: Args, counter: Counter, free: float, free_host: float) -> list[str]:
    """Return command lines that fit: one row a pass, a LoRA, a LoRA with weights on the host, more
    GPUs.

    free: bytes of each process, as for `plan`; free_host: bytes of this machine's memory.
    """
    script = shlex.join(sys.argv)
    launch = counter.launch
    small_pass = "" if resolved(args).micro_batch == 1 else " --micro-batch 1"
    one_row = dataclasses.replace(args, micro_batch=1)
    found = []
    if small_pass and plan(one_row, counter, free):
        found.append(f"accelerate launch {script}{small_pass}")
    lora = one_row if small_pass else args  # the settings of the proposed command
    adapted = counter
    rank = ""
    if not args.lora_rank:
        lora = dataclasses.replace(lora, lora_rank=LORA)
        adapted = Counter(outline(lora, launch.dtype), launch, rewards=counter.rewards)
        rank = f" --lora-rank {LORA}"
        if plan(lora, adapted, free):
            found.append(f"accelerate launch {script}{rank}{small_pass}")
    exact = list(found)
    if not found and _fits_in_eight_bits(lora, adapted, free):
        words = f"accelerate launch {script}{rank}{small_pass} --frozen-8bit"
        if not args.gradient_checkpointing:
            words += " --gradient-checkpointing"
        found.append(f"{words} (rounded, needs torchao)")
    if args.frozen_8bit:  # for one process without sharding
        return found
    if not exact and _fits_offloaded(lora, adapted, free, free_host):
        words = f"accelerate launch --config_file {OFFLOADED} --num_processes {launch.world}"
        found.append(f"{words} {script}{rank}{small_pass}")
    for world in (2, 4, 8, 16, 32):
        if world <= launch.world or args.prompts_per_step * args.group_size % world:
            continue
        config = "fsdp2" if world <= 8 else "fsdp2_multi_node"
        larger = dataclasses.replace(
            launch,
            world=world,
            per_machine=min(world, 8),
            sharded=True,
            checkpointing=True,
            offloads=False,
        )
        if plan(one_row, dataclasses.replace(counter, launch=larger), free):
            words = f"accelerate launch --config_file configs/{config}.yaml"
            found.append(f"{words} --num_processes {world} {script}{small_pass}")
            break
    return found


def _fits_in_eight_bits(args: Args, counter: Counter, free: float) -> bool:
    """Return whether a LoRA in one process fits with frozen layers in 8 bits."""
    if args.compile or counter.launch.world > 1 or counter.launch.sharded:
        return False
    eight = dataclasses.replace(args, frozen_8bit=True, gradient_checkpointing=True)
    return plan(eight, counter, free) is not None


def _fits_offloaded(args: Args, counter: Counter, free: float, free_host: float) -> bool:
    """Return whether the run fits if its weights are on the host between passes.

    Each process then holds its shards and the encoders in the host's memory.
    """
    launch = dataclasses.replace(counter.launch, sharded=True, checkpointing=True, offloads=True)
    found = plan(args, dataclasses.replace(counter, launch=launch), free)
    if found is None:
        return False
    peak, kept = turns.loading_bytes(
        counter.model,
        found.args,
        launch=launch,
        shards=found.shards,
        keep_initial=counter.keep_initial,
    )
    return max(peak, kept) + (launch.per_machine - 1) * kept <= free_host
