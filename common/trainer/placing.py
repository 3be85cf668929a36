"""Where the parts of a model stand before anything is computed: encoders and VAE on their device;
what is trained or sampled with moved, sharded or compiled, with a LoRA or without."""

import re
from typing import TYPE_CHECKING

import torch

from common.errors import InputError
from common.trainer import compiling, sharding

if TYPE_CHECKING:  # they load more than torch
    from common.models.family import Family
    from common.trainer.processes import Processes
    from common.trainer.runtime import Runtime


def adapt(run: "Processes", model: "Family", targets: str, rank: int) -> None:
    """Adds a LoRA of this rank with float32 weights to the layers of the trained modules that a
    regular expression names; "": the family's. Raises InputError for one that names none, or a
    layer whose output is not used."""
    for module in model.trainable.values():
        _adapt(run, model, module, targets or model.lora_targets, rank)


def _adapt(
    run: "Processes", model: "Family", module: torch.nn.Module, targets: str, rank: int
) -> None:
    from peft import LoraConfig

    torch.manual_seed(run.args.seed)  # the same one on every process
    try:
        module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    except (ValueError, re.error) as error:  # no layer of that name, or no regular expression
        raise InputError(f"--lora-targets {targets!r}: {error}") from None
    for name, weight in module.named_parameters():
        if weight.requires_grad and not model.learns(name):
            layer = name.partition(".lora_")[0]
            raise InputError(
                f"--lora-targets {targets!r}: it names {layer}, whose output is not used; leave "
                "it out"
            )
    for weight in trained(module):
        weight.data = weight.data.float()
    for part in module.modules() if run.precision != "no" else ():
        if hasattr(part, "cast_input_dtype_enabled"):
            part.cast_input_dtype_enabled = False  # to float32, and autocast would cast it back


def settle(run: "Processes", model: "Family") -> None:
    """Moves what is not trained to the device; with --offload-encoders text and image encoders wait
    on the CPU."""
    for name, module in model.pipe.components.items():
        if isinstance(module, torch.nn.Module) and name not in model.trainable:
            waits = run.args.offload_encoders and name in model.encoders
            module.requires_grad_(False).eval().to("cpu" if waits else run.device)


def place(run: "Processes", model: "Family") -> None:
    """Moves all of the model to the device, to sample and not to train. model.trainable then holds
    what to call."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=run.precision, cpu=run.device.type == "cpu")
    settle(run, model)
    for name, module in model.trainable.items():
        module.requires_grad_(False).eval().to(run.device)
        model.trainable[name] = accelerator.prepare_model(module, evaluation_mode=True)


def put(run: "Runtime", module: torch.nn.Module, model: "Family") -> torch.nn.Module:
    """Moves a module to the device, or shards it there; with --compile its blocks are compiled."""
    if run.args.compile:
        compiling.compile_blocks(module, model.blocks, run.batch)
    if run.sharding:
        return sharding.shard(module, model.blocks, run.sharding, run.mesh, run.dtype)
    return module.to(run.device)


def trained(module: torch.nn.Module) -> list[torch.Tensor]:
    """The weights of a module that are trained."""
    return [weight for weight in module.parameters() if weight.requires_grad]
