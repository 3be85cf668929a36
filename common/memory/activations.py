"""Bytes of activations that one row of a pass keeps, counted on tensors without contents."""

import contextlib
from collections.abc import Iterator

import torch

from common.models.family import Family


def row_bytes(model: Family, dtype: torch.dtype, checkpointing: bool) -> int:
    """Return the bytes that autograd keeps for one row's velocity.

    The weights may be on the meta device. With gradient checkpointing these are the inputs of all
    blocks, and everything inside the largest block, which is recomputed as a whole. The second
    forward pass of classifier-free guidance is included.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = model.trainable[model.trained_at(1.0)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        # the model takes its device from the VAE
        with _on_fake_cpu(module), _on_fake_cpu(model.pipe.vae):
            return count(model, dtype, checkpointing)


def count(model: Family, dtype: torch.dtype, checkpointing: bool) -> int:
    """Return the same for a model whose weights are on the CPU."""
    module = model.trainable[model.trained_at(1.0)]
    if not checkpointing:
        return _kept_bytes(model, module, dtype).bytes
    largest = _largest_block(model, module, dtype)
    module.enable_gradient_checkpointing()
    kept = _kept_bytes(model, module, dtype)
    module.disable_gradient_checkpointing()
    return kept.bytes + largest


class Kept:
    """Counts the bytes that autograd saves for the backward pass, without a module's weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        storages = (weight.untyped_storage() for weight in module.parameters())
        self.weights = {storage._cdata for storage in storages}
        self.seen = {}
        self.tensors = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the storage of a saved tensor, each storage once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.seen[storage._cdata] = storage.nbytes()
            # A freed storage would give its address to another one.
            self.tensors.append(tensor)
        return tensor

    @property
    def bytes(self) -> int:
        """Bytes saved so far."""
        return sum(self.seen.values())


def _kept_bytes(model: Family, module: torch.nn.Module, dtype: torch.dtype) -> Kept:
    """Compute one row's velocity and return what autograd saved of it."""
    kept = Kept(module)
    _velocity(model, dtype, kept)
    return kept


def _largest_block(model: Family, module: torch.nn.Module, dtype: torch.dtype) -> int:
    """Return the largest number of bytes that a single block saves."""
    kept = Kept(module)
    sizes = [0]
    before = {}

    def entered(block: torch.nn.Module, *_) -> None:
        before[block] = kept.bytes

    def left(block: torch.nn.Module, *_) -> None:
        sizes.append(kept.bytes - before[block])

    handles = []
    for part in module.modules():
        if type(part).__name__ in model.blocks:
            handles.append(part.register_forward_pre_hook(entered))
            handles.append(part.register_forward_hook(left))
    _velocity(model, dtype, kept)
    for handle in handles:
        handle.remove()
    return max(sizes)


def _velocity(model: Family, dtype: torch.dtype, kept: Kept) -> None:
    """Compute the velocity of one row of zeros; `kept` counts what autograd saves."""
    blank = model.blank()
    cond = {name: value[None] for name, value in blank.items()}
    # Classifier-free guidance replaces the text of the prompt by that of the empty prompt.
    before = model.unwanted
    text = "encoder_hidden_states"
    model.unwanted = {text: blank[text]} if text in blank else {}
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, _same)
    try:
        with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model.velocity(torch.zeros(1, *model.noise_shape), 1.0, cond)
    finally:
        model.unwanted = before


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextlib.contextmanager
def _on_fake_cpu(module: torch.nn.Module) -> Iterator[None]:
    """Replace a module's weights by empty CPU tensors while inside FakeTensorMode.

    Meta tensors would choose other attention kernels than a GPU does; these do not.
    """
    before = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    for part, weights, buffers in before:
        for key, weight in weights.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
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
