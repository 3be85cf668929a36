"""bpgo, slas and self_paced: their equations against NumPy in float64, what they are when they are
neutral, their state in checkpoints, and their pages. tests/test_house.py compares their code."""

import dataclasses
import doctest
import gc
import inspect
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, weights

import bpgo
import grpo_base
import self_paced
import slas
from common import cli, errors, memory, models
from common.args import defaults
from common.models.family import Family
from common.models.flux import Flux
from common.prompts import fields_of, prompts_of_step, read_prompts
from common.rewards import Rewards
from common.trainer.evaluator import sample
from common.trainer.log import Log
from lab.method_diffs import page, with_diff
from worlds.shapes import render, sample_scenes

METHODS = {"bpgo": bpgo, "slas": slas, "self_paced": self_paced}
STAGES = ("verifier:quality", "verifier:layout", "verifier")
RNG = np.random.default_rng(0)
CASES = [RNG.uniform(0, 1, (3, 8)), RNG.normal(0, 2, (5, 4)), RNG.uniform(0, 0.01, (1, 12))]


def tensor(x):
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def close(ours, theirs, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance)


def weights_of(rewards, tau, alpha, beta, slope, **settings):
    """The weights of the stages from their rewards [K, P, G]: [K, P]."""
    gates = self_paced.stage_gates(rewards, tau, beta=beta, slope=slope, **settings)
    return self_paced.stage_weights(gates, alpha)


# --- Flags ---


def own_flags(script):
    return {f.name for f in dataclasses.fields(script.Args)} - {
        f.name for f in dataclasses.fields(grpo_base.Args)
    }


def test_common_reads_no_flag_of_a_method():
    own = "|".join(set().union(*map(own_flags, METHODS.values())))
    for file in (ROOT / "common").rglob("*.py"):
        assert not re.search(rf"args\.({own})\b", file.read_text()), file


# --- Equations ---


@pytest.mark.parametrize("R", CASES)
@pytest.mark.parametrize("alpha, k", [(0.5, 1.0), (1.0, 7.0), (0.0, 1.0)])
def test_reliability_weights(R, alpha, k):
    prior = RNG.normal(0.5, 1, (len(R), 1))
    mean = R.mean(1, keepdims=True)
    expected = 1 + alpha * (2 / (1 + np.exp(-k * (mean - prior))) - 1)
    close(bpgo.reliability_weights(tensor(mean), tensor(prior), alpha, k), expected)


def test_reliability_weights_of_known_deviations():
    deviation = tensor([0, np.log(3), -np.log(3), np.inf, -np.inf])
    assert bpgo.reliability_weights(deviation, 0, 0.5, 1).tolist() == pytest.approx(
        [1, 1.25, 0.75, 1.5, 0.5], abs=1e-12
    )


@pytest.mark.parametrize("R", CASES)
@pytest.mark.parametrize("lam", [0.0, 1.0, 3.0])
def test_contrastive_rewards(R, lam):
    prior = RNG.normal(0.5, 1, (len(R), 1))
    expected = np.array(
        [[(lam * (r - p) + float(r > p)) * np.exp(r) for r in row] for row, (p,) in zip(R, prior)]
    )
    close(bpgo.contrastive_rewards(tensor(R), tensor(prior), lam), expected)


def test_contrastive_rewards_of_a_known_group():
    R, prior = tensor([[0.2, 0.5, 0.8]]), tensor([[0.5]])
    close(bpgo.contrastive_rewards(R, prior, 1.0)[0], [-0.366421, 0, 2.893203], 1e-6)


@pytest.mark.parametrize("R", CASES[:2])
def test_the_exponent_may_be_taken_of_the_deviation(R):
    prior = tensor(R.mean(1, keepdims=True) + 0.1)
    as_printed = grpo_base.compute_advantages(bpgo.contrastive_rewards(tensor(R), prior, 2.0), 5.0)
    shifted = grpo_base.compute_advantages(bpgo.contrastive_rewards(tensor(R) - prior, 0, 2.0), 5.0)
    close(as_printed, shifted, 1e-7)  # eps of the standard deviation is what is left


def test_contrastive_advantages_of_a_group_far_below_its_prior():
    # 0.5 or more of HPSv2's units of 0.01 below it
    R = tensor([[0.262, 0.270, 0.275, 0.280, 0.284, 0.290, 0.300]])
    found = bpgo.compute_advantages(bpgo.contrastive_rewards(R - 0.305, 0, 1.0 / 0.01), 5.0)
    close(found[0], [-1.53, -0.87, -0.45, -0.02, 0.32, 0.83, 1.71], 0.0051)


@pytest.mark.parametrize("lam_per_unit", [0.0, 1.0, 4.0, 100.0])
def test_contrastive_rewards_rise_with_the_reward_where_it_is_less_than_1_below_its_prior(
    lam_per_unit,
):
    deviation = torch.linspace(-1, 12, 2000, dtype=torch.float64)[None, 1:]
    rise = bpgo.contrastive_rewards(deviation, 0, lam_per_unit).diff(dim=1)
    assert (rise >= 0).all() and (lam_per_unit == 0 or (rise > 0).all())


