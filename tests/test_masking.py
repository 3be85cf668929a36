"""Samples that a reward could not judge (NaN): they have advantage 0 and count nowhere, in every
method."""

import math

import numpy as np
import pytest
import torch

import bpgo
import grpo_base
import self_paced
import slas
from common import groups, rewards
from common.args import Args
from common.errors import RunError

NAN = math.nan
METHODS = (grpo_base, bpgo, slas, self_paced)


class Flaky:
    """Reward: the mean of the red channel; NaN where the first pixel's green level is divisible by
    four."""

    video, masks, scale, range = False, True, 0.1, (0.0, 1.0)

    def score(self, media, prompts):
        red = media[:, 0].mean((1, 2))
        return torch.where((media[:, 1, 0, 0] * 255).round() % 4 == 0, NAN, red)


class Silent(Flaky):
    """The same, NaN everywhere."""

    def score(self, media, prompts):
        return torch.full((len(media),), NAN)


class Evens(Flaky):
    """The same, but NaN for every other sample, the second and so on."""

    first = 0

    def score(self, media, prompts):
        return torch.where(
            torch.arange(len(media)) % 2 == self.first, media[:, 0].mean((1, 2)), NAN
        )


class Odds(Evens):
    first = 1


@pytest.fixture
def flaky(monkeypatch):
    for name in ("Flaky", "Silent", "Evens", "Odds"):
        monkeypatch.setitem(rewards.REWARDS, name.lower(), f"test_masking:{name}")


def advantages(method, reward):
    if method is slas:
        return slas.compute_advantages(reward, 0.5, 5.0)
    return method.compute_advantages(reward, 5.0)


def scores(p=3, g=6, seed=0):
    return torch.rand(p, g, generator=torch.Generator().manual_seed(seed))


# --- Equations ---


@pytest.mark.parametrize("method", METHODS)
def test_a_masked_sample_changes_nothing_else_in_its_group(method):
    reward = scores(p=1)
    masked = reward.clone()
    masked[0, 2] = NAN
    others = [0, 1, 3, 4, 5]
    found = advantages(method, masked)
    torch.testing.assert_close(
        found[:, others], advantages(method, reward[:, others]), atol=1e-6, rtol=1e-6
    )
    assert found[0, 2] == 0 and torch.isfinite(found).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_masked_sample_leaves_the_other_groups_alone(method):
    reward = scores()
    masked = reward.clone()
    masked[1, 0] = NAN
    found, before = advantages(method, masked), advantages(method, reward)
    if method is slas:  # whose unit is the spread of the whole batch, here of one sample less
        std = [
            values[values.isfinite()].double().std(unbiased=False) for values in (reward, masked)
        ]
        before = before * (std[0] / std[1]) ** 1.5
    torch.testing.assert_close(found[[0, 2]], before[[0, 2]].float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "group", [[NAN, NAN, NAN, NAN], [NAN, 0.4, NAN, NAN], [0.4, 0.4, NAN, 0.4]]
)
def test_groups_without_two_different_scores_have_no_advantage(method, group):
    reward = torch.tensor([group, [0.1, 0.2, 0.3, 0.4]])
    assert groups.zero_variance(reward).flatten().tolist() == [True, False]
    found = advantages(method, reward)
    assert (found[0] == 0).all() and torch.isfinite(found).all() and found[1].abs().min() > 0


@pytest.mark.parametrize(
    "group, best_of, kept",
    [
        ([0.5, NAN, 0.1, 0.9], 0, "1011"),
        ([0.5, NAN, 0.1, 0.9], 2, "0011"),
        ([0.5, NAN, 0.1, 0.9], 4, "1011"),
        ([NAN, NAN, 0.1, 0.9], 2, "0011"),
        ([NAN, NAN, 0.1, NAN], 0, "0000"),
        ([NAN, NAN, 0.1, NAN], 2, "0000"),
        ([NAN, NAN, NAN, NAN], 2, "0000"),
        ([0.3, 0.2, 0.1, 0.4], 2, "0011"),
    ],
)
def test_rows_to_train_on_have_a_score_and_another_one_beside_it(group, best_of, kept):
    found = groups.keep_rows(torch.tensor([group]), best_of)
    assert "".join(str(int(x)) for x in found[0]) == kept


def test_every_group_counts_the_same_in_the_loss_however_many_of_its_samples_are_masked():
    """2511.18919 eq 6: the mean over groups of each group's mean, in float64 NumPy."""
    reward, loss = scores(p=4, g=7), scores(p=4, g=7, seed=1)
    reward[0, 2:5], reward[2, 1:], reward[3, 6] = NAN, NAN, NAN  # 4, 7, 1 and 6 scores
    kept = groups.keep_rows(reward, best_of=0)
    for minibatch in [kept, *groups.split_rows(kept, 2)]:
        values = np.where(minibatch, loss.double(), np.nan)[[0, 1, 3]]  # of one score: skipped
        weights = groups.row_weights(minibatch)
        assert (weights * loss).sum().item() == pytest.approx(
            np.nanmean(values, 1).mean(), abs=1e-6
        )
        assert weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert not weights[2].any() and not weights[~minibatch].any()
    assert not groups.row_weights(kept & False).any()


