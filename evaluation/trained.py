"""Find the trained weights in a run's folder, and load them into a model."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import cli, errors
from common.args import defaults
from common.errors import InputError
from common.models import lora
from common.models.family import Family
from common.trainer import checkpoint_files, run_folder, sharding

EXPORTS = ("export", "export_ema")


@dataclass
class Trained:
    """Name the weights of a run: a checkpoint or an export."""

    name: str  # in tables and file names
    folder: Path
    config: dict[str, Any]  # the run's config.json
    averaged: bool = False  # whether the moving average of the checkpoint is used

    def settings(self) -> cli.Args:
        """Return the run's settings that all scripts share."""
        return run_folder.taken_over(defaults(cli.Args, self.config["model"]), self.config)

    def identity(self) -> dict[str, str | int]:
        """Return values that identify the weights; later weights in the same folder differ."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {
            "folder": os.path.abspath(self.folder),
            "run": self.config.get("run", ""),
            "written": max((path.stat().st_mtime_ns for path in files), default=0),
            "averaged": self.averaged,
        }


# --- Finding weights ---


def find(spec: str | Path, averaged: bool = False) -> Trained:
    """Return the weights of RUN, RUN/checkpoints/step_NNNNNN, RUN/export or RUN/export_ema.

    RUN means its newest checkpoint, or else its export. averaged: use the checkpoint's moving
    average. Raises InputError.
    """
    path = Path(os.path.abspath(spec))
    run, folder = _split(path)
    config = _config(spec, run)
    if averaged and not config.get("ema"):
        raise InputError(f"--averaged: {run} has no moving average. It was trained without --ema.")
    if folder is None:
        folder = _newest(spec, run, averaged=averaged)
    elif not folder.is_dir():
        names = [checkpoint.name for checkpoint in checkpoint_files.newest_first(run)]
        has = ", ".join(names) or "no checkpoint"
        raise InputError(f"{spec}: there is no such folder. {run} has {has}.")
    elif averaged and folder.name in EXPORTS:
        raise InputError(
            f"{spec}: --averaged reads checkpoints. Name {run.name}/export_ema without it, or "
            f"{run.name}."
        )
    if folder.name not in EXPORTS:
        reason = _broken(folder)
        if reason:
            raise InputError(f"{spec}: not a checkpoint ({reason}). Name another one, or the run.")
    name = run.name if path == run else f"{run.name}-{folder.name}"
    if averaged:
        name += "-averaged"
    return Trained(name, folder, config, averaged)


def find_all(specs: Sequence[str], averaged: bool = False) -> list[Trained]:
    """Return the weights of several runs of one base model, with distinct names.

    Raises InputError.
    """
    found = [find(spec, averaged) for spec in specs]
    for spec, other in zip(specs[1:], found[1:]):
        if _base(other.config) != _base(found[0].config):
            raise InputError(
                f"{spec}: was trained from {other.config['model']}, {specs[0]} from "
                f"{found[0].config['model']}. Compare runs of one base model."
            )
    taken = {"base"}
    for weights in found:
        name, number = weights.name, 1
        while weights.name in taken:
            number += 1
            weights.name = f"{name}-{number}"
        taken.add(weights.name)
    return found


def _split(path: Path) -> tuple[Path, Path | None]:
    """Return the run's folder, and its checkpoint or export, None if `path` is the run itself."""
    if not (path / "config.json").exists():  # a run may be in a folder with one of these names
        if path.parent.name == "checkpoints":
            return path.parent.parent, path
        if path.name in EXPORTS:
            return path.parent, path
    return path, None


def _config(spec: str | Path, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise InputError(
            f"{spec}: {folder} is not the folder of a run, which has a config.json. Give the "
            "--output of a training run, RUN/checkpoints/step_NNNNNN, or RUN/export."
        )
    return run_folder.completed(config)


def _newest(spec: str | Path, folder: Path, averaged: bool) -> Path:
    """Return the newest complete checkpoint, else the export."""
    for checkpoint in checkpoint_files.newest_first(folder):
        if not _broken(checkpoint):
            return checkpoint
    export = folder / ("export_ema" if averaged else "export")
    if not export.is_dir():
        raise InputError(
            f"{spec}: it has neither a checkpoint nor an export. Train it first (--resume latest)."
        )
    return export


def _broken(folder: Path) -> str:
    """Return why a folder is not a complete checkpoint, "" if it is, without reading weights."""
    try:
        checkpoint_files.read(folder, names=())
    except checkpoint_files.Broken as error:
        return str(error)
    return ""


def _base(config: dict[str, Any]) -> str:
    """Return the base model of a run: a folder's real path, a name or a hub id."""
    source = config.get("source") or config["model"]
    return os.path.realpath(source) if os.path.isdir(source) else source


# --- Loading them ---


def load(model: Family, trained: Trained, autocast: bool = False) -> None:
    """Load trained weights into the model's trainable modules, in the modules' dtype.

    A LoRA from an earlier call is removed. autocast: whether forward passes run under autocast.
    Raises InputError if the weights do not fit.
    """
    for module in model.trainable.values():
        if getattr(module, "peft_config", None):
            module.unload_lora()
    with errors.loading(str(trained.folder), do="name another checkpoint, or the export"):
        if trained.folder.name in EXPORTS:
            _load_export(model, trained)
        else:
            _load_checkpoint(model, trained, autocast)
    for module in model.trainable.values():
        module.requires_grad_(False).eval()


def _load_export(model: Family, trained: Trained) -> None:
    if trained.config.get("lora_rank"):
        model.load_lora(trained.folder)
        return
    for name, module in model.trainable.items():
        exported = type(module).from_pretrained(trained.folder, subfolder=name, dtype=module.dtype)
        module.load_state_dict(exported.state_dict())


def _load_checkpoint(model: Family, trained: Trained, autocast: bool) -> None:
    settings = trained.settings()
    adapted = settings.lora_rank > 0
    names = ["ema"] if trained.averaged else []
    if adapted or not trained.averaged:
        names += model.trainable  # the names of a LoRA's weights give its layers
    _, states = checkpoint_files.read(trained.folder, names)
    missing = [name for name in names if name not in states]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if adapted:
        for name, module in model.trainable.items():
            lora.adapt(
                module,
                **{**settings.lora_settings(), "targets": lora.layers_of(states[name])},
                seed=0,  # its weights are replaced below
                learns=model.learns,
                autocast=autocast,
            )
    if trained.averaged:
        _copy_average(model, sharding.distribute(states["ema"])["shadow_params"], lora=adapted)
        return
    for name, module in model.trainable.items():
        _load_state(module, sharding.distribute(states[name]), lora=adapted)


def _load_state(module: torch.nn.Module, state: dict[str, torch.Tensor], lora: bool) -> None:
    expected = {name for name in module.state_dict() if "lora_" in name or not lora}
    if expected != state.keys():
        raise ValueError(f"it has {len(state)} weights, the model has {len(expected)}")
    if checkpoint_files.not_finite({"module": state}):
        raise ValueError("its weights are not finite")
    module.load_state_dict(state, strict=False)


def _copy_average(model: Family, average: list[torch.Tensor], lora: bool) -> None:
    """Copy the averages of diffusers' EMAModel: the trained weights of all modules, in order."""
    weights = []
    for module in model.trainable.values():
        for name, weight in module.named_parameters():
            if "lora_" in name if lora else model.learns(name):
                weights.append(weight)
    for weight, value in zip(weights, average, strict=True):
        weight.data.copy_(value)
