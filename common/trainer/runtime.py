"""One process of a run, and what it does together with the others: what no method changes. By
trade:

how a run begins, its batches         here
processes and their rows              processes.py     gather, local, rows, print
the weights and their update          update.py        keep_initial, prepare, initial_weights, exchange_gradients,
                                                       backward, update, check_ratio
checkpoints                           saving.py        due, save, resume
signals, and errors that end a run    signals.py
export                                export.py
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from common import cli
from common.errors import InputError
from common.memory import loading, preflight
from common.trainer import compiling, run_folder, sharding
from common.trainer.processes import processes
from common.trainer.saving import Saving
from common.trainer.signals import Stopping
from common.trainer.update import Update

if TYPE_CHECKING:  # --help need not wait for it
    from accelerate import Accelerator


class Runtime(Update, Saving, Stopping):
    """One process of a run. The B rows of a step are dealt out in contiguous chunks; a group may
    span processes. Raises InputError for settings that this launch or this machine cannot run."""

    def __init__(self, args: cli.Args, scorers: dict | None = None) -> None:
        super().__init__(args)
        self.scorers = list((scorers or {}).values())
        self.shards = sharding.on_a_machine(
            self.world
        )  # processes that share one copy of sharded weights
        if args.exchange_often and not self.sharding:
            raise InputError(
                "--exchange-often belongs to sharded weights (configs/fsdp2.yaml); "
                "--no-exchange-often goes on with a "
                "run that was sharded"
            )
        rows = args.prompts_per_step * args.group_size
        if rows % self.world:
            raise InputError(
                f"--prompts-per-step {args.prompts_per_step} x --group-size {args.group_size} = "
                f"{rows} samples "
                f"cannot be dealt evenly to {self.world} processes"
            )
        self.output, _ = self.find(args)
        if args.compile:
            compiling.check(self.device)
        self.accelerator = accelerator(self)
        self.asked = dataclasses.replace(
            args
        )  # what config.json says: each machine chooses the rest by its own memory
        args.micro_batch = cli.rows_of(args.micro_batch)  # `settle` takes more where they fit
        self.batch = batch_size(args, rows // self.world)  # rows of a forward pass
        self.activations = 0  # bytes of a pass, where they were counted
        self.turns = False  # whether the processes of a machine load one after another
        preflight.settle(self, self.scorers)
        self.batch = batch_size(args, rows // self.world)
        self.mesh = (
            sharding.mesh_of(self.device, self.world, self.shards) if self.sharding else None
        )
        self.last_saved = time.monotonic()
        self.changes = run_folder.check(self.output, self.asked)
        self.checkpoint = run_folder.find_checkpoint(self) if args.resume else None
        self.turn = loading.Turn() if self.turns else None  # until `prepare` has moved the model

    @staticmethod
    def find(args: cli.Args) -> tuple[Path, dict]:
        """The folder of a run, the same on every process, and the settings that it was started
        with, {} before that. Raises InputError for one that --output and --resume do not allow."""
        from accelerate.utils import broadcast_object_list

        is_main = processes(args).is_main_process
        chosen = (
            run_folder.choose(args) if is_main or args.resume else None
        )  # what is wrong with --resume, all say
        folder = Path(broadcast_object_list([chosen])[0])
        return folder, run_folder.before(folder, args)

    def batches(self, number: int) -> Iterator[torch.Tensor]:
        """Indices of `number` rows, [batch] each time; -1, the last row once more, fills up the
        last of them. Who samples by them has changed nothing yet: between them a run can be
        stopped, and after them, without a loss."""
        for rows in pad(torch.arange(number), (0, -number % self.batch), value=-1).split(
            self.batch
        ):
            self.check_signals()
            self.sampling = True
            yield rows
            self.sampling = False
        self.check_signals()

    def micro_batches(self, kept: torch.Tensor) -> list[torch.Tensor]:
        """kept [P, G] bool, the same on every process -> local indices of this process's kept rows, [batch] each, and
        -1, the last row, as a filler, whose share in the loss is 0.

        All have one shape: of another one the kernels round otherwise than the rollout's did. And
        every process gets equally many (sharded and data-parallel modules hang otherwise)."""
        chunks = kept.flatten().cpu().view(self.world, -1)
        number = max(math.ceil(chunk.sum().item() / self.batch) for chunk in chunks)
        mine = chunks[self.index].nonzero().flatten()
        # each another tensor: the script asks which of them is the last
        return (
            list(pad(mine, (0, number * self.batch - len(mine)), value=-1).split(self.batch))
            if number
            else []
        )

    def export(self) -> str:
        """export/: the LoRA, or the whole trained pipeline, for plain diffusers; returns the line that loads it. With
        --ema the averaged weights go to export_ema/, and stay in the model: a run ends with this. Raises RunError."""
        from common.trainer import export  # and with it accelerate and safetensors

        folder = self.output / "export"
        line = export.write(self, folder)
        if self.average:
            self.average.copy_to(self.weights())
            line += f"; the averaged one: {export.write(self, folder.with_name('export_ema'))}"
        return line


def accelerator(run: Runtime) -> "Accelerator":
    """Accelerate's own, for the run's precision and tracker."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    return Accelerator(
        mixed_precision=run.precision,
        cpu=run.device.type != "cuda",
        log_with=None if run.args.tracker == "none" else run.args.tracker,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False)
        ],  # they are constants
        project_dir=run.output,
    )


def batch_size(args: cli.Args, share: int) -> int:
    """Rows of every forward pass of a process that has a `share` of the samples, at most
    --micro-batch: by them the rollout comes out even, or a minibatch of what is trained on,
    whichever takes fewer fillers."""
    rows = math.ceil(
        share / args.group_size * math.ceil((args.best_of or args.group_size) / args.minibatches)
    )
    sizes = [math.ceil(number / math.ceil(number / args.micro_batch)) for number in (share, rows)]

    def cost(size: int) -> int:  # a backward pass takes as long as two forward passes
        return math.ceil(share / size) * size + 3 * args.minibatches * math.ceil(rows / size) * size

    return min(sizes, key=cost)
