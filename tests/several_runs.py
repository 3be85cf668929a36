"""Runs scripts one after another in the processes of one launch: several_runs.py FILE, with FILE a JSON list of command
lines. Starting processes takes longer than such runs do."""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import smooth  # noqa: F401, more names for --reward
from accelerate.state import AcceleratorState, GradientState, PartialState

from common import arguments

if __name__ == "__main__":
    launched = dict(os.environ)
    close = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda self, group=None: None  # each run would close it for the next
    for words in json.loads(Path(sys.argv[1]).read_text()):
        script = importlib.import_module(Path(words[0]).stem)
        os.environ.update(launched)
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        sys.argv = words
        script.main(arguments.parse(script.Args, script.__doc__))
    close(PartialState())  # or threads of gloo outlive what they use
