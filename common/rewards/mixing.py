"""Several rewards: weighted, added up, put on one scale. Needs torch alone.

Shapes: P prompts, G samples of each; NaN is a sample without a score.
"""

from collections.abc import Sequence

import torch

from common.errors import InputError


def weighted_sum(
    scores: dict[str, torch.Tensor], weights: dict[str, float | torch.Tensor]
) -> torch.Tensor:
    """{name: [...]} and {name: weight} -> [...]; a reward of weight 0 takes no part, nor does its
    NaN."""
    return sum(
        weight * scores[name]
        for name, weight in weights.items()
        if not isinstance(weight, float) or weight
    )


def in_units(unit: str, weights: dict[str, float], scorers: dict) -> dict[str, float]:
    """{name: weight} as the flags have them -> as they count: weights of the rewards in their own
    units ("own"), or of rewards in units of the spread that each declares ("spread")."""
    return {
        name: weight / scorers[name].scale if unit == "spread" else weight
        for name, weight in weights.items()
    }


def terms(
    aggregate: str, total: torch.Tensor, scores: dict[str, torch.Tensor], weights: dict[str, float]
) -> list[tuple[torch.Tensor, float]]:
    """What advantages are computed from, [(rewards [P, G], its weight)]: the weighted sum `total`
    of the scores {name: [P, G]}; or, "advantages", each of them by itself, a sample without one of
    them (NaN) having none."""
    if aggregate == "rewards":
        return [(total, 1.0)]
    return [
        (scores[name].masked_fill(total.isnan(), torch.nan), weight)
        for name, weight in weights.items()
    ]


def shares(
    scores: dict[str, torch.Tensor],
    weights: dict[str, float | torch.Tensor],
    parts: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """How much of what is added up each of several rewards is, {"share_NAME": 0 to 1}, together 1;
    {} of one reward.

    scores {name: [P, G]}, weights {name: number or [P, 1]}. The standard deviation of weight *
    score within each group, averaged over the groups, and divided by the sum of that over the
    rewards. Where advantages are added up instead, `parts`, an [P, G] for each reward, have taken
    the place of weight * score. Without any spread: 0."""
    if len(weights) < 2:
        return {}
    added = parts if len(parts) > 1 else [weight * scores[name] for name, weight in weights.items()]
    spreads = [
        (part - part.nanmean(1, keepdim=True)).square().nanmean(1).sqrt().nanmean()
        for part in added
    ]
    spreads = torch.stack(spreads).nan_to_num(0.0)  # of a reward without any score
    return {
        f"share_{name}": share
        for name, share in zip(weights, spreads / spreads.sum().clamp(min=1e-30))
    }


def scale(scorers: dict, weights: dict[str, float]) -> float:
    """Typical spread within a group of the weighted sum: of terms that rise and fall together, an
    upper limit."""
    return sum(abs(weight) * scorers[name].scale for name, weight in weights.items())


def require_range(scorers: dict) -> None:
    """Raises InputError for the first scorer without two bounds."""
    for name, scorer in scorers.items():
        if None in scorer.range:
            raise InputError(
                f"reward {name}: its scores have no bounds, so they cannot be put on [0, 1]"
            )


def on_unit_interval(
    scores: dict[str, torch.Tensor], scorers: dict, names: Sequence[str] | dict
) -> dict[str, torch.Tensor]:
    """{name: [...]} -> {name: [...]} of `names` on [0, 1], by the ranges that the scorers declare;
    a sample without one of these scores (NaN) has none of them."""
    bounds = {name: scorers[name].range for name in names}
    masked = sum(scores[name] for name in names).isnan()
    return {
        name: ((scores[name] - low) / (high - low)).masked_fill(masked, torch.nan)
        for name, (low, high) in bounds.items()
    }
