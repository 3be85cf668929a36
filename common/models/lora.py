"""Add a LoRA to a trained module, with peft: a new one, or one from a file."""

import copy
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from common import errors
from common.errors import InputError
from common.models.family import Family

TRAINED = "default"  # peft's name of the LoRA that is trained
INITIAL = "initial"  # peft's name of its frozen copy


def adapt_model(
    model: Family,
    *,
    targets: str,
    rank: int,
    alpha: float,
    seed: int,
    init: str = "",
    autocast: bool = False,
) -> None:
    """Add a LoRA to every trained module of a model, as `adapt` does.

    targets: a regular expression, or "" for the model's own layers. init: the file or folder of a
    LoRA to start from, whose layers replace targets, or "". Raises InputError.
    """
    loaded = _read(model, init, rank=rank, alpha=alpha) if init else {}
    for name, module in model.trainable.items():
        adapt(
            module,
            layers_of(loaded[name]) if init else targets or model.lora_targets,
            rank=rank,
            alpha=alpha,
            seed=seed,
            learns=model.learns,
            autocast=autocast,
        )
        if init:
            module.load_state_dict(loaded[name], strict=False)


def adapt(
    module: torch.nn.Module,
    targets: str,
    *,
    rank: int,
    alpha: float,
    seed: int,
    learns: Callable[[str], bool],
    autocast: bool = False,
) -> None:
    """Add a LoRA with float32 weights to the layers whose name matches `targets`, in place.

    alpha: a layer adds alpha / rank times the product of the LoRA's two matrices.

    requires_grad of the other weights stays as it is. learns(name): whether gradients reach a
    weight, as Family.learns. autocast: passes run under autocast, so peft does not cast inputs to
    float32, which autocast would cast back. Raises InputError for targets that are not a regular
    expression, match no layer, or match one whose output is not used.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    torch.manual_seed(seed)  # the same weights on every process
    with errors.loading("--lora-targets", targets, do="--list-models prints those of each family"):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        module.add_adapter(config)
    for name, weight in module.named_parameters():
        if weight.requires_grad and not learns(name):
            layer = name.partition(".lora_")[0]
            raise InputError(
                f"--lora-targets {targets}: it matches {layer}, whose output is not used. Leave "
                "this layer out."
            )
    cast_training_params(module, dtype=torch.float32)
    if autocast:
        for part in module.modules():
            if hasattr(part, "cast_input_dtype_enabled"):
                part.cast_input_dtype_enabled = False


def layers_of(weights: Iterable[str]) -> str:
    """Return a regular expression of exactly the layers whose LoRA weights have these names."""
    layers = {name.partition(".lora_")[0] for name in weights if ".lora_" in name}
    return "|".join(map(re.escape, sorted(layers)))


def keep_initial(module: torch.nn.Module) -> None:
    """Add a frozen copy of a module's LoRA, to which module.set_adapter(INITIAL) switches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        module.add_adapter(copy.deepcopy(module.peft_config[TRAINED]), INITIAL)
    module.set_adapter(TRAINED)
    weights = dict(module.named_parameters())
    for name, weight in weights.items():
        if f".{INITIAL}." in name:
            weight.data = weights[name.replace(f".{INITIAL}.", f".{TRAINED}.")].data.clone()


def _read(
    model: Family, path: str, *, rank: int, alpha: float
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the LoRA weights of a file or folder, {trained module: {name: tensor}}.

    diffusers loads the LoRA into the model as in a plain pipeline, then it is removed. The file may
    scale each layer by something other than alpha / rank, so the second matrices are rescaled.
    """
    from common.models import folder  # it imports diffusers and transformers

    do = "give a LoRA that was trained for this model"
    sizes = _sizes(model)
    with errors.loading("--init-lora", path, do=do), folder.quiet_libraries():
        files = model.load_lora(path)
    for name, part in model.pipe.components.items():
        if name not in model.trainable and getattr(part, "peft_config", None):
            raise InputError(
                f"--init-lora {path}: it changes the {name} too, which is not trained here. Leave "
                "these layers out of the file, or merge it into the model."
            )
    found = {}
    for name, module in model.trainable.items():
        if not getattr(module, "peft_config", None):
            raise InputError(f"--init-lora {path}: it has no layers of the {name} of this model.")
        found[name] = _taken_out(module, name, model, files[name], rank=rank, alpha=alpha)
    if _sizes(model) != sizes:  # diffusers makes layers of FLUX larger for a LoRA that needs it
        raise InputError(
            f"--init-lora {path}: its layers are larger than those of this model. Give a LoRA that "
            "was trained for this model."
        )
    return found


def _sizes(model: Family) -> dict[str, torch.Size]:
    """Return the shapes of the weights of the trained modules, without those of a LoRA."""
    modules = torch.nn.ModuleDict(model.trainable).named_parameters()
    return {name: weight.shape for name, weight in modules if ".lora_" not in name}


def _taken_out(
    module: torch.nn.Module, name: str, model: Family, file: Path, rank: int, alpha: float
) -> dict[str, torch.Tensor]:
    """Remove the LoRA that was loaded into a module, and return its weights, {name: tensor}.

    Raises InputError for what cannot be trained further.
    """
    from peft import get_peft_model_state_dict

    (adapter,) = module.peft_config
    scaling = {}
    for layer, part in module.named_modules():
        if adapter in getattr(part, "scaling", ()):
            scaling[layer] = part.scaling[adapter]
    loaded = get_peft_model_state_dict(module, adapter_name=adapter)
    module.unload_lora()
    saved = _saved(file, name.removesuffix("_2"))
    unknown = [key for key in saved if ".lora_A." in key and key not in loaded]
    if unknown:
        raise InputError(f"--init-lora {file}: the {name} of this model has no {unknown[0]}.")
    weights = {}
    for key, value in loaded.items():
        layer, _, matrix = key.partition(".lora_")
        if not model.learns(key):
            continue  # its output is not used
        if matrix not in ("A.weight", "B.weight") or value.shape["AB".index(matrix[0])] != rank:
            raise InputError(
                f"--init-lora {file}: {key} of shape {list(value.shape)} is not of a LoRA of rank "
                f"{rank}. Merge it into the model, and train that (--model FOLDER)."
            )
        exact = saved.get(key, value)  # the model's dtype may have rounded it
        if exact.shape != value.shape:  # diffusers fills up smaller ones for FLUX
            raise InputError(
                f"--init-lora {file}: {key} has shape {list(exact.shape)}, this model needs "
                f"{list(value.shape)}. Give a LoRA that was trained for this model."
            )
        if not value.is_meta and not value.isfinite().all():
            raise InputError(f"--init-lora {file}: {key} is not finite. Give another LoRA.")
        if not value.is_meta and torch.equal(exact.to(value), value):
            value = exact
        factor = scaling[layer] * rank / alpha if matrix[0] == "B" else 1.0
        weights[f"{layer}.lora_{matrix[0]}.{TRAINED}.weight"] = value.float() * factor
    return weights


def _saved(file: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file under a component's name, without that name."""
    from safetensors.torch import load_file

    start = f"{prefix}."
    tensors = load_file(file).items()
    return {key.removeprefix(start): value for key, value in tensors if key.startswith(start)}
