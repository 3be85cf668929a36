"""Load a reward from a user's file, `path/to/file.py:Class`.

The docstring of __init__.py describes the class. The file may import other files of its folder. A
run's folder never makes such code run: with --resume the reward must be named again. The global
switches that it sets are its own (switches.py).
"""

import importlib.util
import math
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from common import errors
from common.errors import InputError
from common.rewards.switches import Switches

MARK = ".py:"  # between the file and the class


def load(source: str) -> Any:
    """Return an object of the class `path/to/file.py:Class`. Raises InputError."""
    path, _, name = source.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"reward {source}: there is no file {path}. Correct the path.")
    switches = Switches()
    with errors.loading("reward", source, do="correct the file"), switches:
        module = _imported(Path(path).resolve())
        cls = getattr(module, name, None)
        if not isinstance(cls, type):
            raise InputError(f"reward {source}: the file has no class {name!r}. Correct the name.")
        scorer = cls()
    scorer.switches = switches
    wrong = flaw(scorer)
    if wrong:
        raise InputError(f"reward {source}: {wrong}. Read the head of common/rewards/__init__.py.")
    return scorer


def apart(scorer: Any) -> AbstractContextManager:
    """Return the context in which a scorer is called: the `Switches` of one from a file."""
    return getattr(scorer, "switches", nullcontext())


def flaw(scorer: Any) -> str:
    """Return what is wrong with a scorer, "" if nothing. Rewards.smoke_test checks its scores."""
    if not callable(getattr(scorer, "score", None)):
        return "it has no score(media, prompts)"
    if not isinstance(getattr(scorer, "video", None), bool):
        return "video must be True if it scores whole clips, else False"
    scale = getattr(scorer, "scale", None)
    if not _is_number(scale) or scale <= 0:
        return "scale must be a number above 0, the typical standard deviation within a group"
    bounds = getattr(scorer, "range", None)
    if not _is_range(bounds):
        return "range must be (lowest, highest) of its scores, with None for no bound"
    fields = getattr(scorer, "fields", ())
    if not isinstance(fields, tuple | list) or not all(isinstance(field, str) for field in fields):
        return 'fields must be names of fields of the prompts, as in ("text",)'
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(bounds: Any) -> bool:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        return False
    numbers = [bound for bound in bounds if bound is not None]
    return all(map(_is_number, numbers)) and (len(numbers) < 2 or numbers[0] < numbers[1])


def _imported(path: Path) -> ModuleType:
    """Return the file as a module named after its path, so that equal file names do not clash."""
    name = re.sub(r"\W", "_", str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: its neighbours hide no installed package
    spec.loader.exec_module(module)
    return module
