"""Choose how a run fits into memory.

Pure functions of the settings, the model's shapes and the free bytes: nothing is measured, printed
or loaded here. The ways to run are tried in the order of what they cost in speed. A later way is
chosen if the earlier ones do not fit, or leave room for so few rows that passes are slow.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from common.args import Args, rows_of
from common.memory import activations, bytes
from common.memory.bytes import Launch
from common.memory.turns import Turn
from common.models.family import Family

# Share of the free memory that a run may take by count. The workspace of kernels and the
# allocator's gaps are not counted.
ROOM = 0.9
# The same for a pass of more than one row: what is not counted grows with the rows.
FILL = 0.75
# A slower way is chosen if its passes have at least this many times the rows.
GAIN = 4
# Rows of a pass beyond which more rows hardly reduce the time of each. They do not count as a gain.
ENOUGH = 8


@dataclass(frozen=True)
class MemoryPlan:
    """How a run fits into memory."""

    args: Args
    """The settings with what was chosen; micro_batch and decode_batch are numbers above 0."""
    batch: int
    """Rows of every forward pass, at most args.micro_batch."""
    sharded: bool = False
    """Whether trained weights are sharded, as the launcher asked or as was chosen."""
    shards: int = 1
    """Processes that share one copy of sharded weights."""
    host_latents: bool = False
    """Whether the latents of a step are in the host's memory, because they are large."""
    lines: tuple[str, ...] = ()
    """What to print: the choices, or a larger micro-batch that would fit."""
    turn: Turn | None = None
    """To be ended when the model is on its device, when processes load one after another."""


@dataclass(frozen=True)
class Way:
    """One way to run."""

    args: Args
    """The settings with what this way turns on."""
    shards: int
    """Processes that share one copy of the weights; 1: not sharded."""
    chosen: tuple[str, ...] = ()
    """What this way turns on, in words."""

    def turned_on(self, name: str) -> "Way":
        """Return this way with one more setting turned on."""
        args = dataclasses.replace(self.args, **{name: True})
        flag = "--" + name.replace("_", "-")
        return Way(args, self.shards, chosen=(*self.chosen, flag))

    def sharded(self, shards: int, words: str) -> "Way":
        """Return this way with the weights sharded over so many processes."""
        return Way(self.args, shards, chosen=(*self.chosen, words))


@dataclass
class Counter:
    """Counts the bytes of one process for several settings of the same model and launch."""

    model: Family
    """An outline, with the LoRA that is trained, if any."""
    launch: Launch
    keep_initial: bool = False
    """Whether a copy of the initial weights is kept."""
    rewards: int = 0
    """Bytes of the reward models."""
    row_bytes: dict[bool, int] = field(default_factory=dict)
    """Bytes of a pass of one row, with gradient checkpointing (True) and without. They are kept
    because a count takes seconds."""
    decoded_bytes: int | None = None
    """Bytes of decoding one row, once they are counted."""

    def kinds(self, way: Way, rows: int) -> dict[str, float]:
        """Return the bytes by kind, with passes of so many rows."""
        return bytes.process_bytes(
            self.model,
            way.args,
            launch=self.launch,
            shards=way.shards,
            keep_initial=self.keep_initial,
            activations=rows * self._row(way),
            decoding=self._decoded(),
            rewards=self.rewards,
        )

    def total(self, way: Way, rows: int) -> float:
        """Return the bytes of the moment that needs the most."""
        return bytes.total(self.kinds(way, rows))

    def fits(self, way: Way, rows: int, free: float) -> bool:
        """Return whether passes of so many rows leave enough of the free memory.

        A pass of several rows has the margin FILL. The visit of the encoders and decoding do not
        need it: they take what is counted, whatever the rows.
        """
        kinds = self.kinds(way, rows)
        pass_fits = rows == 1 or bytes.at_pass(kinds) <= FILL * free
        return pass_fits and bytes.total(kinds) <= ROOM * free

    def _row(self, way: Way) -> int:
        """Return the bytes of a pass of one row."""
        if self.launch.sharded:
            sharding_checkpoints = self.launch.checkpointing
        else:
            sharding_checkpoints = way.shards > 1  # as configs/fsdp2.yaml does
        checkpointing = way.args.gradient_checkpointing or sharding_checkpoints
        if checkpointing not in self.row_bytes:
            found = activations.row_bytes(self.model, self.launch.dtype, checkpointing)
            self.row_bytes[checkpointing] = found
        return self.row_bytes[checkpointing]

    def _decoded(self) -> int:
        """Return the bytes of decoding one row."""
        if self.decoded_bytes is None:
            self.decoded_bytes = activations.decoded_bytes(self.model)
        return self.decoded_bytes


