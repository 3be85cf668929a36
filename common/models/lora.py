"""Add a LoRA to a trained module, with peft."""

from collections.abc import Callable

import torch

from common import errors
from common.errors import InputError
from common.models.family import Family


def adapt_model(
    model: Family, *, targets: str, rank: int, alpha: float, seed: int, autocast: bool = False
) -> None:
    """Add a LoRA to every trained module of a model, as `adapt` does; "" are its own targets."""
    for module in model.trainable.values():
        adapt(
            module,
            targets or model.lora_targets,
            rank=rank,
            alpha=alpha,
            seed=seed,
            learns=model.learns,
            autocast=autocast,
        )


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
