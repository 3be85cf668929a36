"""The trained weights as plain diffusers reads them."""

import torch
from accelerate import init_empty_weights

from common import sharding


def write(run, folder):
    """All processes together: the LoRA, or the whole trained pipeline, into a folder; returns the line that loads it.
    Raises OSError."""
    pipe, lora = run.model.pipe, run.args.lora_rank
    modules = {name: getattr(pipe, name) for name in run.model.trainable}
    weights = {name: trained_weights(module, run, lora) for name, module in modules.items()}
    if run.is_main and lora:
        from peft import get_peft_model_state_dict

        layers = {name: get_peft_model_state_dict(modules[name], state) for name, state in weights.items()}
        run.model.save_lora(folder, layers)
    elif run.is_main:
        for name, state in weights.items():
            setattr(pipe, name, plain_copy(modules[name], state))
        pipe.save_pretrained(folder)
        for name, module in modules.items():
            setattr(pipe, name, module)
    run.accelerator.wait_for_everyone()
    return f'pipe.load_lora_weights("{folder}")' if lora else f'{type(pipe).__name__}.from_pretrained("{folder}")'


def trained_weights(module, run, lora):
    """All processes together: for the main one a module's state on the CPU, whole; of a LoRA its weights, else all,
    with those in float32 in the run's dtype. For the others nothing."""
    state = {}
    for name, value in module.state_dict().items():
        if not lora or "lora_" in name:
            value = sharding.whole(value)
            if run.is_main:
                smaller = not lora and value.dtype == torch.float32
                state[name] = value.to("cpu", run.dtype if smaller else value.dtype)
    return state


def plain_copy(module, state):
    """A module of the same class and configuration with these weights, as it was before anything wrapped it."""
    cls = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("diffusers"))
    with init_empty_weights():
        copy = cls.from_config(module.config)
    copy.load_state_dict(state, assign=True)
    return copy
