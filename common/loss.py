"""The clipped surrogate, the KL term, and what the ratio says about the update. Needs torch alone.

Shapes: B rows (samples). Everything is per row; the script averages, because methods weigh rows
differently."""

from collections.abc import Callable

import torch


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """-min(rho * A, clip(rho, 1 - c, 1 + c) * A): ratio [B], advantages [B] -> [B]. 2511.18919 eq
    1."""
    assert ratio.shape == advantages.shape, (
        f"ratio {tuple(ratio.shape)}, advantages {tuple(advantages.shape)}"
    )
    return -torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    )


def gaussian_kl(
    mean: torch.Tensor, reference_mean: torch.Tensor, std: torch.Tensor | float
) -> torch.Tensor:
    """KL of two Gaussians of equal standard deviation, |mean - reference_mean|^2 / (2 std^2),
    averaged over dimensions: means [B, ...], std a scalar (not 0) or broadcastable -> [B].
    Flow-GRPO 2505.05470."""
    return ((mean - reference_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


@torch.no_grad()
def diagnostics(
    ratio: torch.Tensor, clip_range: float, share: torch.Tensor, loss: torch.Tensor, update: int
) -> dict[str, torch.Tensor]:
    """Of a micro-batch, over the rows that have a share in the loss (> 0): ratio [B], share [B],
    loss a scalar, update the number of the rollout's update -> {name: scalar}, sums, but for the
    largest error.

    ratio_error max |rho - 1| before the first update (0) must be rounding: more means that the two
    passes differ. approx_kl is Schulman's non-negative estimate (rho - 1) - log rho of KL(old ||
    new)."""
    counts = share > 0
    ratio = torch.where(counts, ratio, 1.0)
    error = (ratio - 1).abs()
    return {
        "ratio_error": error.max() * (update == 0),
        "clip_fraction": (error > clip_range).float().sum(),
        "approx_kl": (ratio - 1 - ratio.log()).sum(),
        "loss": loss.detach(),
        "rows": counts.sum(),
    }


def summarise(
    diagnostics: list[list[dict[str, torch.Tensor]]],
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda local: local,
) -> dict[str, float]:
    """Lists of `diagnostics`, one for each update, of its micro-batches -> {name: number} over all
    rows, processes and updates; and of each update N after the first, whose ratio has moved,
    clip_fraction_N and approx_kl_N.

    gather: [b, ...] of each process -> [B, ...] on all of them. Where no row was trained on, all is
    0."""
    names = ("ratio_error", "clip_fraction", "approx_kl", "loss", "rows")
    later = {
        name: n
        for n in range(2, len(diagnostics) + 1)
        for name in (f"clip_fraction_{n}", f"approx_kl_{n}")
    }
    if not any(diagnostics):
        return dict.fromkeys([*names[:4], *later], 0.0)
    number = [len(update) for update in diagnostics]
    local = torch.stack(
        [torch.stack([part[name] for name in names]) for update in diagnostics for part in update]
    )
    sums = torch.stack(
        [part.sum(0) for part in (local, *local.split(number))]
    )  # [1 + updates, names]
    total = gather(sums[None]).sum(0)
    worst = gather(local[:, :1].amax(0)).max()
    clipped, kl = total[:, 1:3].div(total[:, 4:].clamp(min=1)).T.tolist()  # of no rows: 0
    return {
        "ratio_error": worst.item(),
        "clip_fraction": clipped[0],
        "approx_kl": kl[0],
        "loss": (total[0, 3] / len(diagnostics)).item(),
        **{name: (clipped if name.startswith("clip") else kl)[n] for name, n in later.items()},
    }
