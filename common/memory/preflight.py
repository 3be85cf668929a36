"""What can be known before the first rollout: whether the weights fit into memory, and the
checkpoints on the disk.

`settle` comes before anything is loaded, from the configurations in the model's folder: it chooses
what decides whether a run fits and was not asked for, or refuses with a command that fits. `check`
comes when all is there."""

import dataclasses
import os
import shlex
import shutil
import sys
from typing import TYPE_CHECKING

import torch

from common import cli, models
from common.errors import InputError
from common.memory import counting, loading
from common.trainer import checkpoints, placing, sharding

if TYPE_CHECKING:  # they load more than torch, or import this file
    from common.models.family import Family
    from common.trainer.processes import Processes
    from common.trainer.runtime import Runtime

SMALL = (
    2**30
)  # bytes of a model's files below which nothing has to be chosen, and no activations are counted
# of the free memory: what a kernel needs while it runs, and the allocator's gaps, are not counted
ROOM = 0.9
FILL = 0.75  # of the free memory, for passes of more rows: what they need uncounted grows with them
SHARDED = ("sharded", "sharded over all machines")  # what is chosen besides flags
LORA = 64  # the rank of a LoRA that is proposed


# --- Choosing ---


def settle(run: "Runtime", scorers: list) -> None:
    """Before anything is loaded: chooses --offload-encoders, --gradient-checkpointing,
    --exchange-often and sharding, inside each machine or over all, where they decide whether the
    run fits, and on GPUs --micro-batch auto, and leaves `run.activations`, the bytes of a pass.
    Raises InputError with a command that fits. Small models are left as they are."""
    plan, grows = Plan(run, scorers), run.asked.micro_batch == "auto" and run.device.type == "cuda"
    if plan.model is None:
        return
    for changes in plan.ways():
        args = dataclasses.replace(
            run.args, **{name: True for name in changes if name not in SHARDED}
        )
        kinds = plan.kinds(args, plan.shards(changes))
        if sum(kinds.values()) <= plan.have:
            break
    else:
        raise InputError(plan.refusal(kinds))
    rows = plan.most_rows(args, plan.shards(changes))
    more = rows > run.batch
    if more and grows:
        args = dataclasses.replace(
            args, micro_batch=rows, decode_batch=args.decode_batch or args.micro_batch
        )
        kinds = plan.kinds(args, plan.shards(changes), batch=rows)
    vars(run.args).update(vars(args))
    if "sharded" in changes:
        run.sharding = sharding.own_plugin()
    run.shards = max(run.shards, plan.shards(changes))
    run.activations = kinds["activations"]
    run.turns = plan.by_turns(args)
    chosen = [name if name in SHARDED else _flag(name) for name in changes]
    chosen += [f"--micro-batch {rows}"] * (more and grows)
    if chosen:
        memory = f"the {plan.have / 2**30:.1f} GiB of memory that each process may take"
        run.print(f"{args.model}: {', '.join(chosen)}, for {memory}")
    if more and not grows:
        run.print(
            f"{args.model}: {rows} rows a pass would fit, too, and be faster: --micro-batch "
            f"{rows} --decode-batch "
            f"{args.decode_batch or args.micro_batch}"
        )


