"""Count the kernels of a pass's arithmetic around the transformer, with and without --compile.

    python -m benchmarks.kernels    # FLUX's shapes; rewrites its part of benchmarks/RESULTS.md

The arithmetic is what `main` of the scripts does with the velocity of a pass of the update: the
transition with its log-probability, ratio, surrogate, share of the loss, their gradients, and the
diagnostics. Without --compile a kernel is an operation of aten that writes memory, counted as torch
dispatches it. With --compile a region's kernels are the loops that torch's compiler generates for a
CPU; for a GPU it generates Triton kernels by the same rules of fusion. Nothing is timed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.results import write
from common import loss, models, sde
from common.trainer import compiling

ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass
class Args:
    sde: str = "dance"
    """Noise schedule: dance, flow, ddim or cps."""
    rows: int = 1
    """Rows of a pass."""
    write: bool = True
    """Rewrite its part of benchmarks/RESULTS.md."""


class Kernels(TorchDispatchMode):
    """Counts the operations that write memory: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {value.untyped_storage().data_ptr() for value in tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        fresh = any(value.untyped_storage().data_ptr() not in given for value in tensors(made))
        writes = fresh or func._schema.is_mutable
        self.number += writes and func.overloadpacket.__name__ not in ALLOCATES
        return made


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@dataclass
class Part:
    """One function of a pass."""

    name: str
    function: Callable
    inputs: tuple
    """Its arguments; gradients go to the first one, if it requires one."""
    settings: dict
    """Its arguments by name."""
    region: bool = True
    """Whether --compile compiles it."""


def parts_of(args: Args) -> list[Part]:
    """Return the parts of a pass at FLUX's size."""
    own = models.settings("flux")
    shape = (own["height"] // 16 * (own["width"] // 16), 64)
    n = args.rows
    generator = torch.Generator().manual_seed(0)
    velocity, x, x_next = (torch.randn(n, *shape, generator=generator) for _ in range(3))
    old, advantages = torch.zeros(n, 16), torch.ones(n)
    sigmas = sde.shifted_sigmas(16, own["shift"])
    s = sde.diffusion_coefficients(sigmas, own["noise_level"], args.sde)
    row = torch.arange(n)

    def ratio_of(log_prob):
        log_ratio = log_prob - old[row, 3]
        return loss.probability_ratio(log_ratio, 0)

    def share_of(row_loss):
        return (advantages[row] * row_loss).sum() / 9

    def per_row():
        return torch.linspace(0.9, 1.1, n).requires_grad_()

    at = (sigmas[3], sigmas[4], s[3])
    statistics = (per_row().detach(), torch.zeros(n), 1e-4, torch.ones(n), torch.ones(()), 0)
    transition = sde.TRANSITIONS[args.sde]
    return [
        Part(
            "transition, log-probability",
            transition,
            (velocity.requires_grad_(), x, *at),
            {"x_next": x_next},
        ),
        Part("ratio", ratio_of, (per_row(),), {}, region=False),
        Part("surrogate", loss.clipped_surrogate, (per_row(), advantages, 1e-4), {}),
        Part("share of the loss", share_of, (per_row(),), {}, region=False),
        Part("diagnostics", loss.diagnostics, statistics, {}),
    ]


def counted(part: Part) -> int:
    """Return the kernels of a part as it is, with those of its backward pass."""
    with Kernels() as kernels:
        computed(part.function, part)
    return kernels.number


def compiled(part: Part, rows: int) -> int:
    """Return the kernels of a part's region, with those of its backward pass."""
    metrics.reset()
    computed(compiling.region(part.function, rows), part)
    return metrics.generated_kernel_count


def computed(function: Callable, part: Part):
    """Return the results of a part, and the gradient of its first argument, if it has one."""
    found = function(*part.inputs, **part.settings)
    first = part.inputs[0]
    if not first.requires_grad:
        return found, None
    wanted = found[1] if isinstance(found, tuple) else found
    return found, torch.autograd.grad(wanted, first, torch.ones_like(wanted))[0]


def main(args):
    lines = ["| part of a pass | kernels | with `--compile` |", "| --- | --- | --- |"]
    before = after = 0
    with torch._inductor.config.patch(force_disable_caches=True):  # what is cached is not counted
        for part in parts_of(args):
            own = counted(part)
            fused = compiled(part, args.rows) if part.region else own
            before, after = before + own, after + fused
            lines.append(f"| {part.name} | {own} | {fused} |")
    lines.append(f"| all | {before} | {after} |")
    print(*lines, sep="\n")
    if args.write:
        words = "Kernels around the transformer, FLUX's shapes (`python -m benchmarks.kernels`)"
        write(words, lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