def plan(args: Args, counter: Counter, free: float) -> MemoryPlan | None:
    """Return the chosen way to run, with the rows of a pass; None if no way fits.

    free: bytes of memory that each process can take.

    On GPUs --micro-batch auto takes as many rows as fit, a power of two.
    """
    launch = counter.launch
    asked = resolved(args)
    share = args.prompts_per_step * args.group_size // launch.world
    batch = batch_size(asked, share)
    fitting = [way for way in ways(asked, launch) if counter.total(way, batch) <= ROOM * free]
    if not fitting:
        return None
    grows = args.micro_batch == "auto" and launch.device == "cuda"
    way = fitting[0]
    rows = most_rows(counter, way, free=free, share=share)
    for later in fitting[1:] if grows else []:
        if rows >= ENOUGH or later.shards != way.shards:
            break  # sharding makes every pass wait for the other processes
        more = most_rows(counter, later, free=free, share=share)
        if min(more, ENOUGH) >= GAIN * rows:
            way, rows = later, more

    chosen = list(way.chosen)
    lines = []
    if rows > batch and grows:
        way = dataclasses.replace(way, args=dataclasses.replace(way.args, micro_batch=rows))
        chosen.append(f"--micro-batch {rows}")
    if chosen:
        memory = f"{ROOM * free / 2**30:.1f} GiB of memory for each process"
        lines.append(f"{args.model}: chose {', '.join(chosen)} for {memory}")
    if rows > batch and not grows:
        flags = f"--micro-batch {rows} --decode-batch {asked.decode_batch}"
        lines.append(f"{args.model}: {rows} rows a pass would also fit and be faster: {flags}")
    return MemoryPlan(
        way.args,
        batch=batch_size(way.args, share),
        sharded=launch.sharded or way.shards > 1,
        shards=way.shards,
        host_latents=bytes.latents_on_host(counter.model, way.args, launch),
        lines=tuple(lines),
    )


def as_asked(args: Args, launch: Launch) -> MemoryPlan:
    """Return the plan of a run for which nothing is chosen, such as that of a small model."""
    found = resolved(args)
    share = args.prompts_per_step * args.group_size // launch.world
    return MemoryPlan(
        found,
        batch=batch_size(found, share),
        sharded=launch.sharded,
        shards=launch.per_machine if launch.sharded else 1,
    )


def ways(args: Args, launch: Launch) -> list[Way]:
    """Return the ways to run, fastest first: each saves memory on top of the one before."""
    found = [Way(args, shards=launch.per_machine if launch.sharded else 1)]
    if not args.offload_encoders:
        found.append(found[-1].turned_on("offload_encoders"))
    if not args.gradient_checkpointing:
        found.append(found[-1].turned_on("gradient_checkpointing"))
    if launch.world == 1:
        return found
    if not launch.sharded:
        found.append(found[-1].sharded(launch.per_machine, "sharded"))
    if not args.exchange_often:
        found.append(found[-1].turned_on("exchange_often"))
    if launch.world > launch.per_machine:
        found.append(found[-1].sharded(launch.world, "sharded over all machines"))
    return found


def most_rows(counter: Counter, way: Way, free: float, share: int) -> int:
    """Return the rows of the largest pass that fits, a power of two.

    free: bytes of memory; share: rows of a step on each process, at which the search ends.
    """
    rows = 1
    while 2 * rows <= share:
        args = dataclasses.replace(way.args, micro_batch=2 * rows)
        larger = dataclasses.replace(way, args=args)
        if not counter.fits(larger, 2 * rows, free):
            break
        rows *= 2
    return rows


# --- Rows of a pass ---


def resolved(args: Args) -> Args:
    """Return the settings with --micro-batch auto as 1 and --decode-batch 0 as a micro-batch."""
    micro_batch = rows_of(args.micro_batch)
    decode_batch = args.decode_batch or micro_batch
    return dataclasses.replace(args, micro_batch=micro_batch, decode_batch=decode_batch)


def batch_size(args: Args, share: int) -> int:
    """Return the rows of every forward pass of a process, at most --micro-batch.

    share: rows of a step on each process. Rollout and update use the same number of rows, because
    kernels round differently for other shapes. Either the rollout or a minibatch is divided evenly,
    whichever computes fewer padding rows.
    """
    kept = args.best_of or args.group_size
    minibatch = math.ceil(share / args.group_size * math.ceil(kept / args.minibatches))
    sizes = []
    for rows in (share, minibatch):
        passes = math.ceil(rows / args.micro_batch)
        sizes.append(math.ceil(rows / passes))

    def cost(size: int) -> int:
        rollout = math.ceil(share / size) * size
        # A backward pass takes as long as two forward passes.
        update = 3 * args.minibatches * math.ceil(minibatch / size) * size
        return rollout + update

    return min(sizes, key=cost)
