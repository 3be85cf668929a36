"""Checkpoints of a run: folders OUTPUT/checkpoints/step_NNNNNN, each whole or not there at all."""

import json
import os
import shutil

import torch


class Broken(ValueError):
    """A folder that is no checkpoint, or no longer one."""


def write(output, step, states, keep=0):
    """Saves {name: state} as the checkpoint of a step, and removes the oldest ones beyond `keep`, 0: none.

    It is written beside and renamed, so a killed process leaves no half of one. Raises OSError or RuntimeError (torch's
    word for a full disk); the checkpoints that were there are still there then.
    """
    final = output / "checkpoints" / f"step_{step:06d}"
    beside = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, state in states.items():
            with (beside / f"{name}.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # a machine that dies must not leave a renamed folder of empty files
        (beside / "checkpoint.json").write_text(json.dumps({"step": step, "names": sorted(states)}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for folder in newest_first(output)[keep:] if keep else ():
        shutil.rmtree(folder, ignore_errors=True)


def newest_first(output):
    """The folders of a run's checkpoints."""
    return sorted(output.glob("checkpoints/step_*"), reverse=True)


def read(folder):
    """-> (step, {name: state} on the CPU); raises Broken with the reason."""
    try:
        about = json.loads((folder / "checkpoint.json").read_text())
        step, names = about["step"], about["names"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Broken("it has no checkpoint.json that can be read") from None
    states = {}
    for name in names:
        try:
            states[name] = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a broken file makes torch say
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise Broken(f"its {name}.pt does not load: {reason}") from None
    return step, states
