"""Host memory while processes load a model, and turns when it does not suffice for all at once.

diffusers and transformers map safetensors into memory, and processes share these pages. Weights of
another dtype than the run's are converted: each process holds a copy until it has moved or sharded
the model.
"""

import fcntl
import json
import math
import os
import tempfile
from pathlib import Path

import torch

from common.args import Args
from common.errors import InputError, loading
from common.memory.bytes import (
    ON_THE_HOST,
    Launch,
    latent_bytes,
    latents_on_host,
    module_bytes,
    modules,
    number,
    weight_bytes,
)
from common.models.family import CURE, Family

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
LOCK = Path(tempfile.gettempdir()) / f"vgrpo-loading-{os.getuid()}.lock"


class Turn:
    """The right to load, from its creation to `end`; other processes of this user wait for it.

    It ends with the process, too. In between, processes must not wait for one another.
    """

    def __init__(self) -> None:
        self.file = open(LOCK, "w", encoding="utf-8")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def end(self) -> None:
        """Let the next process load."""
        self.file.close()


def in_turns(name: str, peak: float, kept: float, free: float) -> bool:
    """Return whether the processes of this machine must load one after another.

    name: the model's; peak: bytes of host memory that each process takes while it loads;
    kept: bytes that it keeps afterwards; free: bytes that are free before any of them loads. Raises
    InputError if turns do not suffice.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if max(peak, kept) + (processes - 1) * kept > free:
        raise InputError(
            f"--model {name}: loading it in {processes} processes needs {peak / 2**30:.1f} GiB of "
            f"this machine's memory, and {kept / 2**30:.1f} GiB for each process that has loaded; "
            f"{free / 2**30:.1f} GiB are free. Start fewer processes on each machine "
            "(--num_processes), leave out --offload-encoders, or use a machine with more memory."
        )
    return processes * peak > free


def loading_bytes(
    model: Family, args: Args, launch: Launch, shards: int, keep_initial: bool
) -> tuple[float, float]:
    """Return the bytes of host memory that a process takes: (while loading, kept afterwards).

    Encoders that come back from a GPU are in the memory of their process. Before, they were in that
    of the files, which processes share. Large latents are kept from the first step on.

    args: with what was chosen; shards: processes that share one copy of the weights, 1 when the
    weights are not sharded.
    """
    on_gpu = launch.device == "cuda"
    sharded = launch.sharded or shards > 1
    if not on_gpu and not sharded:
        return 0, 0  # the copies are the run's weights, and counted as such
    copies = copied(model)
    peak = sum(copies.values())
    kept = 0
    for name, size in copies.items():
        if not on_gpu and name not in model.trainable:
            kept += size
    if on_gpu and args.offload_encoders:
        for name, part in modules(model):
            if name in model.encoders:
                kept += module_bytes(part)
    if latents_on_host(model, args, launch):
        # The allocator of pinned memory rounds up to a power of two.
        kept += 2 ** math.ceil(math.log2(latent_bytes(model, args, launch)))
    if sharded and (not on_gpu or launch.offloads):
        kinds = weight_bytes(
            model,
            args,
            launch.dtype.itemsize,
            shards=shards,
            sharded=True,
            keep_initial=keep_initial,
        )
        kept += sum(kinds[name] for name in ON_THE_HOST)
    if sharded and keep_initial and not args.lora_rank:
        # The initial weights are sharded from a copy of the module.
        peak += launch.dtype.itemsize * max(map(number, model.trainable.values()))
    return peak, kept


def copied(model: Family) -> dict[str, int]:
    """Return the bytes that a process copies of each component, {name: bytes}.

    The model is an outline whose files are complete.
    """
    found = {}
    for name, part in modules(model):
        wanted = next((weight.dtype for weight in part.parameters()), None)
        if wanted is None:
            found[name] = 0
            continue
        mapped = 0
        for file in _weight_files(Path(model.source) / name):
            mapped += sum(size for dtype, size in _tensors(file) if DTYPES.get(dtype) == wanted)
        found[name] = wanted.itemsize * max(0, number(part) - mapped)
    return found


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of a component's weights, without variants (NAME.fp16.safetensors)."""
    return [file for file in folder.glob("*.safetensors") if file.name.count(".") == 1]


def _tensors(file: Path) -> list[tuple[str, int]]:
    """Return [(safetensors' name of the dtype, number of elements)], read from a file's header."""
    with loading("model", file, do=CURE), open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return [(entry["dtype"], torch.Size(entry["shape"]).numel()) for entry in header.values()]
