"""Runs scripts one after another in the processes of one launch: several_runs.py FILE, with FILE a
JSON list of command lines; "two machines" before one makes two of four processes a machine.
Starting processes takes longer than such runs do."""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import editing  # noqa: F401, small areas
import smooth  # noqa: F401, more names for --reward
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from common import cli, errors, sde


def out_of_memory_in_the_second_process(honest, calls=5):
    """A rollout that fails there in the call after these."""
    left = [calls]

    def rollout(*words, **settings):
        left[0] -= 1
        if PartialState().process_index == 1 and left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(*words, **settings)

    return rollout


if __name__ == "__main__":
    launched = dict(os.environ)
    close = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda self, group=None: (
        None
    )  # each run would close it for the next
    rollout = sde.rollout
    for words in json.loads(Path(sys.argv[1]).read_text()):
        sde.rollout = rollout
        if words[0] == "out of memory":
            words, sde.rollout = words[1:], out_of_memory_in_the_second_process(rollout)
        os.environ.update(launched)
        if words[0] == "two machines":
            words, os.environ["LOCAL_WORLD_SIZE"] = words[1:], "2"
        script = importlib.import_module(Path(words[0]).stem)
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        sys.argv = words
        errors.run(script.main, cli.parse(script.Args, script.__doc__))
    close(PartialState())  # or threads of gloo outlive what they use