def test_the_scale_of_the_reward_stays_out_of_the_exponent(train, monkeypatch):
    """eq 4 in float64 on a step's own rewards, all some units of the verifier's 0.25 below their
    prior."""
    seen, honest = [], bpgo.compute_advantages
    monkeypatch.setattr(
        bpgo, "compute_advantages", lambda r, top: seen.append(r.double().numpy()) or honest(r, top)
    )
    train(bpgo, steps=1, group_size=8, prior="constant", prior_value=1.0, lam=1.5)
    R, contrast = seen
    assert R.mean() < 1 - 2 * 0.25
    expected = (1.5 * (R - 1) / 0.25 + (R > 1)) * np.exp(R)
    close(contrast * np.e, expected, 1e-5)  # a factor common to a group
    assert (R.argsort() == contrast.argsort()).all()


def test_the_exponent_is_bounded():
    huge = bpgo.contrastive_rewards(tensor([[-1e4, 0.0, 1e4]]), 0, 1.0)
    assert torch.isfinite(huge).all() and huge[0, 2] == (1e4 + 1) * np.exp(10)


# --- BPGO as its authors released it: TeleBoost, commit d4279ac ---


def released_weight(R, prior, alpha, prior_variance, low, high):
    """One group's weight in plain Python; R: its scores."""
    n = len(R)
    if n == 0:
        return 1.0
    v = 1.0 if n == 1 else sum((r - sum(R) / n) ** 2 for r in R) / (n - 1) + 1e-8
    var_p = 1 / (n / v + 1 / prior_variance)
    mean_p = var_p * (sum(R) / v + prior / prior_variance)
    z = (mean_p - prior) / var_p**0.5
    probability = 0.5 * math.erfc(-z / 2**0.5)
    return min(max(1 + alpha * (low + (high - low) * probability - 1), 0.01), 10.0)


RELEASED_CASES = [
    *CASES,
    RNG.uniform(1, 20, (4, 6)),  # a judge on a scale of 20
    RNG.normal(-3, 0.1, (2, 3)),
    np.full((2, 4), 0.7),  # equal rewards
    RNG.uniform(0, 1, (3, 1)),  # one sample
    np.where(RNG.uniform(size=(6, 5)) < 0.4, np.nan, RNG.uniform(0, 1, (6, 5))),
    np.full((1, 3), np.nan),
]


@pytest.mark.parametrize("R", RELEASED_CASES)
@pytest.mark.parametrize("away", [0.0, 0.3, -2.0, 1000.0])
@pytest.mark.parametrize(
    "alpha, prior_variance, trust_range",
    [
        (1.0, 1.0, (0.5, 1.5)),
        (0.3, 0.01, (0.0, 3.0)),
        (1.0, 1.0, (0.0, 0.0)),
        (0.0, 1.0, (0.5, 1.5)),
    ],
)
def test_released_reliability_weights(R, away, alpha, prior_variance, trust_range):
    prior = RNG.normal(0.5, 0.5, (len(R), 1)) + away
    ours = bpgo.released_reliability_weights(
        tensor(R), tensor(prior), alpha, prior_variance, trust_range
    )
    expected = [
        [released_weight(row[~np.isnan(row)].tolist(), p, alpha, prior_variance, *trust_range)]
        for row, (p,) in zip(R, prior)
    ]
    close(ours, expected, 1e-6)  # the plain difference of means cancels where v is 1e-8
    single = bpgo.released_reliability_weights(
        tensor(R).float(), tensor(prior).float(), alpha, prior_variance, trust_range
    )
    close(single, ours, 2e-5)


def test_released_reliability_weights_of_known_groups():
    def weight(R, prior):
        return bpgo.released_reliability_weights(
            tensor([R]), tensor([[prior]]), 1.0, 1.0, (0.5, 1.5)
        )

    assert weight([4, 5, 6], 0).item() == pytest.approx(1.5, abs=1e-12)  # z = 7.5
    for R, prior in (([0.3, 0.3], 0.3), ([0.2, 0.4], 0.3), ([5.0], 5.0)):
        assert weight(R, prior).item() == pytest.approx(1.0, abs=1e-12)
    # one sample: its variance is taken as 1
    assert weight([6.0], 5.0).item() == pytest.approx(0.5 + 0.5 * math.erfc(-0.5), abs=1e-12)


@pytest.mark.parametrize("R", RELEASED_CASES)
@pytest.mark.parametrize("away", [0.0, 0.3, -2.0, 1000.0])
@pytest.mark.parametrize("slope, temperature", [(50.0, 5.0), (0.0, 0.01), (3.0, 100.0)])
def test_released_contrastive_rewards(R, away, slope, temperature):
    prior = RNG.normal(0.5, 0.5, (len(R), 1)) + away
    exponent = np.clip(-R / temperature, -30, 30)
    expected = (slope * (R - prior) + np.where(R > prior, 1.0, 0.0)) / (1 + np.exp(exponent)) * R
    ours = bpgo.released_contrastive_rewards(tensor(R), tensor(prior), slope, temperature)
    close(ours, expected)
    found = bpgo.compute_advantages(ours, 5.0)
    assert found.isfinite().all() and (found[tensor(R).isnan()] == 0).all()


