"""One process of a launch and the others: its device, its rows, and what all of them find out
together. Training and evaluate.py share it."""

import gc
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from common.args import Args, Scored
from common.trainer import sharding

if TYPE_CHECKING:  # --help need not wait for it
    from accelerate import PartialState

# Of the forward pass, and of all weights that are not trained: Accelerate's word for it, and the
# dtype.
PRECISION = {"cuda": ("bf16", torch.bfloat16), "cpu": ("no", torch.float32)}


class Processes:
    """This process among `world`: the number `index`, on `device`, `is_main` for one of them. Its
    passes and its frozen weights are in `dtype`; `sharding` is Accelerate's plugin where the
    launcher asked for it, else None. Raises InputError for a launch with DeepSpeed or FSDP1."""

    def __init__(self, args: Args | Scored) -> None:
        if (
            "PYTORCH_ALLOC_CONF" not in os.environ
        ):  # samples, passes and encoders of many sizes leave gaps otherwise
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        self.args, on_gpu = args, torch.cuda.is_available()
        # what an earlier run of this program held (--calibrate), before memory is counted
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        self.precision, self.dtype = PRECISION["cuda" if on_gpu else "cpu"]
        state = processes(args)
        self.device, self.is_main, self.world = (
            state.device,
            state.is_main_process,
            state.num_processes,
        )
        self.index = state.process_index
        self.sharding = sharding.take_plugin()

    @property
    def score_batch(self) -> int:
        """Rows decoded and scored together: micro-batches until they make up a batch of the
        rewards."""
        return self.args.micro_batch * max(1, self.args.reward_batch // self.args.micro_batch)

    # --- Rows ---

    def rows(self, number: int) -> torch.Tensor:
        """Global indices of this process's rows out of `number`: [number / world], contiguous."""
        share = number // self.world
        return torch.arange(share) + share * self.index

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """[b, ...] of each process -> [B, ...] on all of them, in global row order."""
        from accelerate.utils import gather

        return gather(local)

    def local(self, value: torch.Tensor) -> torch.Tensor:
        """[P, G] -> this process's rows [b]."""
        return value.flatten()[self.rows(value.numel()).to(value.device)]

    # --- All processes together ---

    def together(self, thing: Any) -> list:
        """All processes together: what each of them has, in their order."""
        from accelerate.utils import gather_object

        return gather_object([thing]) if self.world > 1 else [thing]

    def first(self, reason: str | Exception) -> str | Exception:
        """All processes together: the first reason that one of them has, "" if none has any."""
        return next(filter(None, self.together(reason)), "")

    def any(self, here: bool) -> bool:
        """All processes together: whether it is so on one of them."""
        return bool(self.gather(torch.tensor([here], device=self.device)).any())

    @staticmethod
    def print(*words) -> None:
        """On the main process."""
        from accelerate import PartialState

        if PartialState().is_main_process:
            print(*words, flush=True)


def processes(args: Args | Scored) -> "PartialState":
    """The processes of this launch, which wait for one another as long as --process-timeout
    says."""
    from accelerate import PartialState

    return PartialState(
        cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=args.process_timeout)
    )