class Plan:
    """What a run would take, in several ways of running it. `have`: bytes that each process may
    take."""

    def __init__(self, run: "Runtime", scorers: list) -> None:
        self.run, self.scorers, self.counted = run, scorers, {}
        self.model = self.outline(run.args.lora_rank)
        self.have = ROOM * min(run.together(free(run)))

    def outline(self, lora_rank: int) -> "Family | None":
        """The model without contents, with the LoRA that would be trained; None if it is small."""
        args = self.run.args
        model = models.outline(args.model, self.run.dtype, SMALL, **cli.of_model(args))
        for module in model.trainable.values() if model else ():
            module.requires_grad_(not lora_rank)
        if model and lora_rank:
            with torch.device("meta"):
                placing.adapt(self.run, model, args.lora_targets, lora_rank)
        return model

    def ways(self) -> list[tuple[str, ...]]:
        """Names of what is chosen besides what is asked for, what costs least first."""
        args, run = self.run.args, self.run
        chosen = [()]
        for name in ("offload_encoders", "gradient_checkpointing"):
            if not getattr(args, name):
                chosen.append((*chosen[-1], name))
        if run.world > 1 and not run.sharding:
            chosen.append((*chosen[-1], "sharded"))
        if run.world > 1 and not args.exchange_often:
            chosen.append((*chosen[-1], "exchange_often"))
        if run.world > run.shards:
            chosen.append((*chosen[-1], SHARDED[1]))
        return chosen

    def shards(self, changes: tuple[str, ...]) -> int:
        """Processes that one copy of the weights is sharded over: of a machine, of all, or 1."""
        run = self.run
        return (
            run.world
            if SHARDED[1] in changes
            else run.shards
            if run.sharding or "sharded" in changes
            else 1
        )

    def kinds(
        self, args: cli.Args, shards: int, model: "Family | None" = None, batch: int | None = None
    ) -> dict[str, float]:
        """Bytes that each process would hold, by kind, with passes of `batch` rows, None: the
        run's."""
        model, run = model or self.model, self.run
        sharded = run.sharding.activation_checkpointing if run.sharding else shards > 1
        key = bool(args.lora_rank), bool(args.gradient_checkpointing or sharded)
        if key not in self.counted:
            self.counted[key] = counting.activations(model, run.dtype, key[1])
        row = self.counted[key] * (batch or run.batch)
        return counting.held(run, model, args, shards, cli.keeps_initial(args), row, self.scorers)

    def most_rows(self, args: cli.Args, shards: int) -> int:
        """Rows of the largest pass that fits, of so many a power of two, and leaves room for what
        is not counted."""
        share, rows = args.prompts_per_step * args.group_size // self.run.world, 1
        while 2 * rows <= share:
            larger = dataclasses.replace(args, micro_batch=2 * rows)
            if sum(self.kinds(larger, shards, batch=2 * rows).values()) > FILL / ROOM * self.have:
                break
            rows *= 2
        return rows

    def by_turns(self, args: cli.Args) -> bool:
        """Whether the processes of this machine load the model one after another, with what they
        copy of it while they do. Raises InputError where its memory cannot hold even that."""
        run, model = self.run, self.model
        on_gpu = run.device.type == "cuda"
        if not on_gpu and not run.sharding:
            return False  # what is loaded stays where it is
        parts, of_start = loading.copied(model), 0
        waits = model.encoders if args.offload_encoders else ()
        stays = sum(
            parts[name]
            for name in parts
            if name not in model.trainable and (name in waits or not on_gpu)
        )
        if run.sharding and (not on_gpu or sharding.offloads(run.sharding, run.device.type)):
            kinds = counting.memory(
                model, args, run.dtype.itemsize, run.shards, cli.keeps_initial(args)
            )
            stays += sum(kinds[name] for name in counting.ON_THE_HOST)
        if (
            run.sharding and cli.keeps_initial(args) and not args.lora_rank
        ):  # is sharded from a copy
            of_start = run.dtype.itemsize * max(map(counting.number, model.trainable.values()))
        return loading.by_turns(args.model, sum(parts.values()) + of_start, stays)

    def refusal(self, kinds: dict[str, float]) -> str:
        """Why the run does not fit, with commands that do. kinds: bytes by kind of the last way
        tried."""
        fits = "; ".join(f"{words} ({size / 2**30:.0f} GiB)" for words, size in self.others())
        return (
            f"--model {self.run.args.model}: each process would hold "
            f"{sum(kinds.values()) / 2**30:.1f} GiB "
            f"({_listed(kinds)}), and may take {self.have / 2**30:.1f}; what fits: "
            + (fits or "smaller samples (--height, --width, --frames), fewer of them, or more GPUs")
        )

    def others(self) -> list[tuple[str, float]]:
        """Command lines that would fit, with their bytes: a smaller --micro-batch, a LoRA, more
        GPUs."""
        run, script = self.run, shlex.join(sys.argv)
        asked = dataclasses.replace(
            run.args, offload_encoders=True, gradient_checkpointing=True, exchange_often=True
        )
        world = run.world if run.sharding or run.world > 1 else 1
        lora = dataclasses.replace(asked, lora_rank=asked.lora_rank or LORA)
        tries = [(f"accelerate launch {script} --micro-batch 1", asked, world, self.model)] * (
            run.batch > 1
        )
        if not asked.lora_rank:
            tries.append(
                (f"accelerate launch {script} --lora-rank {LORA}", lora, world, self.outline(LORA))
            )
        found = [
            (words, sum(self.kinds(args, n, model, 1).values())) for words, args, n, model in tries
        ]
        for n in (2, 4, 8, 16, 32):
            if n > run.world and asked.prompts_per_step * asked.group_size % n == 0:
                config = "fsdp2" if n <= 8 else "fsdp2_multi_node"
                size = sum(self.kinds(asked, n, batch=1).values())
                words = f"accelerate launch --config_file configs/{config}.yaml --num_processes {n} {script}"
                found.append((words + " --micro-batch 1" * (run.batch > 1), size))
                if size <= self.have:
                    break
        return [(words, size) for words, size in found if size <= self.have]


