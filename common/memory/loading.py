"""What the processes of a machine take of its memory while they load a model, and turns where that
is too much at once.

diffusers and transformers map safetensors into memory, so that processes share their pages. Weights
of another dtype than the run's are converted: every process has a copy, until it has moved it to
its GPU or sharded it."""

import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.errors import InputError

if TYPE_CHECKING:  # it loads more than torch
    from common.models.family import Family

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
LOCK = Path(tempfile.gettempdir()) / f"vgrpo-loading-{os.getuid()}.lock"


def copied(model: "Family") -> dict[str, int]:
    """Bytes that a process copies of each part of a model, {name: bytes}: of an outline, whose
    files are all there."""
    found = {}
    for name, part in model.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            wanted = next((weight.dtype for weight in part.parameters()), None)
            files = _weights(Path(model.source) / name)
            same = sum(
                size
                for file in files
                for dtype, size in _elements(file)
                if DTYPES.get(dtype) == wanted
            )
            number = sum(weight.numel() for weight in part.parameters())
            found[name] = wanted.itemsize * max(0, number - same) if wanted else 0
    return found


def _weights(folder: Path) -> list[Path]:
    """The files of a part's weights; no variants (NAME.fp16.safetensors)."""
    return [file for file in folder.glob("*.safetensors") if file.name.count(".") == 1]


def _elements(file: Path) -> list[tuple[str, int]]:
    """[(safetensors' name of a dtype, number of elements)] of the tensors in a file, by its
    head."""
    with open(file, "rb") as opened:
        head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [
        (about["dtype"], torch.Size(about["shape"]).numel())
        for key, about in head.items()
        if key != "__metadata__"
    ]


def by_turns(name: str, each: int, stays: float) -> bool:
    """Whether the processes of this machine have to load one after another: each copies `each`
    bytes, of which it keeps `stays`. Raises InputError where that does not fit either."""
    import psutil

    processes, have = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), psutil.virtual_memory().available
    if each + (processes - 1) * stays > have:
        raise InputError(
            f"--model {name}: {processes} processes on this machine keep {stays / 2**30:.1f} GiB "
            "of its memory each, "
            f"and loading takes {each / 2**30:.1f} for a while, {have / 2**30:.1f} GiB are free; "
            "start fewer processes "
            "on each machine (--num_processes), leave --offload-encoders out, or take a machine "
            "with more memory"
        )
    return processes * each > have


class Turn:
    """This process's turn, from its beginning to `end`: while one has it, other processes of this
    user wait here. It ends with the process, however that ends. Between, processes must not wait
    for one another."""

    def __init__(self) -> None:
        self.file = open(LOCK, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def end(self) -> None:
        """Lets the next process load."""
        self.file.close()