@pytest.mark.parametrize("p, g, best_of, minibatches", [(8, 12, 0, 3), (3, 7, 0, 2), (5, 16, 8, 2)])
def test_without_masked_samples_every_weight_is_one_over_the_number_of_rows(
    p, g, best_of, minibatches
):
    reward = scores(p, g)
    reward[0] = 0.5  # a skipped group may be among them
    kept = groups.keep_rows(reward, best_of, min_spread=1e-3)
    assert not kept[0].any() and kept[1:].any(1).all()
    for minibatch in groups.split_rows(kept, minibatches):
        assert torch.equal(groups.row_weights(minibatch), minibatch / minibatch.sum())


def test_hoyer_index_and_stage_weights_are_those_of_the_samples_with_scores():
    stages = torch.stack([scores(seed=1), scores(seed=2), scores(seed=3)])  # [K, P, G]
    masked = stages.clone()
    masked[:, 1, 4] = NAN
    less = stages[:, 1:2, [0, 1, 2, 3, 5]]

    def weights_of(rewards):
        gates = self_paced.stage_gates(rewards, (0.5, 0.6, 0.7), beta=0.5, slope=10.0)
        return self_paced.stage_weights(gates, alpha=4.0)

    torch.testing.assert_close(
        self_paced.hoyer_sparsity(masked)[:, 1:2], self_paced.hoyer_sparsity(less)
    )
    torch.testing.assert_close(weights_of(masked)[:, 1:2], weights_of(less))
    torch.testing.assert_close(weights_of(masked)[:, [0, 2]], weights_of(stages)[:, [0, 2]])


def test_a_sample_without_one_of_the_stages_has_none():
    found = {
        "a": torch.tensor([[0.2, NAN, 0.4]]),
        "b": torch.tensor([[5.0, 6.0, NAN]]),
        "watched": torch.full((1, 3), NAN),
    }
    stages = self_paced.on_unit_interval(found, {"a": (0.0, 1.0), "b": (0.0, 10.0)})
    assert list(stages) == ["a", "b"]
    assert [str(round(x, 3)) for x in stages["a"][0].tolist()] == ["0.2", "nan", "nan"]
    assert [str(round(x, 3)) for x in stages["b"][0].tolist()] == ["0.5", "nan", "nan"]


def test_a_reward_without_weight_takes_no_score_away():
    found = {"a": torch.tensor([[0.2, 0.4]]), "b": torch.tensor([[NAN, 0.1]])}
    assert rewards.weighted_sum(found, {"a": 2.0, "b": 0.0}).tolist()[0] == pytest.approx(
        [0.4, 0.8]
    )
    assert rewards.weighted_sum(found, {"a": 2.0, "b": 1.0}).isnan().tolist() == [[True, False]]


def test_a_masked_sample_stretches_no_other_reward_around_the_prior():
    reward = torch.tensor([[0.3, NAN, 0.8]])
    found = bpgo.contrastive_rewards(reward, torch.tensor([[0.5]]), 1.0)
    torch.testing.assert_close(
        found[:, [0, 2]], bpgo.contrastive_rewards(reward[:, [0, 2]], torch.tensor([[0.5]]), 1.0)
    )


def test_a_group_without_a_score_is_trusted_as_any_other():
    found = bpgo.reliability_weights(
        torch.tensor([[NAN], [0.5]]), torch.tensor([[0.5], [0.5]]), 0.5, 1.0
    )
    assert found.tolist() == [[1.0], [1.0]]


def test_a_step_without_a_score_leaves_the_running_mean_alone():
    prior = bpgo.RunningMeanPrior()
    for group in ([NAN, NAN], [0.2, NAN], [NAN, NAN], [0.6, 0.6]):
        expected = prior.expect(["a"], torch.tensor([group]))
    assert expected.item() == pytest.approx(0.2) and prior.state["mean"] == pytest.approx(0.4)


# --- What may be NaN ---


def test_only_a_reward_that_masks_may_be_nan(flaky):
    found = rewards.Rewards(Args(reward=("flaky",)), ["p"])
    found.check({"flaky": torch.tensor([[NAN, 0.5]])}, ["p"])
    with pytest.raises(RunError, match="is inf"):
        found.check({"flaky": torch.tensor([[math.inf, 0.5]])}, ["p"])
    with pytest.raises(RunError, match="no score for any of 2 samples"):
        found.check({"flaky": torch.tensor([[NAN, NAN]])}, ["p"])
    found.scorers["flaky"].masks = False
    with pytest.raises(RunError, match="reward flaky is nan for the prompt 'p' .1 of 2"):
        found.check({"flaky": torch.tensor([[NAN, 0.5]])}, ["p"])


