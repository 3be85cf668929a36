"""Regional compilation of the trained modules: torch.compile of each class of blocks, in rollout
and update the same.

torch compiles a block twice, once for passes without gradients and once for those with, and the two
round otherwise: in bfloat16 the ratio would be off by more than the clip range. So a block computes
as with gradients in every pass, and the rollout drops what is only kept for the backward pass. Its
inputs ask for gradients in any case, as most do in the update: one graph serves the first block of
a LoRA, too.

Batches of another shape than the run's (an evaluation's last) are not compiled anew: they take the
blocks as they were."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch

from common.errors import InputError, text

STATES = (
    "hidden_states",
    "encoder_hidden_states",
    "temb",
)  # a block's inputs that gradients go through
_off = False


def check(device: torch.device) -> None:
    """Compiles a line. Raises InputError where this machine cannot: torch wants a C++ compiler, on
    GPUs Triton and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever is missing
        raise InputError(
            f"--compile: torch cannot compile on this machine ({text(error):.200}); it wants a "
            "C++ compiler (g++; on "
            "GPUs Triton and Python's headers as well); install them, or leave --compile out"
        ) from None


def compile_blocks(module: torch.nn.Module, classes: Sequence[str], rows: int) -> None:
    """In place, the blocks of a module, of these classes: those that take hidden_states (of a U-Net
    the transformers, not its convolutions), in passes of `rows` rows, or twice as many. Names and
    weights stay as they are."""
    torch._dynamo.config.optimize_ddp = (
        False  # blocks are small: nothing is gained by splitting them into buckets
    )
    for block in module.modules():
        if (
            type(block).__name__ in classes
            and "hidden_states" in inspect.signature(block.forward).parameters
        ):
            block.forward = _compiled(block.forward, (rows, 2 * rows))


def set_attention(module: torch.nn.Module, backend: str) -> None:
    """Has a module's attention computed by these kernels, by diffusers' name for them. Raises
    InputError where they are missing, and for a module that leaves no choice."""
    if not any(
        hasattr(getattr(part, "processor", None), "_attention_backend") for part in module.modules()
    ):
        raise InputError(
            f"--attention {backend}: of a {type(module).__name__} it cannot be chosen; leave it out"
        )
    try:
        module.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:  # a package is missing
        raise InputError(f"--attention {backend}: {text(error):.300}") from None


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside, blocks are as they were: a compiled one cannot be differentiated twice."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def _compiled(forward: Callable, sizes: tuple[int, int]) -> Callable:
    compiled, parameters = torch.compile(forward, dynamic=False), inspect.signature(forward)

    def call(*args, **kwargs) -> torch.Tensor | tuple[torch.Tensor, ...]:
        bound = parameters.bind(*args, **kwargs)
        inputs = bound.arguments
        if _off or len(inputs["hidden_states"]) not in sizes:
            return forward(*args, **kwargs)
        for name in STATES:
            if inputs.get(name) is not None and not inputs[name].requires_grad:
                inputs[name] = inputs[name].detach().requires_grad_()
        sampling = not torch.is_grad_enabled()
        with torch.enable_grad():
            found = compiled(*bound.args, **bound.kwargs)
        if not sampling:
            return found
        return (
            tuple(part.detach() for part in found) if isinstance(found, tuple) else found.detach()
        )

    return call
