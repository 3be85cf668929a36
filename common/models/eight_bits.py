"""Store the frozen linear layers of a model in 8 bits, by torchao: int8 weights, and a float32
scale for each output.

A pass computes in the precision that it has without this: the weights of a layer are cast up for
its product, and the scales multiply the result. Weights that were cast up are kept for the backward
pass. With gradient checkpointing these are those of one block."""

import importlib.util
import itertools
from collections.abc import Iterable, Iterator

import torch

from common.errors import InputError
from common.models.family import Family

# torchao keeps a float32 scale and an int8 zero point for each output of a layer.
BYTES_OF_OUTPUT = 5


def check() -> None:
    """Raise InputError if torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError("--frozen-8bit: the package is missing. pip install torchao.")


def quantize(model: Family, device: torch.device) -> None:
    """Store the frozen linear layers in 8 bits, in place; they are on the device afterwards."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig(set_inductor_config=False)  # of the whole process
    layers = itertools.chain.from_iterable(blocks_of(model))
    for layer in itertools.chain(layers, encoders_layers(model)):
        layer.requires_grad_(False)
        quantize_(layer, config, device=device)
        layer.register_forward_pre_hook(_as_autocast_does)


def blocks_of(model: Family) -> Iterator[list[torch.nn.Linear]]:
    """Yield the frozen linear layers of each block of the trained modules."""
    for module in model.trainable.values():
        for part in module.modules():
            if type(part).__name__ in model.blocks:
                yield [layer for layer in _linear(part) if not layer.weight.requires_grad]


def encoders_layers(model: Family) -> Iterator[torch.nn.Linear]:
    """Yield the linear layers of the text and image encoders."""
    for name in model.encoders:
        encoder = getattr(model.pipe, name, None)
        if encoder is not None:
            yield from _linear(encoder)


def saved_bytes(layers: Iterable[torch.nn.Linear], precision: int) -> int:
    """Return how many bytes fewer layers take in 8 bits.

    precision: bytes of one of their weights before.
    """
    return sum(
        (precision - 1) * layer.weight.numel() - BYTES_OF_OUTPUT * layer.out_features
        for layer in layers
    )


def cast_up_bytes(model: Family, precision: int) -> int:
    """Return the bytes of the weights that are cast up at one moment of a pass: those of a block.

    precision: bytes of one of them.
    """
    sizes = [sum(layer.weight.numel() for layer in layers) for layers in blocks_of(model)]
    return precision * max(sizes, default=0)


def _linear(module: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    return (part for part in module.modules() if isinstance(part, torch.nn.Linear))


def _as_autocast_does(layer: torch.nn.Linear, inputs: tuple) -> torch.Tensor | None:
    """Cast a layer's input to autocast's dtype, which does not see products of torchao's."""
    (x,) = inputs
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return None
