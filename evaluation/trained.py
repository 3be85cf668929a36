"""The trained weights of a run: where its folder has them, and putting them into a model to look
at."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cli
from common.errors import InputError, text
from common.trainer import checkpoints, placing, run_folder, sharding

if TYPE_CHECKING:
    import torch

    from common.models.family import Family
    from common.trainer.processes import Processes
EXPORTS = ("export", "export_ema")


@dataclass
class Trained:
    """Weights that a run left in a folder: a checkpoint, of which the moving average if `averaged`,
    or an export."""

    name: str  # what tables and files call them
    folder: Path
    config: dict[str, Any]  # of the run
    averaged: bool = False

    def settings(self) -> cli.Args:
        """The run's settings, as those that all scripts share."""
        model = self.config.get("model")
        return run_folder.taken_over(
            cli.defaults(cli.Args, *[model] * isinstance(model, str)), self.config
        )

    def identity(self) -> dict[str, str | int]:
        """What tells them from others that may come to lie in the same place."""
        written = max(
            (path.stat().st_mtime_ns for path in self.folder.rglob("*") if path.is_file()),
            default=0,
        )
        about = {
            "folder": os.path.abspath(self.folder),
            "run": self.config.get("run", ""),
            "written": written,
        }
        return {**about, "averaged": self.averaged}


def find(spec: str | Path, averaged: bool = False) -> Trained:
    """RUN, RUN/checkpoints/step_NNNNNN, RUN/export or RUN/export_ema -> Trained; of a RUN it is the
    newest checkpoint, or else the export; `averaged`: of a checkpoint the moving average. Raises
    InputError."""
    path = Path(os.path.abspath(spec))
    if (
        path.parent.name == "checkpoints" and not (path / "config.json").exists()
    ):  # a run may lie in such a folder
        run, folder = path.parent.parent, path
    elif path.name in EXPORTS and not (path / "config.json").exists():
        run, folder = path.parent, path
    else:
        run, folder = path, None
    config = _config(spec, run)
    if averaged and not config.get("ema"):
        raise InputError(f"--averaged: {run} keeps no moving average; it was trained without --ema")
    if folder is None:
        folder = _newest(spec, run, averaged)
    elif not folder.is_dir():
        has = ", ".join(found.name for found in checkpoints.newest_first(run)) or "no checkpoint"
        raise InputError(f"{spec}: there is no such folder; {run} has {has}")
    elif averaged and folder.name in EXPORTS:
        raise InputError(
            f"{spec}: --averaged reads checkpoints; name {run.name}/export_ema without it, or "
            f"{run.name}"
        )
    if folder.name not in EXPORTS and (reason := _flaw(folder)):
        raise InputError(f"{spec}: it is no checkpoint ({reason}); name another one, or the run")
    named = "" if path == run else f"-{folder.name}"
    return Trained(f"{run.name}{named}{'-averaged' * averaged}", folder, config, averaged)


def find_all(specs: Sequence[str], averaged: bool = False) -> list[Trained]:
    """Those of several runs of one base model, under names of their own. Raises InputError."""
    found = [find(spec, averaged) for spec in specs]
    for spec, other in zip(specs[1:], found[1:]):
        models = [
            _source(weights.config.get("source") or weights.config.get("model"))
            for weights in (found[0], other)
        ]
        if models[0] != models[1]:
            raise InputError(
                f"{spec} was trained from {other.config.get('model')}, {specs[0]} from "
                f"{found[0].config.get('model')}: "
                "compare runs of one base model"
            )
    for i, weights in enumerate(found):
        taken = {"base", *(other.name for other in found[:i])}
        name, number = weights.name, 1
        while weights.name in taken:
            number += 1
            weights.name = f"{name}-{number}"
    return found


def load(run: "Processes | None", model: "Family", trained: Trained) -> None:
    """Puts them into the model's trainable modules, in the dtype that those have; a LoRA that was
    there goes. run: only a LoRA's checkpoint needs it. Raises InputError where they do not fit."""
    for module in model.trainable.values():
        if getattr(module, "peft_config", None):
            module.unload_lora()
    rank = trained.config.get("lora_rank", 0)
    try:
        if trained.folder.name in EXPORTS:
            return _load_export(model, trained.folder, rank)
        names = ["ema"] if trained.averaged else list(model.trainable)
        _, states = checkpoints.read(trained.folder, names)
        if missing := [name for name in names if name not in states]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if rank:
            placing.adapt(run, model, trained.config.get("lora_targets", ""), rank)
        modules = {name: module for name, module in model.trainable.items()}
        if trained.averaged:
            return _copy_average(model, sharding.deal(states["ema"])["shadow_params"], rank)
        for name, module in modules.items():
            _load_state(module, sharding.deal(states[name]), rank)
    except InputError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError, OSError) as error:
        raise InputError(
            f"{trained.folder} does not fit the model, or is broken: {text(error)}"
        ) from None
    finally:
        for module in model.trainable.values():
            module.requires_grad_(False).eval()


def _load_state(module: "torch.nn.Module", state: "dict[str, torch.Tensor]", rank: int) -> None:
    expected = {name for name in module.state_dict() if not rank or "lora_" in name}
    if expected != state.keys():
        raise ValueError(f"it has {len(state)} weights, the model has {len(expected)}")
    if any(not value.isfinite().all() for value in state.values() if value.is_floating_point()):
        raise ValueError("it holds values that are no numbers")
    module.load_state_dict(state, strict=False)


def _copy_average(model: "Family", average: "list[torch.Tensor]", rank: int) -> None:
    """What diffusers' EMAModel keeps: the trained weights of all modules, in their order."""
    named = [pair for module in model.trainable.values() for pair in module.named_parameters()]
    weights = [
        weight for name, weight in named if ("lora_" in name if rank else model.learns(name))
    ]
    for weight, value in zip(weights, average, strict=True):
        weight.data.copy_(value)


def _load_export(model: "Family", folder: Path, rank: int) -> None:
    if rank:
        return model.load_lora(folder)
    for name, module in model.trainable.items():
        exported = type(module).from_pretrained(folder, subfolder=name, dtype=module.dtype)
        module.load_state_dict(exported.state_dict())


def _config(spec: str | Path, run: Path) -> dict[str, Any]:
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise InputError(
            f"{spec}: {run} is no run's folder, it has no config.json of one; give the --output "
            "of a training run, "
            "RUN/checkpoints/step_NNNNNN, or RUN/export"
        )
    return config


def _newest(spec: str | Path, run: Path, averaged: bool) -> Path:
    """The newest checkpoint that is one; else the export."""
    whole = [folder for folder in checkpoints.newest_first(run) if not _flaw(folder)]
    if whole:
        return whole[0]
    export = run / ("export_ema" if averaged else "export")
    if not export.is_dir():
        raise InputError(
            f"{spec}: it has neither a checkpoint nor an export yet; train it first (--resume "
            "latest)"
        )
    return export


def _flaw(folder: Path) -> str:
    try:
        checkpoints.read(folder, ())
    except checkpoints.Broken as error:
        return str(error)
    return ""


def _source(model: str) -> str:
    return os.path.realpath(model) if os.path.isdir(model) else model
