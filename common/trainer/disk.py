"""Bytes on the disk that a run's checkpoints and export need. They take plain values."""

import math
import shutil
from pathlib import Path
from typing import Literal

from common.errors import InputError

AUTO_STEPS = 20  # steps between checkpoints for --save-every auto, unless steps take long


def checkpoint_bytes(trained: int, ema: bool) -> int:
    """Return the bytes of one checkpoint: `trained` float32 weights, two moments and the EMA."""
    copies = 4 if ema else 3
    return 4 * trained * copies


def export_bytes(trained: int, pipeline: int, lora: bool, ema: bool) -> int:
    """Return the bytes of the export.

    trained: number of trained weights; pipeline: bytes of all its weights as they are exported.
    With EMA, the averaged weights are exported as well.
    """
    one = 4 * trained if lora else pipeline
    return 2 * one if ema else one


def checkpoints_at_once(
    steps: int, save_every: int | Literal["auto"], keep: int, start: int = 0
) -> int:
    """Return the largest number of checkpoints of steps `start` to `steps` on the disk at once.

    keep: --keep-checkpoints, 0 keeps all. One more exists while the oldest is not yet deleted.
    """
    every = AUTO_STEPS if save_every == "auto" else save_every
    saves = math.ceil(steps / every) - start // every if every else 1
    return min(saves, keep + 1) if keep else saves


def check(output: Path, checkpoint: int, number: int, export: int) -> None:
    """Raise InputError if checkpoints and export do not fit on the disk of the run's folder.

    checkpoint, export: bytes of one; number: of checkpoints. The folder need not exist.
    """
    folders = (output, *output.absolute().parents)
    usage = shutil.disk_usage(next(folder for folder in folders if folder.exists()))
    free = usage.free
    if not free and not usage.total:  # a mounted bucket, for example, does not know its size
        return
    if checkpoint * number + export > free:
        raise InputError(
            f"--output {output}: {number} checkpoints of {checkpoint / 2**30:.2f} GiB and an "
            f"export of {export / 2**30:.2f} GiB do not fit on the disk, which has "
            f"{free / 2**30:.2f} GiB free. Set --keep-checkpoints, a larger --save-every, or "
            "another --output."
        )
