"""The trained weights as plain diffusers reads them."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError

from common.errors import RunError
from common.trainer import sharding

if TYPE_CHECKING:  # which imports this file
    from common.trainer.runtime import Runtime


def write(run: "Runtime", folder: Path) -> str:
    """All processes together: the LoRA, or the whole trained pipeline, into a folder; returns the
    line that loads it. It is written beside and moved, so that who stops it leaves the one before.
    Raises RunError."""
    pipe, lora = run.model.pipe, run.args.lora_rank
    modules = {name: getattr(pipe, name) for name in run.model.trainable}
    weights = {name: trained_weights(module, run, lora) for name, module in modules.items()}
    beside, reason = folder.with_name(f".{folder.name}.tmp"), ""
    try:
        if run.is_main:
            shutil.rmtree(beside, ignore_errors=True)
            save(run, beside, modules, weights)
            shutil.copytree(beside, folder, copy_function=_move, dirs_exist_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = f"{error}"
    finally:
        if run.is_main:
            shutil.rmtree(beside, ignore_errors=True)
    if reason := run.first(reason):
        raise RunError(
            f"cannot write {folder} ({reason}); is the disk full? --resume latest writes it once "
            "more"
        )
    return (
        f'pipe.load_lora_weights("{folder}")'
        if lora
        else f'{type(pipe).__name__}.from_pretrained("{folder}")'
    )


def save(
    run: "Runtime",
    folder: Path,
    modules: dict[str, torch.nn.Module],
    weights: dict[str, dict[str, torch.Tensor]],
) -> None:
    """The weights {name: state} of the pipeline's trained modules {name: module}, as files."""
    pipe = run.model.pipe
    if run.args.lora_rank:
        from peft import get_peft_model_state_dict

        layers = {
            name: get_peft_model_state_dict(modules[name], state) for name, state in weights.items()
        }
        return run.model.save_lora(folder, layers)
    try:
        for name, state in weights.items():
            setattr(pipe, name, plain_copy(modules[name], state))
        pipe.save_pretrained(folder)
    finally:
        for name, module in modules.items():
            setattr(pipe, name, module)


def _move(source: str, target: str) -> None:
    """safetensors makes its files readable by their owner alone; others shall load a model as they
    may read the run."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(source, 0o666 & ~mask)
    os.replace(source, target)


def trained_weights(module: torch.nn.Module, run: "Runtime", lora: int) -> dict[str, torch.Tensor]:
    """All processes together: for the main one a module's state on the CPU, whole; of a LoRA (its
    rank `lora` is above 0) its weights, else all, with those in float32 in the run's dtype. For the
    others nothing."""
    state = {}
    for name, value in module.state_dict().items():
        if not lora or "lora_" in name:
            value = sharding.whole(value)
            if run.is_main:
                smaller = not lora and value.dtype == torch.float32
                state[name] = value.to("cpu", run.dtype if smaller else value.dtype)
    return state


def plain_copy(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module of the same class and configuration with these weights, as it was before anything
    wrapped it."""
    cls = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("diffusers"))
    with init_empty_weights():
        copy = cls.from_config(module.config)
    copy.load_state_dict(state, assign=True)
    return copy
