"""Groups of samples: which of them are trained on, in which minibatch. Needs torch alone.

Shapes: P prompts, G samples of each (the group). A reward of NaN is a sample without a score.
"""

import torch


def zero_variance(reward: torch.Tensor) -> torch.Tensor:
    """Return which groups give no gradient: equal scores, or fewer than two.

    reward [P, G] -> [P, 1] bool.
    """
    highest = reward.masked_fill(reward.isnan(), -torch.inf).amax(1, keepdim=True)
    lowest = reward.masked_fill(reward.isnan(), torch.inf).amin(1, keepdim=True)
    return highest <= lowest  # lower than it in a group without any score


def spread(reward: torch.Tensor) -> torch.Tensor:
    """Return the population standard deviation of each group: reward [P, G] -> [P, 1]."""
    centred = reward - reward.nanmean(1, keepdim=True)
    return centred.square().nanmean(1, keepdim=True).sqrt()


def keep_rows(reward: torch.Tensor, best_of: int, min_spread: float = 0.0) -> torch.Tensor:
    """Return which samples are trained on: reward [P, G] -> [P, G] bool.

    These are the samples with a score, in groups with at least two of them and a `spread` of at
    least min_spread (2605.10937, Imp1). best_of > 0 keeps the best_of/2 highest and lowest of each
    group (2511.19356, appendix A).
    """
    valid = ~reward.isnan()
    count = valid.sum(1, keepdim=True)  # [P, 1]
    order = reward.argsort(dim=1, stable=True)  # worst sample first, NaN last
    rank = order.argsort(dim=1)  # place of each sample in that order
    half = best_of // 2 if best_of else reward.shape[1]
    extreme = (rank < half) | (rank >= count - half)
    return valid & (count > 1) & extreme & ~(spread(reward) < min_spread)


def split_rows(kept: torch.Tensor, minibatches: int) -> list[torch.Tensor]:
    """Split the kept samples [P, G] bool into disjoint minibatches, [P, G] bool each.

    Every group is split: its kept samples go to the minibatches in turn.
    """
    turn = kept.cumsum(1)
    return [kept & (turn % minibatches == part) for part in range(minibatches)]


def row_weights(minibatch: torch.Tensor) -> torch.Tensor:
    """Return the weight of each sample in the loss of a minibatch: [P, G] bool -> [P, G].

    The loss is the mean over groups of the mean over each group's samples in the minibatch
    (2511.18919 eq 6). So a group with masked samples counts as much as any other, and one without
    samples not at all. If no sample is masked, every weight is 1 / the number of samples.
    """
    rows = minibatch.sum(1, keepdim=True)  # [P, 1]
    return minibatch / (rows * rows.count_nonzero()).clamp(min=1)
