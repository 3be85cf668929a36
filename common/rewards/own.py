"""A reward of one's own: a class in a Python file, `path/to/file.py:Class` where others have a
name. What it has to have is in the head of __init__.py; here it is looked at, before any model is
loaded.

A file may import what lies beside it. A run's folder alone never makes such code run: see
common/trainer/run_folder.py."""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from common import errors
from common.errors import InputError

MARK = ".py:"  # where the file ends and the class begins


def load(source: str) -> Any:
    """An object of the class that `path/to/file.py:Class` names; raises InputError, whatever the
    file does."""
    path, _, name = source.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"reward {source}: there is no file {path}")
    module = _guarded(source, f"{path} does not load", lambda: _module(Path(path).resolve()))
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        own = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__
        ]
        classes = [key for key in own if isinstance(getattr(module, key), type)]
        raise InputError(
            f"reward {source}: {path} has no class {name!r}; it has {', '.join(classes) or 'none'}"
        )
    scorer = _guarded(source, f"{name}() fails", cls)
    if wrong := flaw(scorer):
        raise InputError(
            f"reward {source}: {wrong} (the head of common/rewards/__init__.py says what a "
            "reward has)"
        )
    return scorer


def flaw(scorer: Any) -> str:
    """What a scorer lacks to be a reward, "" if nothing. What `score` returns, asking.try_out looks
    at."""
    if not callable(getattr(scorer, "score", None)):
        return "it has no score(media, prompts)"
    if not isinstance(getattr(scorer, "video", None), bool):
        return "video must be True, if it scores clips whole, or False"
    scale = getattr(scorer, "scale", None)
    if not (_is_number(scale) and scale > 0):
        return "scale must be a number above 0, its typical standard deviation within a group"
    bounds = getattr(scorer, "range", None)
    pair = (
        isinstance(bounds, tuple | list)
        and len(bounds) == 2
        and all(b is None or _is_number(b) for b in bounds)
    )
    if not pair or None not in bounds and not bounds[0] < bounds[1]:
        return "range must be (lowest, highest) of its scores, None where there is no bound"
    fields = getattr(scorer, "fields", ())
    if not (isinstance(fields, tuple | list) and all(isinstance(field, str) for field in fields)):
        return 'fields must be names of fields of the prompts, as in ("text",)'
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _module(path: Path) -> ModuleType:
    """The file as a module of its own name, so that two files called alike are two."""
    name = re.sub(r"\W", "_", str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end: its neighbours hide nobody
    spec.loader.exec_module(module)
    return module


def _guarded(source: str, what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except BaseException as error:  # anybody's code: it may end the program
        if errors.from_a_signal(error):
            raise
        raise InputError(
            f"reward {source}: {what} ({type(error).__name__}: {errors.text(error)})"
        ) from error
