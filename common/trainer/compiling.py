"""Regional compilation (torch.compile of each class of blocks, and of the arithmetic around the
transformer) and attention kernels.

torch compiles a block twice, once for passes with gradients and once for those without, and the two
round differently: in bfloat16 the ratio would be off by more than the clip range. So a block always
computes as with gradients, and the rollout drops what is only kept for the backward pass. A block's
inputs always require gradients, as most do in the update, so that one graph serves every block.

Batches of another size than the run's (the last of an evaluation) are not compiled.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from common.args import Args
from common.errors import InputError, LocalError, described, loading, out_of_memory, text
from common.models.family import Family

CUDNN = torch.backends.cuda.cudnn_sdp_enabled()  # whether it was on before any change here
# inputs that gradients go through
STATES = (
    "hidden_states", "encoder_hidden_states", "temb", "temb_mod", "temb_mod_img", "temb_mod_txt"
)  # fmt: skip
_off = False


def check(device: torch.device) -> None:
    """Compile one line. Raises InputError if this machine cannot, or its cache is damaged."""
    from torch._inductor.utils import fresh_cache

    if torch._dynamo.config.disable:
        raise InputError(
            "--compile: TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE turns torch.compile off. "
            "Unset it, or leave --compile out."
        )
    failure = _failure(device)
    if failure is None:
        return
    with fresh_cache():
        torch._dynamo.reset()
        anew = _failure(device)
    if anew is None:
        raise InputError(
            f"--compile: the compiler's cache is damaged ({described(failure)}), as after a kill "
            f"while it compiled. {_delete()}."
        ) from failure
    needs = "install a C++ compiler (g++; on GPUs also Triton and Python's headers)"
    with loading("--compile: torch.compile", do=needs):
        raise anew


def _failure(device: torch.device) -> Exception | None:
    """Compile one line; return what it raised."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:
        return error
    return None


def _delete() -> str:
    """Return what to do with the compiler's cache, and with Triton's if it is elsewhere."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folders = [cache_dir()]
    triton = os.environ.get("TRITON_CACHE_DIR", "")
    if triton and Path(folders[0]) not in Path(triton).parents:
        folders.append(triton)
    return f"Delete {' and '.join(folders)}"


def compile_blocks(module: torch.nn.Module, classes: Sequence[str], rows: int) -> None:
    """Compile a module's blocks of these classes in place, for passes of `rows` or 2 * `rows` rows.

    Blocks without hidden_states (a U-Net's convolutions) stay as they are, and so do all names.
    """
    torch._dynamo.config.optimize_ddp = False  # splitting small blocks into buckets gains nothing
    for block in module.modules():
        if type(block).__name__ in classes:
            if "hidden_states" in inspect.signature(block.forward).parameters:
                block.forward = _compiled(block.forward, (rows, 2 * rows))


def region(function: Callable, rows: int) -> Callable:
    """Return a pure function of tensors, compiled as one region for `rows` rows.

    Its first argument has the rows. Scalars on another device are filled in on that of the first
    argument: inside of the region reading one would split it.
    """
    compiled = torch.compile(function)

    @functools.wraps(function)
    def call(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _off or len(first) != rows:
            return function(first, *args, **kwargs)
        here = [_on(first, value) for value in args]
        return _called(compiled, f"{function.__name__} does", first, *here, **kwargs)

    return call


def _on(x: torch.Tensor, value: Any) -> Any:
    """Return a scalar tensor on the device of x, and any other value as it is."""
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.device != x.device:
        return torch.full((), value.item(), dtype=value.dtype, device=x.device)
    return value


def asked_attention(backend: str) -> tuple[str, str]:
    """Return the attention kernel that a run takes by name, and the words that name it.

    backend: that of --attention. With "native", diffusers takes DIFFUSERS_ATTN_BACKEND.
    """
    variable = os.environ.get("DIFFUSERS_ATTN_BACKEND", "").lower()
    if backend == "native" and variable:
        return variable, f"DIFFUSERS_ATTN_BACKEND={variable}"
    return backend, f"--attention {backend}"


def check_attention(args: Args) -> None:
    """Raise InputError for an attention kernel by name that a run cannot take."""
    named, words = asked_attention(args.attention)
    kernels = get_args(get_type_hints(Args)["attention"])
    if named not in kernels:
        listed = ", ".join(kernels)
        raise InputError(f"{words}: only torch's kernels work ({listed}). Leave it out.")
    if named == "flex" and not args.compile:
        raise InputError(
            f"{words}: without --compile it would keep the whole attention matrix in memory. Add "
            "--compile, or leave it out."
        )


def settle_attention(model: Family, backend: str) -> None:
    """Turn off cuDNN's attention if it does not serve both rollout and update of a model.

    backend: that of --attention. Raises InputError if it or DIFFUSERS_ATTN_BACKEND asks for cuDNN's
    kernel then.
    """
    serves = model.cudnn_serves()
    torch.backends.cuda.enable_cudnn_sdp(CUDNN and serves)
    named, words = asked_attention(backend)
    if named == "_native_cudnn" and not serves:
        raise InputError(
            f"{words}: cuDNN's attention does not serve the backward pass of this model at this "
            "size. Leave it out."
        )


def set_attention(module: torch.nn.Module, backend: str) -> None:
    """Choose the attention kernels of a module, by diffusers' names. Raises InputError."""
    from diffusers.models.attention_dispatch import attention_backend

    processors = [getattr(part, "processor", None) for part in module.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise InputError(
            f"--attention {backend}: a {type(module).__name__} has no choice. Leave it out."
        )
    with loading("--attention", backend, do="install its package, or leave the flag out"):
        with attention_backend():  # else it would be the default of every other module, too
            module.set_attention_backend(backend)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Leave blocks uncompiled inside, to measure the plain model."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def _called(compiled: Callable, what: str, *args: Any, **kwargs: Any) -> Any:
    """Call a compiled function. Raises LocalError if it cannot be compiled.

    what: its name and the verb of the error's sentence.
    """
    try:
        return compiled(*args, **kwargs)
    except Exception as error:
        of_compiler = isinstance(error, torch._dynamo.exc.TorchDynamoException)
        if out_of_memory(error) or not (of_compiler or "Triton Error" in text(error)):
            raise
        raise LocalError(
            f"--compile: {what} not compile ({described(error)}). An earlier run that was "
            f"killed while it compiled leaves a damaged cache. {_delete()}, or leave --compile out"
        ) from error


def _compiled(forward: Callable, sizes: tuple[int, int]) -> Callable:
    compiled = torch.compile(forward, dynamic=False)
    parameters = inspect.signature(forward)

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
            found = _called(compiled, "a block does", *bound.args, **bound.kwargs)
        if not sampling:
            return found
        return (
            tuple(part.detach() for part in found) if isinstance(found, tuple) else found.detach()
        )

    return call
