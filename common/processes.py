"""One process of a launch and the others: its device, its rows, and what all of them find out together. Training and
evaluate.py share it."""

import gc
import os
from datetime import timedelta

import torch

from common import sharding

# Of the forward pass, and of all weights that are not trained: Accelerate's word for it, and the dtype.
PRECISION = {"cuda": ("bf16", torch.bfloat16), "cpu": ("no", torch.float32)}


class Processes:
    """This process among `world`: the number `index`, on `device`, `is_main` for one of them. Its passes and its frozen
    weights are in `dtype`; `sharding` is Accelerate's plugin where the launcher asked for it, else None."""

    def __init__(self, args):
        if "PYTORCH_ALLOC_CONF" not in os.environ:  # samples, passes and encoders of many sizes leave gaps otherwise
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        self.args, on_gpu = args, torch.cuda.is_available()
        gc.collect()  # what an earlier run of this program held (--calibrate), before memory is counted
        if on_gpu:
            torch.cuda.empty_cache()
        self.precision, self.dtype = PRECISION["cuda" if on_gpu else "cpu"]
        state = processes(args)
        self.device, self.is_main, self.world = state.device, state.is_main_process, state.num_processes
        self.index = state.process_index
        self.sharding = sharding.take_plugin()

    @property
    def score_batch(self):
        """Rows decoded and scored together: micro-batches until they make up a batch of the rewards."""
        return self.args.micro_batch * max(1, self.args.reward_batch // self.args.micro_batch)

    # --- Rows ---

    def rows(self, number):
        """Global indices of this process's rows out of `number`: [number / world], contiguous."""
        share = number // self.world
        return torch.arange(share) + share * self.index

    def gather(self, local):
        """[b, ...] of each process -> [B, ...] on all of them, in global row order."""
        from accelerate.utils import gather

        return gather(local)

    def local(self, value):
        """[P, G] -> this process's rows [b]."""
        return value.flatten()[self.rows(value.numel()).to(value.device)]

    # --- All processes together ---

    def together(self, thing):
        """All processes together: the list of what each of them has."""
        from accelerate.utils import gather_object

        return gather_object([thing]) if self.world > 1 else [thing]

    def first(self, reason):
        """All processes together: the first reason that one of them has, "" if none has any."""
        return next(filter(None, self.together(reason)), "")

    def any(self, here):
        """All processes together: whether it is so on one of them."""
        return bool(self.gather(torch.tensor([here], device=self.device)).any())

    @staticmethod
    def print(*words):
        """On the main process."""
        from accelerate import PartialState

        if PartialState().is_main_process:
            print(*words, flush=True)


def processes(args):
    """The processes of this launch, which wait for one another as long as --process-timeout says."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=args.process_timeout))
