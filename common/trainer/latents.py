"""The latents of a step, in one tensor that the rollout fills and the update reads."""

from collections.abc import Iterable

import torch

from common.errors import phase
from common.memory import MemoryPlan
from common.trainer.processes import MicroBatch


class Latents:
    """Hold the latents of this process's rows at all noise levels: `values` [b, T+1, ...] float32.

    One tensor serves all steps of a run, so that nothing is held twice. It is on the device, or in
    the host's pinned memory if the plan has `host_latents`: the latents of clips take gigabytes,
    and a pass needs only two of them for each row. Copies run in the order of the device's other
    work, so `at` returns what the rollout has written.

    rows: b; levels: T+1; noise_shape: shape of one row's latent. Raises LocalError if the memory is
    not enough.
    """

    def __init__(
        self,
        rows: int,
        levels: int,
        noise_shape: Iterable[int],
        device: torch.device,
        plan: MemoryPlan,
    ) -> None:
        self.device = device
        self.on_host = plan.host_latents
        memory = "lower --prompts-per-step, --group-size or --sampling-steps"
        with phase("the latents of a step", memory=memory):
            # The rows of a level are adjacent in memory, so a pass writes them in one piece.
            values = torch.empty(
                (levels, rows, *noise_shape),
                device="cpu" if self.on_host else device,
                pin_memory=self.on_host and device.type == "cuda",
            )
        self.values = values.transpose(0, 1)

    def part(self, mb: MicroBatch) -> torch.Tensor:
        """Return the rows of a micro-batch of the rollout, a view [at most n, T+1, ...].

        mb.index [n]: consecutive rows, then -1 for padding rows, which are not kept.
        """
        rows = mb.index[mb.index >= 0].tolist()
        return self.values[rows[0] : rows[-1] + 1]

    def at(self, mb: MicroBatch, t: int) -> torch.Tensor:
        """Return the latents at level t of a micro-batch, [n, ...] on the device.

        t: 0 for the initial noise, -1 for the last latents.
        """
        if not self.on_host:
            return self.values[mb.on_device, t]
        rows = [self.values[row, t] for row in mb.index.tolist()]
        return torch.stack([row.to(self.device, non_blocking=True) for row in rows])
