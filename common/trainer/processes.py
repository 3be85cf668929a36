"""This process and the others of a launch: device, rows, micro-batches, and what all find out
together. Training and evaluate.py share it."""

import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.nn.functional import pad

from common.errors import InputError, text
from common.trainer import launch, sharding

# Accelerate's name for the precision of the forward passes, and the dtype of frozen weights.
PRECISION = {"cuda": ("bf16", torch.bfloat16), "cpu": ("no", torch.float32)}


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The rows of one forward pass.

    index [n]: which of this process's rows; -1, the last one, for padding rows. on_device: the same
    on the device, for tensors there: an index on the CPU would be copied each time.
    real [n] bool, on the device: False for padding rows, which count nothing.

    All micro-batches have the same n: with another batch shape kernels round differently, and the
    ratio before the first update would not be 1.
    """

    index: torch.Tensor
    on_device: torch.Tensor
    real: torch.Tensor


class Processes:
    """This process and the others of a launch.

    device, dtype      where the forward passes run, and the dtype of frozen weights
    precision          Accelerate's name for the precision of the passes: "bf16" on GPUs, else "no"
    rank, world        number of this process, number of processes; is_main: rank 0
    per_machine        processes on each machine; all of them if machines differ
    fsdp               Accelerate's FSDP2 plugin if the launcher asked for it, else None
    offloads           whether its shards are on the CPU between passes
    accelerator        Accelerate's object: autocast, distributed modules, gradient clipping

    timeout_minutes: how long processes wait for one another. Raises InputError for a setting of the
    launch that is not supported (launch.py), or if processes do not come.
    """

    def __init__(self, timeout_minutes: float = 60.0) -> None:
        from accelerate import Accelerator, PartialState
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

        if "PYTORCH_ALLOC_CONF" not in os.environ:
            # samples, passes and encoders differ in size, which leaves gaps otherwise
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        on_gpu = torch.cuda.is_available()
        gc.collect()  # what an earlier run of this program held, before memory is counted
        if on_gpu:
            torch.cuda.empty_cache()
        self.precision, self.dtype = PRECISION["cuda" if on_gpu else "cpu"]
        launch.check(on_gpu)
        group = launch.meet(launch.settle(), timeout_minutes)
        self.timeout = timedelta(minutes=timeout_minutes)
        state = PartialState(cpu=not on_gpu, timeout=self.timeout, **group)
        self.device = state.device
        self.rank = state.process_index
        self.world = state.num_processes
        self.is_main = state.is_main_process
        self.fsdp = sharding.take_plugin()
        self.offloads = bool(self.fsdp) and sharding.offloads(self.fsdp, self.device.type)
        self.meshes = {}  # {shards: mesh}
        self.per_machine = self._per_machine()
        self.accelerator = Accelerator(
            # explicit, or Accelerate takes them from the environment
            mixed_precision=self.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            cpu=not on_gpu,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # constants
        )

    def _per_machine(self) -> int:
        """Return how many processes each machine has; all of them if machines differ."""
        own = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        alike = set(self.collect(own)) == {own}
        return own if own > 1 and alike and self.world % own == 0 else self.world

    def prepare(self, module: torch.nn.Module, trains: bool) -> torch.nn.Module:
        """Return a module, already on its device, that computes under autocast as a run does.

        trains: whether its gradients are exchanged, as data parallelism does it.
        """
        return self.accelerator.prepare_model(
            module,
            # before 1.15, Accelerate moves shards that wait on the CPU to the GPU
            device_placement=False,
            evaluation_mode=not trains,
        )

    def mesh(self, shards: int) -> Any:
        """Return the mesh of sharded weights, with `shards` processes to a copy.

        The first call for a number of shards is made by all processes together.
        """
        if shards not in self.meshes:
            self.meshes[shards] = sharding.mesh_of(
                self.device, self.world, shards, timeout=self.timeout
            )
        return self.meshes[shards]

    # --- Rows ---

    def rows(self, number: int) -> torch.Tensor:
        """Return the global indices of this process's rows: [number / world], contiguous.

        A group may span processes. Raises InputError if the rows do not divide evenly.
        """
        if number % self.world:
            raise InputError(
                f"--prompts-per-step x --group-size: {number} samples a step do not divide evenly "
                f"among {self.world} processes. Change one of the three."
            )
        share = number // self.world
        return torch.arange(share) + share * self.rank

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """Return [B, ...] on every process, from [b, ...] of each, in global row order."""
        from accelerate.utils import gather

        return gather(local)

    def local(self, value: torch.Tensor) -> torch.Tensor:
        """Return this process's rows of a value of all samples: [P, G] -> [b]."""
        return value.flatten()[self.rows(value.numel()).to(value.device)]

    def batches(self, number: int, size: int) -> list[MicroBatch]:
        """Return micro-batches of `size` rows that cover `number` rows in order, padding last."""
        return self._split(torch.arange(number), size, math.ceil(number / size))

    def micro_batches(self, kept: torch.Tensor, size: int) -> list[MicroBatch]:
        """Return micro-batches of `size` rows that cover this process's part of the kept samples.

        kept [P, G] bool, the same on every process. Every process gets equally many micro-batches:
        sharded and data-parallel modules would wait for one another otherwise.
        """
        parts = kept.flatten().cpu().view(self.world, -1)
        number = max(math.ceil(part.sum().item() / size) for part in parts)
        return self._split(parts[self.rank].nonzero().flatten(), size, number)

    def _split(self, rows: torch.Tensor, size: int, number: int) -> list[MicroBatch]:
        """Return `number` micro-batches of `size` rows, those in `rows` first."""
        padded = pad(rows, (0, number * size - len(rows)), value=-1)
        indices = padded.view(-1, size)
        copies = indices.to(self.device)
        return [MicroBatch(index, copy, copy.ge(0)) for index, copy in zip(indices, copies)]

    # --- All processes together ---

    def collect(self, thing: Any) -> list:
        """Return what each process has, in the order of their ranks."""
        from accelerate.utils import gather_object

        return gather_object([thing]) if self.world > 1 else [thing]

    def together(self, here: bool, action: Callable[[], None]) -> str:
        """Do something on the processes that are `here`; return why it failed on one, else "".

        All processes call it, and all get the same answer.
        """
        reason = ""
        try:
            if here:
                action()
        except Exception as error:  # a full disk, whatever torch and safetensors make of it
            reason = text(error)
        return self.first(reason)

    def from_main(self, action: Callable[[], Any]) -> Any:
        """Return on every process what an action returns on the main process, which alone does it.

        Its InputError is raised on every process.
        """
        result, reason = None, ""
        if self.is_main:
            try:
                result = action()
            except InputError as error:
                if self.world == 1:
                    raise
                reason = str(error)
        result, reason = self.collect((result, reason))[0]
        if reason:
            raise InputError(reason)
        return result

    def first(self, reason: str) -> str:
        """Return the first reason that any process has; "" if none has one."""
        return next(filter(None, self.collect(reason)), "")

    def any(self, here: bool) -> bool:
        """Return whether it is true on any process."""
        return bool(self.gather(torch.tensor([here], device=self.device)).any())

    def print(self, *words: Any) -> None:
        """Print on the main process."""
        if self.is_main:
            print(*words, flush=True)
