"""The trained weights as plain diffusers loads them: a LoRA, or the whole pipeline."""

import os
import shutil
from pathlib import Path

import torch

from common.errors import RunError
from common.models.family import Family
from common.reporting.files import remove_folder
from common.trainer import sharding
from common.trainer.processes import Processes


def write(model: Family, folder: Path, lora: bool, processes: Processes, shown: Path) -> str:
    """Write the trained weights into a folder, all processes together.

    shown: the folder as the user knows it. Returns the Python line that loads the weights from it.
    The folder is written beside its place and renamed. Raises RunError.
    """
    pipe = model.pipe
    modules = {name: getattr(pipe, name) for name in model.trainable}
    weights = {
        name: trained_weights(module, dtype=processes.dtype, lora=lora)
        for name, module in modules.items()
    }
    unfinished = folder.with_name(f".{folder.name}.tmp")

    def save() -> None:
        remove_folder(unfinished)
        try:
            if lora:
                _save_lora(model, unfinished, modules, weights)
            else:
                _save_pipeline(pipe, unfinished, modules, weights)
            _make_readable(unfinished)
            remove_folder(folder)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    reason = processes.together(processes.is_main, save)
    if reason:
        raise RunError(
            f"cannot write {shown} ({reason}). Is the disk full? --resume latest writes it again."
        )
    if lora:
        return f'pipe.load_lora_weights("{shown}")'
    return f'{type(pipe).__name__}.from_pretrained("{shown}")'


def trained_weights(
    module: torch.nn.Module, dtype: torch.dtype, lora: bool
) -> dict[str, torch.Tensor]:
    """Return a module's weights on the CPU, sharded ones put together by all processes.

    For a LoRA these are its own weights, else all, with those in float32 cast to dtype.
    """
    state = {}
    for name, value in module.state_dict().items():
        if lora and "lora_" not in name:
            continue
        value = sharding.whole(value)
        smaller = not lora and value.dtype == torch.float32
        state[name] = value.to("cpu", dtype if smaller else value.dtype)
    return state


def plain_copy(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module of the same class and configuration, without wrappers, with these weights."""
    from accelerate import init_empty_weights

    classes = type(module).__mro__
    plain = next(cls for cls in classes if cls.__module__.startswith(("diffusers", "worlds")))
    with init_empty_weights():
        copy = plain.from_config(module.config)
    copy.load_state_dict(state, assign=True)
    return copy


def _save_lora(model: Family, folder: Path, modules: dict, weights: dict) -> None:
    """Save a LoRA with alpha / rank multiplied into its second matrix.

    Loaders take the rank as alpha if a file names none, so all of them use the same scale. Loaders
    other than diffusers ignore alpha in its adapter metadata, and diffusers refuses tensors with
    alpha for some pipelines.
    """
    from peft import get_peft_model_state_dict

    layers = {}
    for name, state in weights.items():
        config = modules[name].peft_config["default"]
        layers[name] = {}
        for key, value in get_peft_model_state_dict(modules[name], state).items():
            scale = config.lora_alpha / config.r if "lora_B" in key else 1.0
            layers[name][key] = value * scale
    model.save_lora(folder, layers, config.lora_alpha)


def _save_pipeline(pipe: object, folder: Path, modules: dict, weights: dict) -> None:
    try:
        for name, state in weights.items():
            setattr(pipe, name, plain_copy(modules[name], state))
        pipe.save_pretrained(folder)
    finally:
        for name, module in modules.items():
            setattr(pipe, name, module)


def _make_readable(folder: Path) -> None:
    """Make files readable by others, as the umask allows it: safetensors does not."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            os.chmod(path, 0o666 & ~mask)
