"""Checkpoints of a run: folders OUTPUT/checkpoints/step_NNNNNN, each whole or not there at all. In this order,

    begin       clears a folder beside the final one
    put         writes states into it: NAME.pt, or each process its share of a sharded one, NAME.PART.pt
    publish     renames it, and removes the oldest checkpoints
    read        all of a checkpoint, by whatever number of processes it was written

of which the first three are the Runtime's `save`.
"""

import json
import os
import shutil
from dataclasses import dataclass

import torch


class Broken(ValueError):
    """A folder that is no checkpoint, or no longer one."""


@dataclass
class Pieces:
    """A tensor that several processes wrote: theirs in order, cut along the first dimension."""

    tensors: list


def begin(output, step):
    """The empty folder beside the checkpoint of a step, into which `put` writes. Raises OSError."""
    beside = _beside(output, step)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)


def put(output, step, states, part=None):
    """Writes {name: state}, with `part` the number of this process. Raises OSError or RuntimeError (torch's word for a
    full disk)."""
    for name, state in states.items():
        file_name = f"{name}.pt" if part is None else f"{name}.{part}.pt"
        with (_beside(output, step) / file_name).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # a machine that dies must not leave a renamed folder of empty files


def publish(output, step, parts, keep=0):
    """Makes what was put the checkpoint of a step, and removes the oldest ones beyond `keep`, 0: none. parts {name: how
    many processes wrote it, 0: it is not sharded}."""
    beside, final = _beside(output, step), output / "checkpoints" / f"step_{step:06d}"
    (beside / "checkpoint.json").write_text(json.dumps({"step": step, "parts": parts}))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    for folder in newest_first(output)[keep:] if keep else ():
        shutil.rmtree(folder, ignore_errors=True)


def discard(output, step):
    """Removes what was put: the checkpoints that were there before are all there still."""
    shutil.rmtree(_beside(output, step), ignore_errors=True)


def newest_first(output):
    """The folders of a run's checkpoints."""
    return sorted(output.glob("checkpoints/step_*"), reverse=True)


def read(folder):
    """-> (step, {name: state} on the CPU, sharded tensors as Pieces); raises Broken with the reason."""
    try:
        about = json.loads((folder / "checkpoint.json").read_text())
        step, parts = about["step"], dict(about["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Broken("it has no checkpoint.json that can be read") from None
    states = {}
    for name, number in parts.items():
        states[name] = (
            _join([_load(folder / f"{name}.{part}.pt", mmap=True) for part in range(number)])
            if number
            else _load(folder / f"{name}.pt")
        )
    return step, states


def _beside(output, step):
    return output / "checkpoints" / f".step_{step:06d}.tmp"


def _load(file, mmap=False):
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a broken file makes torch say
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Broken(f"its {file.name} does not load: {reason}") from None


def _join(parts):
    """The states that several processes wrote -> one, with Pieces for the tensors of which each wrote its share."""
    first = parts[0]
    if isinstance(first, dict):
        if first.keys() == {"shard"}:
            return Pieces([part["shard"] for part in parts])
        return {name: _join([part[name] for part in parts]) for name in first}
    return [_join(list(values)) for values in zip(*parts)] if isinstance(first, list) else first
