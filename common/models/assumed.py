"""Check what a family assumes of the configurations in a folder.

A family computes with one kind of scheduler, latent and input. A folder that means another one
would mostly run all the same, on the defaults of its classes, and compute something else. So a
family names what it assumes (Family.assumed), and a missing or another value is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError

# a tuple of values, in which None stands for a missing one, or a type: int, float, list
Values = tuple | type
TYPES = {int: "an integer", float: "a number", list: "a list"}


def require(file: Path, config: Mapping[str, Any], name: str, values: Values) -> None:
    """Raise InputError unless a configuration's value is one of those that a family assumes.

    file: the configuration's, for the error; values: see Values.
    """
    found = config.get(name)
    if _fits(found, values):
        return
    wanted = TYPES[values] if isinstance(values, type) else " or ".join(map(_word, values))
    has = f"has {name} {found!r:.60}" if name in config else f"has no {name}"
    raise InputError(f"model: {file} {has}. Supported is {wanted}. Give another --model.")


def flow(scheduler: Mapping[str, Any]) -> dict[str, Values]:
    """Return what a scheduler must have for a model that predicts the velocity of a flow.

    scheduler: its configuration. FlowMatch classes have a shift, others say what is predicted. The
    timestep is 1000 sigma.
    """
    assumed = {"num_train_timesteps": (1000,), "invert_sigmas": (None, False)}
    if str(scheduler.get("_class_name")).startswith("FlowMatch"):
        return {**assumed, "shift": float}
    return {**assumed, "prediction_type": ("flow_prediction",), "use_flow_sigmas": (True,)}


def _fits(found: Any, values: Values) -> bool:
    if not isinstance(values, type):
        return found in values
    kinds = (int, float) if values is float else values
    return isinstance(found, kinds) and not isinstance(found, bool)


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