def free(run: "Processes") -> float:
    """Bytes of memory that this process may take as yet."""
    if run.device.type == "cuda":
        return torch.cuda.mem_get_info(run.device)[0]
    import psutil

    return psutil.virtual_memory().available / run.world


def _listed(kinds: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / 2**30:.1f}" for name, size in kinds.items() if size)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- Checking ---


def check(run: "Runtime", model: "Family") -> None:
    """Raises InputError if the memory or the disk cannot be enough."""
    args, precision = run.args, run.dtype.itemsize
    shards = run.shards if run.sharding else 1
    kinds = counting.held(run, model, args, shards, bool(run.frozen), run.activations, run.scorers)
    need, have = sum(kinds.values()), free(run)
    if (
        run.device.type != "cuda"
    ):  # what is loaded is there already, and all processes share the rest
        have += sum(loading.copied(model).values())
    if need > have:
        raise InputError(
            f"--model {args.model}: each process would hold {need / 2**30:.1f} GiB "
            f"({_listed(kinds)}), "
            f"{have / 2**30:.1f} GiB are free; make fewer or smaller samples (--height, "
            "--width), train a LoRA "
            "(--lora-rank), add --offload-encoders, or shard over more processes "
            "(configs/fsdp2.yaml, --exchange-often)"
        )
    if run.is_main:
        _check_disk(
            run, *counting.disk(model, args, precision, run.checkpoint[1] if run.checkpoint else 0)
        )


def check_twice_differentiated(run: "Runtime", model: "Family") -> None:
    """Under a kernel of attention that can be differentiated twice, which keeps the scores of every
    block: raises InputError where a pass of `run.batch` rows and its derivative do not fit. Of
    small models it has nothing to say."""
    if 4 * sum(map(counting.number, model.trainable.values())) < SMALL:
        return
    need, have = (
        2 * run.batch * counting.activations(model, run.dtype, checkpointing=False),
        free(run),
    )
    if need > have:
        raise InputError(
            f"--model {run.args.model}: to measure the Fisher matrix, attention scores of every "
            "block are kept: "
            f"{need / 2**30:.1f} GiB for {run.batch} rows, and {have / 2**30:.1f} GiB are free; "
            "choose a number "
            "for --gamma, or make smaller samples (--height, --width, --frames)"
        )


def _check_disk(run: "Runtime", checkpoint: int, number: int, export: int) -> None:
    there = next(
        folder for folder in (run.output, *run.output.absolute().parents) if os.path.exists(folder)
    )
    need, have = checkpoint * number + export, shutil.disk_usage(there).free
    if need > have:
        raise InputError(
            f"--output {run.output}: {number} checkpoints of {checkpoint / 2**30:.2f} GiB and "
            "the export's "
            f"{export / 2**30:.2f} GiB do not fit on the disk, which has {have / 2**30:.2f} GiB "
            "free; set "
            "--keep-checkpoints, a larger --save-every, or another --output"
        )


def warn_of_disk(run: "Runtime", step: int, every: int) -> None:
    """After a checkpoint of a run whose steps take long, so that --save-every auto saves more often
    than every 20 of them: says where the disk has no room for all that are to come."""
    checkpoint, number, export = counting.disk(run.model, run.args, run.dtype.itemsize, step, every)
    if keep := run.args.keep_checkpoints:
        number = max(0, min(number, keep + 1 - len(checkpoints.newest_first(run.output))))
    have = shutil.disk_usage(run.output).free
    if checkpoint * number + export > have:
        run.print(
            f"warning: at one every {every} steps {number} more checkpoints of "
            f"{checkpoint / 2**30:.2f} GiB come, and "
            f"the disk has {have / 2**30:.2f} GiB free: stop the run, and go on with "
            "--keep-checkpoints 2"
        )