def test_released_contrastive_rewards_of_known_samples():
    R = tensor([[1, 0.1, 0.5]])
    ours = bpgo.released_contrastive_rewards(R, tensor([[0.5]]), 50.0, 5.0)
    close(ours[0], [14.296, -1.010, 0], 5e-4)


def test_where_the_released_contrast_falls_as_the_reward_rises():
    """docs/methods/bpgo.md: up to about half of the prior, whatever its sign."""
    for prior, turn in ((0.3, 0.151), (1.0, 0.512), (5.0, 2.728), (-1.0, -0.498)):
        R = torch.linspace(-1.5 * abs(prior), 2 * abs(prior), 40001, dtype=torch.float64)
        rises = bpgo.released_contrastive_rewards(R, prior, 50.0, 5.0).diff() > 0
        first = R[1:][rises][0].item()
        assert first == pytest.approx(turn, abs=0.003) and rises[R[1:] > turn + 0.01].all()


def test_the_released_weight_saturates_and_compares_two_scales():
    """docs/methods/bpgo.md, at HPSv2's size: prior 0.28, eight rewards with a spread of 0.01."""
    shape = torch.linspace(-1, 1, 8, dtype=torch.float64)
    for above, alone, contrasted in ((0.0025, 1.26, 0.50), (0.005, 1.42, 0.50), (0.01, 1.50, 0.53)):
        R = (0.28 + above + 0.01 * shape / shape.std())[None]
        both = R, bpgo.released_contrastive_rewards(R, 0.28, 50.0, 5.0)
        found = [bpgo.released_reliability_weights(x, 0.28, 1.0, 1.0, (0.5, 1.5)) for x in both]
        assert [x.item() for x in found] == pytest.approx([alone, contrasted], abs=0.005)
        assert both[1].min() > -0.11 and both[1].max() < 0.36


