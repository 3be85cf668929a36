"""The files of a checkpoint: OUTPUT/checkpoints/step_NNNNNN, complete or absent.

checkpoint.json    {"step": finished steps, "parts": {name: number of files, 0 if not sharded}}
NAME.pt            a state: the optimizer, a trained module, a method's own
NAME.PART.pt       one process's shard of it

A checkpoint is written in this order: `begin` makes a folder beside the final one, `put` writes
into it, `publish` renames it. `read` loads one, written by any number of processes, without running
code from it (torch.load with weights_only; torch's distributed checkpoint unpickles its metadata).
"""

import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from common.reporting.files import remove_folder


class Broken(ValueError):
    """A folder that is not a complete checkpoint."""


@dataclass
class Pieces:
    """A tensor that several processes wrote, cut along its first dimension, in their order."""

    tensors: list[torch.Tensor]


# --- Writing ---


def begin(output: Path, step: int) -> None:
    """Make the empty folder that `put` writes into. Raises OSError."""
    for left in output.glob("checkpoints/.step_*.old"):  # by remove_folder
        shutil.rmtree(left, ignore_errors=True)
    unfinished = _unfinished(output, step)
    remove_folder(unfinished)
    unfinished.mkdir(parents=True)


def put(output: Path, step: int, states: dict[str, dict], part: int | None = None) -> None:
    """Write states {name: state}; part: the number of this shard.

    Raises OSError, or RuntimeError, which torch raises on a full disk.
    """
    for name, state in states.items():
        file_name = f"{name}.pt" if part is None else f"{name}.{part}.pt"
        with (_unfinished(output, step) / file_name).open("wb") as file:
            torch.save(state, file)
            _sync(file)


def publish(output: Path, step: int, parts: dict[str, int], keep: int = 0) -> None:
    """Rename what was put, and remove the oldest checkpoints beyond `keep` (0 keeps all).

    parts: {name: number of files, 0 if not sharded}. Raises OSError.
    """
    unfinished = _unfinished(output, step)
    with (unfinished / "checkpoint.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "parts": parts}))
        _sync(file)
    _rename(unfinished, output, step)
    if keep:  # a later one is broken, or resuming would not have come here
        own = [folder for folder in newest_first(output) if number_of(folder) <= step]
        for folder in own[keep:]:
            shutil.rmtree(folder, ignore_errors=True)


def discard(output: Path, step: int) -> None:
    """Remove what was put. Earlier checkpoints are not touched."""
    shutil.rmtree(_unfinished(output, step), ignore_errors=True)


def copy(checkpoint: Path, output: Path, step: int) -> None:
    """Make another run's checkpoint the first of this run. Raises OSError.

    Files are hard links where the disk allows it: a checkpoint's files are never written again.
    """
    begin(output, step)
    unfinished = _unfinished(output, step)
    shutil.copytree(checkpoint, unfinished, copy_function=_link, dirs_exist_ok=True)
    _rename(unfinished, output, step)


def _sync(file: IO) -> None:
    """Write a file to the disk now: a power failure must not leave a renamed folder without it."""
    file.flush()
    os.fsync(file.fileno())


def _rename(unfinished: Path, output: Path, step: int) -> None:
    """Make a complete folder the checkpoint of this step, in the place of an earlier one."""
    final = output / "checkpoints" / name_of(step)
    remove_folder(final)
    os.replace(unfinished, final)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy(source, target)


# --- Names ---


def name_of(step: int) -> str:
    """Return the folder's name of a step's checkpoint."""
    return f"step_{step:06d}"


def number_of(folder: Path) -> int | None:
    """Return the step in a checkpoint's name; None for another name."""
    match = re.fullmatch("step_([0-9]+)", folder.name)
    return int(match[1]) if match else None


def newest_first(output: Path) -> list[Path]:
    """Return the folders of a run's checkpoints."""
    folders = [path for path in output.glob("checkpoints/step_*") if number_of(path) is not None]
    return sorted(folders, key=number_of, reverse=True)


def _unfinished(output: Path, step: int) -> Path:
    return output / "checkpoints" / f".{name_of(step)}.tmp"


# --- Reading ---


def read(folder: Path, names: Collection[str] | None = None) -> tuple[int, dict[str, dict]]:
    """Return the step and {name: state} on the CPU, sharded tensors as Pieces.

    names: which states, None for all. Raises Broken with the reason.
    """
    try:
        about = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        step, parts = int(about["step"]), dict(about["parts"])
        if not parts:
            raise ValueError("its checkpoint.json names no parts")
        states = {}
        for name, number in parts.items():
            if names is None or name in names:
                states[name] = _read(folder, name, number)
        return step, states
    except MemoryError:
        raise
    except Exception as error:  # whatever a broken file makes json and torch raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Broken(reason) from error


def not_finite(states: dict[str, dict], rank: int = 0, world: int = 1) -> str:
    """Return the name of a state with a tensor that is not finite, "" if there is none.

    Each of `world` processes looks at its share of the tensors.
    """
    tensors = [(name, tensor) for name, state in states.items() for tensor in _tensors(state)]
    for name, tensor in tensors[rank::world]:
        if not tensor.isfinite().all():
            return name
    return ""


def _read(folder: Path, name: str, number: int) -> dict:
    if not number:
        return _load(folder / f"{name}.pt")
    # the first missing file raises: a broken checkpoint.json may name a billion of them
    return _join([_load(folder / f"{name}.{part}.pt") for part in range(number)])


def _load(file: Path) -> dict:
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise ValueError(f"{file.name} holds a {type(state).__name__} instead of a state")
    return state


def _join(parts: list) -> Any:
    """Return one state from those of several processes, with Pieces for the sharded tensors."""
    first = parts[0]
    if isinstance(first, dict):
        if first.keys() == {"shard"}:
            return Pieces([part["shard"] for part in parts])
        return {name: _join([part[name] for part in parts]) for name in first}
    if isinstance(first, list):
        return [_join(list(values)) for values in zip(*parts)]
    return first


def _tensors(state: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in a tree of dictionaries, lists and Pieces."""
    if isinstance(state, Pieces):
        state = state.tensors
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        return [leaf for part in state for leaf in _tensors(part)]
    return [state] if torch.is_tensor(state) and state.is_floating_point() else []
