"""Checkpoints of a run: folders OUTPUT/checkpoints/step_NNNNNN, each whole or not there at all. In
this order,

    begin       clears a folder beside the final one
    put         writes states into it: NAME.pt, or each process its share of a sharded one, NAME.PART.pt
    publish     renames it, and removes the oldest checkpoints
    read        all of a checkpoint, by whatever number of processes it was written

of which the first three are what `Saving.save` (saving.py) does.
"""

import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class Broken(ValueError):
    """A folder that is no checkpoint, or no longer one."""


@dataclass
class Pieces:
    """A tensor that several processes wrote: theirs in order, cut along the first dimension."""

    tensors: list[torch.Tensor]


def begin(output: Path, step: int) -> None:
    """Makes the empty folder beside the checkpoint of a step, into which `put` writes. Raises
    OSError."""
    beside = _beside(output, step)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)


def put(output: Path, step: int, states: dict[str, dict], part: int | None = None) -> None:
    """Writes {name: state}, with `part` the number of this process. Raises OSError or RuntimeError
    (torch's word for a full disk)."""
    for name, state in states.items():
        file_name = f"{name}.pt" if part is None else f"{name}.{part}.pt"
        with (_beside(output, step) / file_name).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(
                file.fileno()
            )  # a machine that dies must not leave a renamed folder of empty files


def publish(output: Path, step: int, parts: dict[str, int], run: str = "", keep: int = 0) -> None:
    """Makes what was put the checkpoint of a step, or raises OSError; removes the oldest ones
    beyond `keep` that this run wrote, 0: none. parts {name: how many processes wrote it, 0: not
    sharded}; run: its name in config.json."""
    beside, final = _beside(output, step), output / "checkpoints" / name_of(step)
    (beside / "checkpoint.json").write_text(json.dumps({"step": step, "parts": parts, "run": run}))
    if not _wrote(final, run, or_nobody=True):
        _make_way(final)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    own = [folder for folder in newest_first(output) if _wrote(folder, run)]
    for folder in own[keep:] if keep else ():
        shutil.rmtree(folder, ignore_errors=True)


def discard(output: Path, step: int) -> None:
    """Removes what was put: the checkpoints that were there before are all there still."""
    shutil.rmtree(_beside(output, step), ignore_errors=True)


def copy(folder: Path, output: Path, step: int) -> None:
    """Another run's checkpoint as this one's first. Its files are linked where the disk can: no
    checkpoint is ever written to again. Raises OSError."""
    beside, final = _beside(output, step), output / "checkpoints" / name_of(step)
    if not os.path.exists(final):
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(folder, beside, copy_function=_link)
        os.replace(beside, final)


def name_of(step: int) -> str:
    """The folder's name of a step's checkpoint."""
    return f"step_{step:06d}"


def number_of(folder: Path) -> int | None:
    """The step that a checkpoint's name says; None if that is no name of a checkpoint."""
    match = re.fullmatch("step_([0-9]+)", folder.name)
    return match and int(match[1])


def newest_first(output: Path) -> list[Path]:
    """The folders of a run's checkpoints, by their numbers. What lies beside them under other names
    is somebody's."""
    folders = [
        folder for folder in output.glob("checkpoints/step_*") if number_of(folder) is not None
    ]
    return sorted(folders, key=number_of, reverse=True)


def read(folder: Path, names: Collection[str] | None = None) -> tuple[int, dict[str, dict]]:
    """-> (step, {name: state} on the CPU, sharded tensors as Pieces), of those `names` that it has,
    or of all; raises Broken with the reason."""
    about, states = _about(folder), {}
    for name, number in about["parts"].items():
        if names is not None and name not in names:
            continue
        try:
            states[name] = (
                _join([_load(folder / f"{name}.{part}.pt", mmap=True) for part in range(number)])
                if number
                else _load(folder / f"{name}.pt")
            )
        except (KeyError, TypeError, IndexError):
            raise Broken(f"the parts of its {name} do not belong together") from None
    return about["step"], states


def flaw(states: dict[str, dict], process: int = 0, processes: int = 1) -> str:
    """Why states are none to go on from: a tensor with something in it that is no number; "" if
    there is none. Each of `processes` looks at its share of the tensors."""
    tensors = [(name, tensor) for name, state in states.items() for tensor in _tensors(state)]
    for name, tensor in tensors[process::processes]:
        if not tensor.isfinite().all():
            return f"its {name} holds values that are no numbers"
    return ""


def _about(folder: Path) -> dict:
    """checkpoint.json: {"step", "parts", "run"}; raises Broken."""
    try:
        about = json.loads((folder / "checkpoint.json").read_text())
    except (OSError, ValueError, RecursionError):
        raise Broken("it has no checkpoint.json that can be read") from None
    step, parts = (
        (about.get(name) for name in ("step", "parts")) if isinstance(about, dict) else (None, None)
    )
    if (
        not _natural(step)
        or not isinstance(parts, dict)
        or not parts
        or not all(map(_natural, parts.values()))
    ):
        raise Broken("its checkpoint.json names no step, or no parts")
    return about


def _natural(number: Any) -> bool:
    return type(number) is int and number >= 0


def _wrote(folder: Path, run: str, or_nobody: bool = False) -> bool:
    """Whether this run wrote a folder, as the checkpoint that its name says."""
    try:
        about = _about(folder)
    except Broken:
        return or_nobody
    return about.get("run") == run and folder.name == name_of(about["step"])


def _make_way(folder: Path) -> None:
    """Another name for a folder, which is not this run's to remove."""
    number = 1
    while os.path.exists(other := folder.with_name(f"{folder.name}_other_{number}")):
        number += 1
    os.replace(folder, other)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that knows no links
        shutil.copy(source, target)


def _beside(output: Path, step: int) -> Path:
    return output / "checkpoints" / f".{name_of(step)}.tmp"


def _load(file: Path, mmap: bool = False) -> dict:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a broken file makes torch say
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Broken(f"its {file.name} does not load: {reason}") from None
    if not isinstance(state, dict):
        raise Broken(f"its {file.name} holds a {type(state).__name__}, no state")
    return state


def _join(parts: list) -> Any:
    """The states that several processes wrote -> one, with Pieces for the tensors of which each
    wrote its share."""
    first = parts[0]
    if isinstance(first, dict):
        if first.keys() == {"shard"}:
            return Pieces([part["shard"] for part in parts])
        return {name: _join([part[name] for part in parts]) for name in first}
    return [_join(list(values)) for values in zip(*parts)] if isinstance(first, list) else first


def _tensors(state: Any) -> list[torch.Tensor]:
    """The tensors of numbers with a point in a tree of dictionaries, lists and Pieces."""
    if isinstance(state, Pieces):
        state = state.tensors
    if isinstance(state, (dict, list)):
        return [
            leaf
            for part in (state.values() if isinstance(state, dict) else state)
            for leaf in _tensors(part)
        ]
    return [state] if torch.is_tensor(state) and state.is_floating_point() else []