@pytest.mark.parametrize("R", CASES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("normalize", ["before", "after", "shaped", "none"])
def test_super_linear_advantages(R, gamma, normalize):
    deviation, std = R - R.mean(1, keepdims=True), R.std()
    shaped = np.sign(deviation) * np.abs(deviation) ** (1 + gamma)
    units = {"before": std ** (1 + gamma), "after": std, "shaped": shaped.std(), "none": 1.0}
    expected = shaped / units[normalize]
    ours = slas.compute_advantages(tensor(R), gamma, 1e9, normalize)
    largest = np.abs(expected).max()
    close(ours / largest, expected / largest, 1e-5)  # eps against deviations of 0.003
    top = largest / 2
    close(
        slas.compute_advantages(tensor(R), gamma, top, normalize) / top,
        (expected / top).clip(-1, 1),
        1e-5,
    )


def test_prompts_keep_their_own_spread():
    group = tensor([0.1, 0.4, 0.5, 0.9, 0.2, 0.6])
    R = torch.stack([group, 0.3 + 10 * group])
    grpo = grpo_base.compute_advantages(R, 5.0)
    close(grpo[0], grpo[1], 1e-6)
    for gamma in (0.0, 0.5, 1.0):
        small, large = slas.compute_advantages(R, gamma, 1e9)
        close(large / small, np.full(6, 10 ** (1 + gamma)), 1e-6)


def test_equal_rewards_have_advantage_zero_exactly():
    R = torch.tensor([[0.1] * 7, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
    assert slas.compute_advantages(R, 0.5, 5.0)[0].tolist() == [0.0] * 7


@pytest.mark.parametrize("G, bias", [(8, -0.035), (16, -0.017)])
def test_bias_of_the_sample_standard_deviation(G, bias):
    """Lemma 2: why one standard deviation of the whole batch is the better estimate."""
    samples = torch.randn(
        400_000, G, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert samples.std(1).mean().item() - 1 == pytest.approx(bias, abs=0.001)


@pytest.mark.parametrize("R", CASES)
def test_hoyer_sparsity(R):
    root = np.sqrt(R.shape[1])
    expected = (root - np.abs(R).sum(1) / np.sqrt((R**2).sum(1))) / (root - 1)
    close(self_paced.hoyer_sparsity(tensor(R)), expected)


def test_hoyer_sparsity_of_known_groups():
    groups = tensor([[1, 0, 0, 0], [7, 7, 7, 7], [0, 0, 0, 0]])
    assert self_paced.hoyer_sparsity(groups).tolist() == [1, 0, 0]


def hoyer(r):
    """Hoyer's index of rewards [K, P, G] in NumPy: [K][P]."""
    root = r.shape[-1] ** 0.5
    return [[(root - abs(g).sum() / (g @ g) ** 0.5) / (root - 1) for g in stage] for stage in r]


@pytest.mark.parametrize("beta, slope", [(0.5, 10.0), (0.3, 1.0), (0.0, 3.0)])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_stage_utilities_of_version_4(K, beta, slope):
    P, G = 3, 6
    r, tau = RNG.uniform(0, 1, (K, P, G)), [0.4, 0.5, 0.6, 0.7][:K]
    S = [*hoyer(r), [0.0] * P]
    expected = np.zeros((K, P))
    for p in range(P):
        g = [
            1 / (1 + np.exp(-slope * (r[j, p].mean() - tau[j]))) + beta * (S[j][p] - S[j + 1][p])
            for j in range(K)
        ]
        expected[:, p] = np.exp(g) / np.exp(g).sum()
    utilities = self_paced.stage_utilities(tensor(r), tau, beta, slope)
    close(self_paced.stage_weights(utilities, alpha=1.0), expected)


def test_version_4_prefers_a_stage_that_still_separates_and_version_1_the_one_after_it():
    equal, apart = [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 2.0]
    r, tau = tensor([[apart], [equal], [equal]]), (0.5, 0.5, 0.5)
    v1 = self_paced.stage_gates(r, tau, beta=0.5, slope=10.0)[:, 0]
    v4 = self_paced.stage_utilities(r, tau, beta=0.5, slope=10.0)[:, 0]
    close(v1, [0.5, 1.0, 0.5])
    close(v4, [1.0, 0.5, 0.5])


@pytest.mark.parametrize("gate", ["previous", "own"])
@pytest.mark.parametrize("saturation", ["hoyer", "one-minus-hoyer"])
@pytest.mark.parametrize(
    "alpha, beta, slope", [(4.0, 0.5, 10.0), (1.0, 0.0, 3.0), (0.0, 0.5, 10.0)]
)
def test_stage_weights(alpha, beta, slope, saturation, gate):
    K, P, G = 4, 3, 6
    r, tau = RNG.uniform(0, 1, (K, P, G)), [0.4, 0.5, 0.6, 0.7]
    S = hoyer(r)
    if saturation != "hoyer":
        S = [[1 - s for s in row] for row in S]
    expected = np.zeros((K, P))
    for p in range(P):
        g = []
        for j in range(K):
            opener = j if gate == "own" else j - 1
            opened = 0.5  # the first gate of "previous"
            if opener >= 0:
                opened = 1 / (1 + np.exp(-slope * (r[opener, p].mean() - tau[opener])))
            g.append(opened + (beta * (S[j - 1][p] - S[j][p]) if j else 0.0))
        e = np.exp(alpha * np.array(g))
        expected[:, p] = e / e.sum()
    settings = dict(saturation=saturation, gate=gate)
    ours = weights_of(tensor(r), tau, alpha, beta, slope, **settings)
    close(ours, expected)
    close(ours.sum(0), np.ones(P))
    if alpha == 0:
        assert torch.equal(ours, torch.full((K, P), 0.25, dtype=torch.float64))


def weights_at(*means, tau=(0.75, 0.75, 0.75), **settings):
    """The stages' weights of a prompt whose samples all have these mean rewards, one for each
    stage."""
    samples = tensor(means)[:, None, None].repeat(1, 1, 16)
    return weights_of(samples, tau, 4.0, 0.0, 10.0, **settings)[:, 0]


def test_stage_weights_before_training_as_figure_7_has_the_means():
    close(weights_at(0.724, 0.672, 0.466), [0.55, 0.34, 0.12], 0.006)
    close(weights_at(0.724, 0.672, 0.466, gate="previous"), [0.44, 0.34, 0.21], 0.005)


def test_the_first_gate_opens_as_the_first_stage_rises_as_in_figure_10():
    def previous(*means):
        return weights_at(*means, gate="previous").argmax()

    assert previous(0.73, 0.672, 0.466) == 0 and previous(0.81, 0.672, 0.466) == 1
    assert previous(0.81, 0.77, 0.55) == 1 and previous(0.81, 0.83, 0.55) == 2
    # the third stage's own mean, far below tau, keeps it shut
    assert weights_at(0.81, 0.83, 0.55).argmin() == 2


@pytest.mark.parametrize("gate, opener", [("previous", 1), ("own", 2)])
def test_a_stage_gains_weight_as_the_one_that_opens_its_gate_passes_its_threshold(gate, opener):
    def third(mean):
        means = [0.9, 0.7, 0.6]
        means[opener] = mean
        return weights_at(*means, tau=(0.75, 0.5, 0.5), gate=gate)[2].item()

    assert third(0.2) < third(0.4) < third(0.5) < third(0.6) < third(0.9)


def test_one_stage_alone():
    r = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0))
    gates = self_paced.stage_gates(r, (0.5, 0.5, 0.5), beta=0.5, slope=10.0)
    for only in (1, 2, 3):
        found = self_paced.stage_weights(gates, 4.0, only_stage=only)
        assert found.tolist() == [[float(k == only - 1)] * 2 for k in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations_keep_the_dtype(dtype):
    R = torch.rand(3, 6, dtype=dtype)
    for value in (
        bpgo.reliability_weights(R.mean(1, keepdim=True), 0.2, 0.5, 1.0),
        bpgo.contrastive_rewards(R, R.mean(1, keepdim=True), 1.0),
        slas.compute_advantages(R, 0.5, 5.0),
        self_paced.hoyer_sparsity(R),
        bpgo.released_reliability_weights(R, 0.2, 1.0, 1.0, (0.5, 1.5)),
        bpgo.released_contrastive_rewards(R, R.mean(1, keepdim=True), 50.0, 5.0),
        weights_of(R[:, None], (0.5, 0.5, 0.5), 1.0, 1.0, 1.0),
        self_paced.stage_utilities(R[:, None], (0.5, 0.5, 0.5), 1.0, 1.0),
        self_paced.combine_scores({"a": R}, {"a": R[:, :1]}),
    ):
        assert value.dtype == dtype


# --- Neutral settings are the baseline, bit for bit ---

NEUTRAL = {
    "bpgo": dict(alpha=0.0, beta=0.0),
    "bpgo released": dict(variant="released", alpha=0.0, crt=False),
    "slas": dict(gamma=0.0, prompts_per_step=1, group_size=8),
    "self_paced": dict(thresholds=(0.5,)),
    "self_paced v4": dict(variant="v4", thresholds=(0.5,)),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_the_baseline_bit_for_bit(train, name):
    shared = dict(steps=4, reward=("verifier",), learning_rate=1e-3, save_every=0)
    both = {
        key: value
        for key, value in NEUTRAL[name].items()
        if key in ("prompts_per_step", "group_size")
    }
    base, expected = train(**shared, **both)
    folder, rows = train(METHODS[name.split()[0]], "method", **shared, **NEUTRAL[name])
    assert sum(row["grad_norm"] > 0 for row in expected) >= 3  # at least three real updates
    assert [{key: row[key] for key in expected[0]} for row in rows] == expected
    ours, theirs = weights(folder, 4), weights(base, 4)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", METHODS)
def test_default_settings_are_not_the_baseline(train, name):
    shared = dict(steps=2, reward=STAGES, learning_rate=1e-3, save_every=0)
    base, _ = train(**shared)
    folder, _ = train(METHODS[name], "method", **shared)
    assert any(
        not torch.equal(weights(folder, 2)[key], value) for key, value in weights(base, 2).items()
    )


# --- State ---

STATEFUL = {
    "bpgo running mean": (bpgo, {}),
    "bpgo sft": (bpgo, dict(prior="sft")),
    "bpgo sft, lora": (bpgo, dict(prior="sft", lora_rank=4)),
    "bpgo released": (bpgo, dict(variant="released", alpha=1.0, minibatches=2)),
    "self_paced": (self_paced, {}),
    "self_paced v4": (self_paced, dict(variant="v4", alpha=1.0, minibatches=2)),
}


@pytest.mark.parametrize("case", STATEFUL)
def test_resumed_run_equals_the_uninterrupted_one(train, case):
    script, settings = STATEFUL[case]
    settings = dict(save_every=1, learning_rate=1e-3, **settings)
    whole, rows = train(script, steps=4, **settings)
    train(script, "parts", steps=2, **settings)
    parts, resumed = train(script, "parts", steps=4, resume="latest", **settings)
    assert resumed == rows
    about = json.loads((whole / "checkpoints/step_000004/checkpoint.json").read_text())
    for name in sorted(about["parts"]):
        file = f"checkpoints/step_000004/{name}.pt"
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), name


@pytest.mark.parametrize("script, state", [(bpgo, "prior"), (slas, "region")])
def test_a_checkpoint_without_the_methods_state_is_refused_by_name(train, script, state):
    folder, _ = train(script, steps=1)
    about = folder / "checkpoints/step_000001/checkpoint.json"
    kept = json.loads(about.read_text())
    del kept["parts"][state]
    about.write_text(json.dumps(kept))
    with pytest.raises(errors.InputError, match=f"only one of them has {state}"):
        train(script, steps=2, resume="latest")


# --- Priors ---


def plain_model():
    model = models.load("tiny-flux", torch.float32, height=32, width=32)
    for module in model.trainable.values():
        module.requires_grad_(False).eval()
    return model


def test_running_mean_never_sees_its_own_step_but_the_first(train):
    _, rows = train(bpgo, steps=4, learning_rate=1e-3)
    means = [row["reward_mean"] for row in rows]
    expected = [means[0]] + [sum(means[:n]) / n for n in (1, 2, 3)]
    assert [row["prior"] for row in rows] == pytest.approx(expected, abs=1e-6)


def test_running_mean_forgets():
    prior = bpgo.RunningMeanPrior()
    for step in range(200):
        expected = prior.expect(["a"], torch.full((1, 4), float(step >= 100)))
    assert expected.item() == pytest.approx(1 - (1 - 1 / bpgo.RUNNING_MEAN_STEPS) ** 99, abs=1e-6)


def test_each_row_has_its_own_measured_prior(tmp_path):
    """Rows with one caption and other fields, or another image; each is measured once."""
    rows = [("a sign", "EXIT"), ("a sign", "OPEN"), ("a door", "EXIT"), ("a sign", "EXIT")]
    lines = [json.dumps({"prompt": caption, "text": text}) for caption, text in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '"a sign"']))
    (tmp_path / "b.txt").write_text("1.png\ta sign\n2.png\ta sign\n")
    prompts = read_prompts(tmp_path / "a.jsonl") + read_prompts(tmp_path / "b.txt")
    measured = []

    def measure(new):
        measured.extend(new)
        return torch.arange(len(measured) - len(new), len(measured)).float()

    prior = bpgo.PromptPrior(measure)
    reward = torch.zeros(len(prompts), 4)
    expected = [[0.0], [1.0], [2.0], [0.0], [3.0], [4.0], [5.0]]
    assert prior.expect(prompts, reward).tolist() == expected
    assert [fields_of(prompt).get("text") for prompt in measured] == [
        "EXIT",
        "OPEN",
        "EXIT",
        *3 * [None],
    ]
    assert prior.expect(prompts[::-1], reward).tolist() == expected[::-1] and len(measured) == 6
    assert all(type(key) is str for key in prior.state["known"])  # checkpoints hold plain values


def test_measured_priors_of_an_older_checkpoint_are_used_on():
    """There the key was the caption, which is still that of a prompt without fields."""
    prior = bpgo.PromptPrior(None)  # measures nothing
    prior.state["known"] = {"a sign": 0.25, "1.png\ta sign": 0.5}
    prompts = ["1.png\ta sign", "a sign"]
    assert prior.expect(prompts, torch.zeros(2, 4)).tolist() == [[0.5], [0.25]]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sft_prior_is_what_the_initial_weights_get_even_after_updates(train, tmp_path, lora_rank):
    prompts = ["a red circle", "a blue square", "two shapes", "a cross above a circle"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    settings = dict(
        prompts=str(tmp_path / "prompts.txt"),
        learning_rate=1e-2,
        lora_rank=lora_rank,
        sampling_steps=8,
    )
    folder, rows = train(bpgo, steps=3, prior="sft", **settings)
    known = weights(folder, 3, "prior")["known"]
    assert set(known) == set(prompts)
    args = defaults(bpgo.Args, reward=("verifier",), sampling_steps=8)
    rewards, untrained = Rewards(args, prompts), plain_model()
    sigmas = untrained.sigmas(args.sampling_steps, args.shift)
    for step in (0, 1):  # the second step's prompts are asked for after an update
        batch = prompts_of_step(read_prompts(settings["prompts"]), step, 2, 0)
        captions = [prompt for prompt in batch for _ in range(4)]
        images = sample(untrained, captions, torch.arange(8), sigmas=sigmas, micro_batch=8)
        expected = rewards.score(images, captions)["verifier"].view(2, 4).mean(1)
        assert [known[p] for p in batch] == pytest.approx(expected.tolist(), abs=1e-5)
        assert rows[step]["prior"] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_first_frame_prior_is_the_score_of_the_image_held_still(train, monkeypatch):
    asked = []

    class FromImage(Flux):  # FLUX takes no image; what an image-to-video model adds is this method
        def still(self, prompts):
            asked.extend(prompts)
            return torch.stack([torch.full((3, 32, 32), len(prompt) / 100) for prompt in prompts])

    class Brightness:
        scale, range = 0.1, (0.0, 1.0)

        def score(self, media, prompts):
            return media.float().mean((1, 2, 3))

    monkeypatch.setitem(models.FAMILIES, "FluxPipeline", (__name__, "FromImage"))
    monkeypatch.setattr(sys.modules[__name__], "FromImage", FromImage, raising=False)
    monkeypatch.setattr(sys.modules["worlds.verifier"], "Verifier", Brightness)
    folder, rows = train(bpgo, steps=3, prior="first-frame")
    known = weights(folder, 3, "prior")["known"]
    assert len(asked) == len(set(asked)) == len(known)  # once a prompt
    assert all(
        value == pytest.approx(len(prompt) / 100, abs=1e-6) for prompt, value in known.items()
    )


def test_field_prior_is_the_number_of_the_prompts_own_line(train, tmp_path):
    """Two lines with one caption have priors of their own."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red circle", "prior": 0.25}, {"prompt": "a red circle", "prior": 1}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = dict(prompts=str(file), prior="field", reward_scale=1.0, k=2.0, steps=1)
    _, (row, *_) = train(bpgo, **settings)
    assert row["prior"] == pytest.approx((0.25 + 1) / 2)
    prompts = read_prompts(str(file))
    expected = bpgo.FieldPrior().expect(prompts, torch.zeros(2, 4))
    assert expected.tolist() == [[0.25], [1.0]]


@pytest.mark.parametrize(
    "value", ["0.5", None, True, [0.5], {}, math.nan, math.inf, -1e7, 1e39, 10**400]
)
def test_field_prior_of_no_number_is_refused_by_its_prompt(tmp_path, value):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red circle", "prior": 0.5}, {"prompt": "two crosses", "prior": value}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(errors.InputError, match="'two crosses' has no number `prior`"):
        bpgo.check_settings(bpgo.Args(prior="field"), read_prompts(str(file)))


def test_constant_prior(train):
    _, rows = train(bpgo, steps=2, prior="constant", prior_value=0.3, reward_scale=1.0, k=2.0)
    for row in rows:
        assert row["prior"] == pytest.approx(0.3)
        assert row["trust_min"] <= row["trust_mean"] <= row["trust_max"]
    both = 1 + 0.5 * (2 / (1 + np.exp(-2.0 * (rows[0]["reward_mean"] - 0.3))) - 1)
    assert rows[0]["trust_min"] - 1e-6 <= both <= rows[0]["trust_max"] + 1e-6


def test_gradient_of_both_terms_is_theirs_added(train):
    """L = w L(A) + beta L(A of Rt): at the first update, where the ratio is 1, the gradients add
    up."""

    def gradient(output, **settings):
        seen = []
        honest = bpgo.Policy.step

        def step(policy):
            seen.append(torch.cat([weight.grad.flatten() for weight in policy.weights]))
            return honest(policy)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpgo.Policy, "step", step)
            shared = dict(steps=1, group_size=8, save_every=0, prior="constant", prior_value=0.2)
            train(bpgo, output, **shared, **settings)
        return seen[0].double()

    plain = gradient("plain", alpha=0.0, beta=0.0)
    trusted = gradient("ras", alpha=0.5, beta=0.0)
    contrast = gradient("crt", alpha=0.0, beta=1.0) - plain
    everything = gradient("both", alpha=0.5, beta=0.7)
    alone = gradient("alone", alpha=0.5, beta=0.3, crt_alone=True)
    assert contrast.norm() > 0.1 * plain.norm() and (trusted - plain).norm() > 0.01 * plain.norm()
    assert (everything - trusted - 0.7 * contrast).norm() <= 1e-4 * everything.norm()
    assert (alone - contrast).norm() <= 1e-4 * contrast.norm()  # eq 5


# --- Stages ---


class Calibrated:
    """self_paced.py as its command line runs it: --calibrate comes before main."""

    Args, __file__ = self_paced.Args, self_paced.__file__

    @staticmethod
    def main(args):
        return self_paced.main(self_paced.calibrate(args))


def test_stages_of_tiny_flux_and_the_picture_of_the_curriculum(train):
    settings = dict(prompts_per_step=2, group_size=4, eval_every=2, sample_every=2)
    folder, rows = train(self_paced, steps=2, **settings)
    assert defaults(self_paced.Args).reward == STAGES
    for row in rows[:-1]:
        assert sum(row[f"weight_{name}"] for name in STAGES) == pytest.approx(1, abs=1e-6)
        assert all(
            row[f"competence_{name}"] == pytest.approx(row[f"{name}_mean"], abs=1e-6)
            for name in STAGES
        )
    assert rows[0]["eval_reward"] == rows[0]["eval_verifier"]  # the last stage
    for picture in ("weight.png", "competence.png", "reward.png"):
        assert (folder / picture).stat().st_size > 5000


def test_layout_stage_does_not_ask_what_the_objects_are():
    captions = ["a red circle left of a blue square", "two crosses", "a green triangle"]
    other = ["a black cross left of a green circle", "two blue squares", "a red square"]
    images = render(sample_scenes(captions, seed=0))
    rewards = Rewards(defaults(self_paced.Args), captions)
    right, wrong = (rewards.score(images, names) for names in (captions, other))
    assert torch.allclose(right["verifier:quality"], wrong["verifier:quality"])
    assert torch.allclose(right["verifier:layout"], wrong["verifier:layout"])
    assert (right["verifier"] - wrong["verifier"] > 0.3).all()
    assert (right["verifier:layout"] <= right["verifier:quality"] + 1e-6).all()


@pytest.mark.long
@pytest.mark.parametrize(
    "gate, openers", [("previous", ["verifier:quality"]), ("own", ["verifier:quality", "verifier"])]
)
def test_calibrate_trains_alone_the_stages_that_open_a_gate_and_only_once(
    train, capsys, monkeypatch, gate, openers
):
    settings = dict(
        prompts_per_step=1, group_size=2, sampling_steps=2, learning_rate=1e-3, save_every=10
    )
    settings |= dict(reward=("verifier:quality", "verifier"), calibrate=True, gate=gate)
    settings |= dict(only_stage=2 if gate == "own" else 0)  # of the run alone
    alive, settle = [], memory.settle

    def counting(*values):
        alive.append(sum(isinstance(thing, Family) for thing in gc.get_objects()))
        return settle(*values)

    monkeypatch.setattr(memory, "settle", counting)
    folder, rows = train(Calibrated, steps=2, **settings)
    # the stage's model is gone when the next one's is to be loaded
    assert len(alive) == 1 + len(openers) and len(set(alive)) == 1
    assert len(list(folder.glob("calibrate-*"))) == len(openers)
    thresholds = []
    for opener in openers:
        calibration = folder / f"calibrate-{opener.replace(':', '-')}"
        means = [row["reward_mean"] for row in metrics(calibration)]
        assert len(means) == 50 and means == [row[f"{opener}_mean"] for row in metrics(calibration)]
        thresholds.append(0.3 * sum(means[:5]) / 5 + 0.7 * sum(means[-5:]) / 5)
    found = json.loads((folder / "config.json").read_text())["thresholds"]
    assert found == pytest.approx(thresholds, abs=1e-9)
    measured = " ".join(f"{tau:.3f}" for tau in thresholds)
    assert f"measured: --thresholds {measured}" in capsys.readouterr().out
    if gate == "own":
        return
    # stopped in the calibration, which continues
    (folder / "config.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(calibration / "checkpoints/step_000050")
    assert train(Calibrated, steps=2, resume="latest", **settings)[1] == rows
    # stopped later: the thresholds are the run's, and those of a run that begins with a checkpoint
    shutil.rmtree(calibration)
    _, more = train(Calibrated, steps=3, resume="latest", **settings)
    assert more[:2] == rows and len(more) == 3 and not calibration.exists()
    settings |= dict(steps=3, resume=str(folder / "checkpoints/step_000002"))
    new, rows = train(Calibrated, "new", **settings)
    assert rows == more and not list(new.glob("calibrate-*"))


def test_calibrate_of_one_stage_and_of_another_scripts_run(train):
    one = dict(reward=("verifier",), gate="previous", thresholds=())
    folder, rows = train(Calibrated, calibrate=True, **one)
    assert len(rows) == 2 and not json.loads((folder / "config.json").read_text())["thresholds"]
    train(output="other")
    line = "was started with script 'grpo_base', now it is 'self_paced'"
    with pytest.raises(errors.InputError, match=line):
        train(Calibrated, output="other", resume="latest", calibrate=True)


def test_every_process_knows_the_rows_of_a_run_that_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {n}, "reward_mean": {n / 10}}}\n' for n in range(9))
    )
    log = Log(self_paced.Args(), tmp_path, SimpleNamespace(is_main=False), 8)
    assert log.ends("reward_mean", 2) == pytest.approx((0.05, 0.65))


# --- Bad input ---

BAD = {
    "bpgo --alpha 1.5": "--alpha 1.5: must be from 0 to 1",
    "bpgo --alpha -0.1": "--alpha -0.1",
    "bpgo --beta nan": "--beta nan",
    "bpgo --prior first-frame": "has no conditioning image",
    "slas --gamma -0.5": "--gamma -0.5: must be from 0",
    "slas --kl-limit 0": "--kl-limit 0",
    "bpgo --trust-range 1.5 0.5": "--trust-range 1.5 0.5: must rise",
    "bpgo --trust-range 0.5 11": "--trust-range 11.0: must be from 0 to 10",
    "bpgo --prior-variance 0": "--prior-variance 0",
    "bpgo --crt-temperature 0": "--crt-temperature 0",
    "bpgo --crt-alone --no-crt": "--crt-alone: --no-crt leaves nothing",
    "bpgo --crt-alone --variant released": "--crt-alone: only for --variant printed",
    "bpgo --aggregate advantages --variant released": "--aggregate advantages: CRT of --variant",
    "bpgo --prior field": "has no number `prior`",
    "self_paced --thresholds 0.5": "--thresholds: --reward has 3 stages, which need 3, got 1",
    "self_paced --gate previous --thresholds 0.5": "3 stages, which need 2, got 1",
    "self_paced --reward verifier": "--thresholds: --reward has 1 stage, which needs 1, got 3",
    "self_paced --reward jpeg verifier --thresholds 0.5 0.5": "reward jpeg: its scores have no",
    "self_paced --variant v4 --gate previous": "--gate previous: only for --variant v1",
    "self_paced --variant v4 --saturation one-minus-hoyer": "--saturation one-minus-hoyer: only",
    "self_paced --stage-range 3 -3": "--stage-range 3 -3: not two rising numbers",
    "self_paced --stage-range 3": "--stage-range 3: not two rising numbers",
    "self_paced --reward verifier=2 --thresholds": "--reward: stages have no weights",
    "self_paced --only-stage 4": "--only-stage 4: there is no such stage, --reward names 3",
    "self_paced --aggregate advantages": "--aggregate advantages: stages are mixed as rewards",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(line, tmp_path, monkeypatch, capsys):
    name, *flags = line.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, "--output", str(tmp_path / "fresh")])
    with pytest.raises(SystemExit) as exit:
        errors.run(METHODS[name].main, cli.parse(METHODS[name].Args, "text"))
    captured = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert re.fullmatch(r"error: [^\n]+", captured), captured
    assert BAD[line] in captured
    assert not list(tmp_path.iterdir()), "nothing may be written before the line"


@pytest.mark.parametrize("name", METHODS)
def test_every_flag_is_read(name):
    flags, source = own_flags(METHODS[name]), inspect.getsource(METHODS[name])
    assert flags and all(re.search(rf"args\.{flag}\b", source) for flag in flags)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_page_has_the_hunks_and_the_numbers_of_today(name):
    text = page(name).read_text()
    assert with_diff(text, name) == text, "run python -m lab.method_diffs"
    equations = dict(bpgo="reliability_weights", slas="compute_advantages")
    equation = equations.get(name, "stage_weights")
    assert f"\n+def {equation}(" in text
    options = doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testfile(str(page(name)), module_relative=False, optionflags=options)
    torch.set_printoptions(profile="default")
    assert not failed and tried >= 7