# --- Whole runs ---


STAGES = dict(reward=("flaky", "verifier"), thresholds=(0.5, 0.5))
RUNS = {
    "grpo_base": (grpo_base, dict(reward=("flaky",))),
    "bpgo": (bpgo, dict(reward=("flaky",))),
    "bpgo released": (bpgo, dict(reward=("flaky",), variant="released", alpha=1.0)),
    "slas": (slas, dict(reward=("flaky",))),
    "self_paced": (self_paced, STAGES),
    "self_paced v4": (self_paced, dict(STAGES, variant="v4", alpha=1.0)),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_go_on_with_masked_samples_and_count_them(train, flaky, name):
    method, settings = RUNS[name]
    _, rows = train(method, steps=3, eval_every=3, watch=("jpeg",), **settings)
    trained = [row for row in rows if "reward_mean" in row]
    assert sum(row["masked_samples"] for row in trained) > 0
    assert all(0 <= row["skipped_groups"] <= 2 for row in trained)
    for row in trained:
        names = "reward_mean reward_std grad_norm ratio_error flaky_mean jpeg_mean"
        for name in names.split():
            assert math.isfinite(row[name]), name
    assert math.isfinite(rows[-1]["eval_reward"])


def test_a_skipped_group_trains_nothing(train, flaky, monkeypatch):
    """Groups of two with one masked sample each: nothing is left to learn from, with the KL term or
    without."""
    every_other = torch.tensor([0.5, NAN]).repeat(2)
    monkeypatch.setattr(Flaky, "score", lambda self, media, prompts: every_other[: len(media)])
    for kl in (0.0, 0.1):
        _, rows = train(
            prompts_per_step=2,
            group_size=2,
            steps=1,
            reward=("flaky",),
            kl_coef=kl,
            output=f"kl{kl}",
        )
        assert rows[0]["skipped_groups"] == 2 and rows[0]["masked_samples"] == 2
        assert rows[0]["grad_norm"] == 0 and rows[0]["loss"] == 0


@pytest.mark.parametrize("method", [grpo_base, slas])
def test_a_group_with_less_spread_than_asked_for_is_left_out_as_one_without_scores(
    train, flaky, monkeypatch, method
):
    narrow, wide, none = [0.4, 0.5, 0.4, 0.5], [0.1, 0.9, 0.1, 0.9], [NAN] * 4
    settings = dict(
        prompts_per_step=2, group_size=4, steps=1, reward=("flaky",), lora_rank=2, sampling_steps=2
    )
    if method is slas:
        settings |= dict(normalize="none")  # the batch's spread is that of other groups
    found = []
    for name, first in (("spread", narrow), ("masked", none)):
        scores_ = torch.tensor(first + wide)
        monkeypatch.setattr(
            Flaky, "score", lambda self, media, prompts, s=scores_: s[-len(media) :]
        )
        output, spread = f"{method.__name__}-{name}", 0.2 if name == "spread" else 0.0
        _, (row, *_) = train(method, min_spread=spread, output=output, **settings)
        found.append([row[key] for key in ("skipped_groups", "grad_norm", "advantage_abs_mean")])
    (skipped, norm, both), (_, expected, one) = found
    assert skipped == 1 and norm == pytest.approx(expected, rel=1e-5) and norm > 0 and both > one


def test_what_is_no_number_is_null_in_the_metrics_and_no_number_again_after_a_resume(train, flaky):
    """Each of two rewards has scores, their sum has none."""
    for script in METHODS:
        settings = dict(
            reward=("evens", "odds"), output=script.__name__, sampling_steps=2, lora_rank=2
        )
        settings |= dict(thresholds=(0.5, 0.5)) if script is self_paced else {}
        _, rows = train(script, steps=1, **settings)
        assert rows[0]["reward_mean"] is None and rows[0]["grad_norm"] == 0
    _, rows = train(script, steps=2, resume="latest", **settings)
    assert [row["reward_mean"] for row in rows] == [None, None]


def test_a_step_without_any_score_stops_the_run(train, flaky):
    with pytest.raises(RunError, match="reward silent has no score for any of 8 samples"):
        train(reward=("silent",))


def test_a_prior_needs_a_score(train, flaky):
    with pytest.raises(RunError, match="has no score for any"):
        train(bpgo, reward=("silent",), prior="sft")


def test_a_prior_without_a_score_names_its_prompt():
    reward = torch.zeros(2, 4)
    prior = bpgo.PromptPrior(lambda prompts: torch.tensor([0.5, 0.6]))
    assert prior.expect(["a", "b"], reward).flatten().tolist() == pytest.approx([0.5, 0.6])
    prior = bpgo.PromptPrior(lambda prompts: torch.tensor([0.5, NAN]))
    with pytest.raises(RunError, match="'b' has no score"):
        prior.expect(["a", "b"], reward)
