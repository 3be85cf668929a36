"""The pure functions of grpo_base.py against the published values and an independent float64 NumPy
transcription."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.groups import keep_rows, split_rows, zero_variance
from common.rewards import Rewards
from grpo_base import EPS, combine_scores, compute_advantages

NO_CLAMP = 1e9


def advantages_of(reward, eps):
    """A_ij = (R_ij - mean_j R_ij) / (std_j R_ij + eps), group by group, with the population
    standard deviation."""
    out = []
    for group in reward:
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / len(group)) ** 0.5
        out.append([(r - mean) / (std + eps) for r in group])
    return np.array(out)


def terms_of(aggregate, scores, weights):
    """What advantages are computed from, by --aggregate."""
    rewards = SimpleNamespace(aggregate=aggregate, weights=weights)
    return Rewards.terms(rewards, combine_scores(scores, weights), scores)


def random_rewards(prompts, group, centre=0.0, spread=1.0):
    return centre + spread * np.random.default_rng(prompts * 100 + group).standard_normal(
        (prompts, group)
    )


# --- Advantages ---
@pytest.mark.parametrize("group", [[0.360, 0.370, 0.380, 0.390], [0.366, 0.367, 0.368, 0.369]])
def test_population_std_gives_the_values_printed_by_slas(group):
    got = compute_advantages(torch.tensor([group]), NO_CLAMP)
    np.testing.assert_allclose(got.numpy(), [[-1.342, -0.447, 0.447, 1.342]], rtol=0, atol=5e-4)


@pytest.mark.parametrize("prompts,group", [(1, 2), (3, 4), (8, 12), (5, 24)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_advantages_equal_the_transcription(prompts, group, dtype, tolerance):
    reward = random_rewards(prompts, group)
    got = compute_advantages(torch.tensor(reward, dtype=dtype), NO_CLAMP)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.numpy(), advantages_of(reward, EPS), rtol=0, atol=tolerance)


@pytest.mark.parametrize("centre,spread", [(0.28, 0.01), (22.0, 0.5), (6.0, 1.0), (-0.05, 1e-3)])
def test_float32_advantages_hold_on_the_scales_of_real_rewards(centre, spread):
    """Rounding the mean of float32 rewards near `centre` costs a few centre * 2^-24 / spread."""
    reward = random_rewards(8, 12, centre, spread).astype(np.float32)
    got = compute_advantages(torch.as_tensor(reward), NO_CLAMP)
    np.testing.assert_allclose(
        got.numpy(), advantages_of(reward.astype(np.float64), EPS), rtol=0, atol=2e-5
    )


def test_advantages_have_mean_zero_and_std_one_in_each_group():
    got = compute_advantages(torch.tensor(random_rewards(6, 12)), NO_CLAMP)
    np.testing.assert_allclose(got.mean(1).numpy(), 0, atol=1e-12)
    np.testing.assert_allclose(got.std(1, unbiased=False).numpy(), 1, atol=1e-6)  # eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_even_where_their_rounded_mean_differs(dtype):
    values = torch.tensor([0.1, 0.0, 1 / 3, -7.3, 22.123, *np.linspace(0.01, 9, 500)], dtype=dtype)
    some_mean_is_rounded = False
    for group in (2, 3, 7, 12, 24):
        reward = values[:, None].repeat(1, group)
        some_mean_is_rounded |= (reward.mean(1) != values).any().item()
        assert torch.equal(compute_advantages(reward, 5.0), torch.zeros_like(reward))
    assert some_mean_is_rounded  # the trap is real: centring alone would not give 0


def test_clamp_cuts_both_sides_at_its_maximum_and_nothing_else():
    reward = torch.cat(
        [torch.eye(40)[:1], -torch.eye(40)[:1], torch.tensor(random_rewards(1, 40)).float()]
    )
    free = compute_advantages(reward, NO_CLAMP)
    got = compute_advantages(reward, 5.0)
    assert free[0, 0] > 6.2 and free[1, 0] < -6.2  # sqrt(G - 1): one sample against 39
    assert got[0, 0] == 5 and got[1, 0] == -5
    assert torch.equal(got[:, 1:], free[:, 1:]) and torch.equal(got[2], free[2])


def test_groups_do_not_influence_each_other():
    reward = torch.tensor(random_rewards(4, 6))
    base = compute_advantages(reward, 5.0)
    changed = reward.clone()
    changed[2] = 100 * reward[2] ** 2 - 3
    got = compute_advantages(changed, 5.0)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(got[others], base[others]) and not torch.equal(got[2], base[2])
    order = torch.tensor([3, 0, 2, 1])
    assert torch.equal(compute_advantages(reward[order], 5.0), base[order])


def test_advantages_ignore_the_shift_and_scale_of_a_groups_rewards():
    reward = torch.tensor(random_rewards(3, 8))
    got = compute_advantages(10 * reward + 4, NO_CLAMP)
    expected = compute_advantages(reward, NO_CLAMP)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-6)  # eps


# --- Rows to train on ---
def test_zero_variance_marks_the_groups_whose_rewards_are_all_equal():
    reward = torch.tensor([[0.1] * 4, [0.1, 0.1, 0.1, 0.1000001], [0.0] * 4, [1.0, 2.0, 1.0, 2.0]])
    assert torch.equal(zero_variance(reward), torch.tensor([[True], [False], [True], [False]]))


@pytest.mark.parametrize("best_of", [2, 4, 8, 12])
@pytest.mark.parametrize("ties", ["none", "some", "all"])
def test_best_of_keeps_half_highest_and_half_lowest_of_each_group(best_of, ties):
    reward = random_rewards(6, 12)
    reward = {"none": reward, "some": np.round(reward), "all": np.zeros_like(reward)}[ties]
    kept = keep_rows(torch.tensor(reward), best_of).numpy()
    assert kept.dtype == bool and kept.shape == reward.shape
    for group, mask in zip(reward, kept):
        ordered, half = sorted(group), best_of // 2
        assert mask.sum() == best_of
        assert sorted(group[mask]) == ordered[:half] + ordered[-half:]


def test_best_of_keeps_the_rows_named_by_hand():
    kept = keep_rows(
        torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.7, 0.2], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]), 4
    )
    assert kept.int().tolist() == [[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize("best_of", [0, 12])
def test_best_of_zero_or_the_whole_group_keeps_every_row(best_of):
    for reward in (torch.tensor(random_rewards(3, 12)), torch.zeros(3, 12)):
        kept = keep_rows(reward, best_of)
        assert kept.dtype == torch.bool and kept.shape == (3, 12) and kept.all()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_minibatches_are_disjoint_and_have_as_much_of_every_group(number):
    kept = keep_rows(torch.tensor(random_rewards(6, 12)), 8)
    kept[0] = True  # a group with more rows than the others
    parts = split_rows(kept, number)
    assert len(parts) == number and torch.equal(sum(part.int() for part in parts), kept.int())
    sizes = torch.stack([part.sum(1) for part in parts])  # [number, P]
    assert (sizes.amax(0) - sizes.amin(0) <= 1).all() and (sizes > 0).all()
    assert number > 1 or torch.equal(parts[0], kept)


# --- Rewards ---
def test_combined_reward_is_the_weighted_sum_of_the_named_scores():
    a, b, c = torch.tensor(np.random.default_rng(0).standard_normal((3, 2, 4)))
    got = combine_scores({"hps": a, "unused": c, "clip": b}, {"clip": 1.4, "hps": 0.7})
    assert got.shape == (2, 4)
    np.testing.assert_allclose(got.numpy(), 0.7 * a.numpy() + 1.4 * b.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregate", ["rewards", "advantages"])
def test_several_rewards_are_normalised_as_one_or_each_by_itself(aggregate):
    """As DanceGRPO's code adds them up: sum_k w_k (R_k - mean R_k) / std R_k, each clamped."""
    a, b = random_rewards(3, 6, 0.3, 0.01), random_rewards(4, 6, 0.4, 0.02)[:3]
    a[0, 1] = np.nan  # a sample without one of the scores has none
    scores, weights = {"hps": torch.tensor(a), "clip": torch.tensor(b)}, {"hps": 0.7, "clip": 1.4}
    terms = terms_of(aggregate, scores, weights)
    got = sum(w * compute_advantages(r, 1.5) for r, w in terms)
    assert got[0, 1] == 0
    for p in range(3):
        kept = np.isfinite(a[p])
        if aggregate == "rewards":
            expected = np.clip(
                advantages_of([0.7 * a[p, kept] + 1.4 * b[p, kept]], EPS)[0], -1.5, 1.5
            )
        else:
            parts = [np.clip(advantages_of([r[p, kept]], EPS)[0], -1.5, 1.5) for r in (a, b)]
            expected = 0.7 * parts[0] + 1.4 * parts[1]
        np.testing.assert_allclose(got[p, kept].numpy(), expected, rtol=0, atol=1e-9)


def test_the_reward_with_the_larger_spread_decides_a_sum_and_not_the_sum_of_advantages():
    """Of independent rewards with spreads 1 and 2 and weights 1 and 2, the first has the
    correlation 1 / sqrt(17) with the one and 1 / sqrt(5) with the other."""
    a, b = torch.randn(
        2, 1, 40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    scores, weights = {"a": 0.01 * a, "b": 0.02 * b}, {"a": 0.7, "b": 1.4}
    for aggregate, correlation in (("rewards", 17**-0.5), ("advantages", 5**-0.5)):
        terms = terms_of(aggregate, scores, weights)
        got = sum(w * compute_advantages(r, NO_CLAMP) for r, w in terms)
        assert torch.corrcoef(torch.cat([a, got]))[0, 1].item() == pytest.approx(
            correlation, abs=0.015
        )


def test_one_reward_of_weight_one_is_left_bit_for_bit():
    a = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(combine_scores({"jpeg": a}, {"jpeg": 1.0}), a)
