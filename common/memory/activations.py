"""Bytes that passes need beside the weights, counted allocation by allocation on tensors without
contents."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from common import sde
from common.models.family import Family

# Operations that autocast computes in float32 on CUDA and in the given precision on a CPU:
# AT_FORALL_FP32 of ATen/autocast_mode.h, as far as models use them.
FLOAT32 = (
    "exp", "log", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar",
    "softplus", "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "cosine_similarity",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
)  # fmt: skip
# Their results alone are float32 (AT_FORALL_FP32_SET_OPT_DTYPE).
FLOAT32_RESULTS = ("softmax.int", "log_softmax.int", "cumsum", "cumprod", "sum", "sum.dim_IntList")


class Allocations(TorchDispatchMode):
    """Add up the bytes of the tensors that are allocated inside, until they are freed.

    live: bytes now; peak: the most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation, and count the storages that it makes."""
        given = {id(storage) for storage in _storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if id(storage) not in given and storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return found

    def _freed(self, size: int) -> None:
        self.live -= size


def row_bytes(model: Family, dtype: torch.dtype, checkpointing: bool) -> int:
    """Return the bytes that one row's pass of the update takes at its peak.

    Weights, their gradients and their copies in the precision of the pass are not included; the
    second forward pass of classifier-free guidance is. The weights may be on the meta device.
    """
    module = model.trainable[model.trained_at(1.0)]
    # the model takes its device from the VAE
    with without_contents(module, model.pipe.vae):
        return count(model, dtype, checkpointing)


def decoded_bytes(model: Family) -> int:
    """Return the bytes that decoding one row takes at its peak, with its pixels."""
    with without_contents(model.pipe.vae):
        return count_decoded(model)


def count(model: Family, dtype: torch.dtype, checkpointing: bool) -> int:
    """Return what `row_bytes` returns, for a model whose weights are on the CPU."""
    module = model.trainable[model.trained_at(1.0)]
    handles = []
    for weight in module.parameters():
        if weight.requires_grad:
            handles.append(weight.register_post_accumulate_grad_hook(_drop_gradient))
    if checkpointing:
        module.enable_gradient_checkpointing()
    try:
        with Allocations() as found, cuda_rules():
            x = torch.zeros(1, *model.noise_shape)
            with autocast(dtype):
                velocity = _velocity(model, x)
            _, log_prob, _ = sde.sde_step(velocity, x, 0.9, 0.8, 0.3, x_next=torch.zeros_like(x))
            log_prob.sum().backward()
            return found.peak
    finally:
        if checkpointing:
            module.disable_gradient_checkpointing()
        for handle in handles:
            handle.remove()


def count_decoded(model: Family) -> int:
    """Return what `decoded_bytes` returns, for a model whose weights are on the CPU."""
    with Allocations() as found, torch.no_grad():
        model.pixels(torch.zeros(1, *model.noise_shape))
        return found.peak


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Return the context of the model's passes, for tensors on the CPU."""
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def cuda_rules() -> Iterator[None]:
    """Apply CUDA's rules of autocast to CPU tensors inside."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in FLOAT32:
            library.impl(name, _in_float32(_operation(name)), "AutocastCPU")
        for name in FLOAT32_RESULTS:
            library.impl(name, _to_float32(_operation(name)), "AutocastCPU")
        yield


def _operation(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _in_float32(operation: Callable) -> Callable:
    """Return an operation that first casts 16-bit inputs to float32."""

    def cast(value: Any) -> Any:
        is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if is_half else value

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _no_autocast():
            args, kwargs = tree_map(cast, (args, kwargs))
            return operation(*args, **kwargs)

    return kernel


def _to_float32(operation: Callable) -> Callable:
    """Return an operation whose result for 16-bit inputs is float32, unless dtype is given."""

    def kernel(
        first: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if dtype is None and first.dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float32
        with _no_autocast():
            return operation(first, *args, dtype=dtype, **kwargs)

    return kernel


def _no_autocast() -> Any:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(key)


def _velocity(model: Family, x: torch.Tensor) -> torch.Tensor:
    """Return the velocity of one row x [1, ...] for a blank conditioning."""
    blank = model.blank()
    cond = {name: value[None] for name, value in blank.items()}
    # Classifier-free guidance replaces the text of the prompt by that of the empty prompt.
    before = model.unwanted
    text = "encoder_hidden_states"
    model.unwanted = {text: blank[text]} if text in blank else {}
    try:
        return model.velocity(x, 1.0, cond)
    finally:
        model.unwanted = before


def _drop_gradient(weight: torch.Tensor) -> None:
    weight.grad = None


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors]


@contextlib.contextmanager
def without_contents(*modules: torch.nn.Module) -> Iterator[None]:
    """Create tensors without contents inside, and replace the weights of `modules` by such."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(on_fake_cpu(module))
        yield


@contextlib.contextmanager
def on_fake_cpu(module: torch.nn.Module, trained: torch.dtype | None = None) -> Iterator[None]:
    """Replace a module's weights by empty CPU tensors while inside FakeTensorMode.

    trained: dtype of the weights that require gradients, None for their own. Meta tensors would
    choose other attention kernels than a GPU does; these do not.
    """
    before = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    for part, weights, buffers in before:
        for key, weight in weights.items():
            if weight is not None:
                dtype = weight.dtype
                if trained and weight.requires_grad:
                    dtype = trained
                empty = torch.empty(weight.shape, dtype=dtype)
                part._parameters[key] = torch.nn.Parameter(empty, weight.requires_grad)
        for key, buffer in buffers.items():
            if buffer is not None:
                part._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
    try:
        yield
    finally:
        for part, weights, buffers in before:
            part._parameters.update(weights)
            part._buffers.update(buffers)
