"""The clipped surrogate, the KL term, and diagnostics of an update's ratio. Needs torch alone.

Shapes: B rows (samples). All losses are per row. The script averages them, because methods weigh
rows differently.
"""

from collections.abc import Callable

import torch


def probability_ratio(log_ratio: torch.Tensor, update: int) -> torch.Tensor:
    """Return the ratio of new to old probability, [B].

    log_ratio [B]: log_prob of the weights in training minus that of the rollout; update: the number
    of the rollout's update, from 0.

    The first update begins with the weights that sampled, so its ratio is exactly 1, and only its
    gradient counts. Kernels may round differently in passes with and without gradients; without
    this rule such a difference could exceed a clip range of 1e-4 and clip rows on one side.
    """
    if update == 0:
        log_ratio = log_ratio - log_ratio.detach()
    return torch.exp(log_ratio)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """Return the clipped surrogate loss -min(rho * A, clip(rho, 1 - c, 1 + c) * A), [B].

    ratio (rho): [B]; advantages (A): [B]; clip_range: c. 2511.18919 eq 1.
    """
    assert ratio.shape == advantages.shape, (
        f"ratio {tuple(ratio.shape)}, advantages {tuple(advantages.shape)}"
    )
    return -torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    )


def gaussian_kl(
    mean: torch.Tensor, reference_mean: torch.Tensor, std: torch.Tensor | float
) -> torch.Tensor:
    """Return the KL of two Gaussians of equal standard deviation (Flow-GRPO 2505.05470).

    It is |mean - reference_mean|^2 / (2 std^2), averaged over the non-batch dimensions. mean,
    reference_mean: [B, ...]; std: a scalar (not 0), or broadcastable to them -> [B].
    """
    return ((mean - reference_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


@torch.no_grad()
def diagnostics(
    ratio: torch.Tensor,
    log_ratio: torch.Tensor,
    clip_range: float,
    share: torch.Tensor,
    loss: torch.Tensor,
    update: int,
    kl: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the diagnostics of one micro-batch, {name: scalar}, over the rows with share > 0.

    ratio [B]: that of the surrogate; log_ratio [B]: the measured one; share [B]: the weight of each
    row in the loss; loss: a scalar; update: the number of the rollout's update, from 0; kl [B]:
    `gaussian_kl` from the initial weights, or None.

    ratio_error       max |exp(log_ratio) - 1| before the first update. More than rounding means
                      that rollout and update compute different log-probabilities.
    clip_fraction     the number of rows whose |rho - 1| is above clip_range
    ratio_divergence  the sum of (rho - 1) - log rho, about (log rho)^2 / 2. It is not a KL: log rho
                      is an average over the D dimensions, so with a KL per dimension of k the
                      expected value of (log rho)^2 / 2 is k / D + k^2 / 2.
    loss, rows        the loss, and the number of rows
    kl                the sum of kl, if it is given
    """
    counts = share > 0
    ratio = torch.where(counts, ratio, 1.0)
    measured = torch.where(counts, log_ratio, 0.0).exp()
    found = {
        "ratio_error": (measured - 1).abs().max() * (update == 0),
        "clip_fraction": ((ratio - 1).abs() > clip_range).float().sum(),
        "ratio_divergence": (ratio - 1 - ratio.log()).sum(),
        "loss": loss.detach(),
        "rows": counts.sum(),
    }
    if kl is not None:
        found["kl"] = torch.where(counts, kl, 0.0).sum()
    return found


def summarise(
    diagnostics: list[list[dict[str, torch.Tensor]]],
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda local: local,
) -> dict[str, float]:
    """Return the diagnostics of a step, {name: number}, over all rows, processes and updates.

    diagnostics: for each update a list with those of its micro-batches. gather: [b, ...] of each
    process -> [B, ...] on all of them. The result also has clip_fraction_N and ratio_divergence_N
    for each update N after the first, because only there the ratio has moved. If no row was trained
    on, all values are 0, and kl is left out.
    """
    names = ("ratio_error", "clip_fraction", "ratio_divergence", "loss", "rows")
    later = {
        name: n
        for n in range(2, len(diagnostics) + 1)
        for name in (f"clip_fraction_{n}", f"ratio_divergence_{n}")
    }
    parts = [part for update in diagnostics for part in update]
    if not parts:
        return dict.fromkeys([*names[:4], *later], 0.0)
    if "kl" in parts[0]:
        names = (*names, "kl")
    number = [len(update) for update in diagnostics]
    local = torch.stack([torch.stack([part[name] for name in names]) for part in parts])
    sums = torch.stack(
        [part.sum(0) for part in (local, *local.split(number))]
    )  # [1 + updates, names]
    total = gather(sums[None]).sum(0)
    worst = gather(local[:, :1].amax(0)).max()
    # {name: [1 + updates]}; of no rows: 0
    means = dict(zip(names, total.div(total[:, 4:5].clamp(min=1)).T.tolist()))
    found = {name: means[name][0] for name in names if name not in ("ratio_error", "rows")}
    found["ratio_error"] = worst.item()
    found["loss"] = (total[0, 3] / len(diagnostics)).item()  # a sum over the rows already
    return found | {name: means[name.rpartition("_")[0]][n] for name, n in later.items()}
