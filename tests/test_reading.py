"""docs/reading.md: its output is what comes out, its functions are where it says, and its exercises
are answered."""

import ast
import doctest
import inspect
import math
import re

import pytest
import torch
from conftest import ROOT
from torch.distributions import Independent, Normal, kl_divergence

import bpgo
import grpo_base
import self_paced
import slas
from common import groups, loss, sde
from common.models.flux import Flux
from common.rewards import Rewards
from common.trainer import Checkpoints, Evaluator, Log, Policy, Processes

PAGE = ROOT / "docs/reading.md"


def test_the_output_is_what_comes_out():
    failed, tried = doctest.testfile(
        str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    torch.set_printoptions(profile="default")
    assert tried > 30 and failed == 0


def test_functions_are_where_it_says():
    cells = re.findall(r"^\| [^|]+ \| (.+) \|$", PAGE.read_text(), re.M)
    named = [
        (path, name)
        for cell in cells
        for path, names in re.findall(r"\[`([\w/]+\.py)`\]\([^)]+\) ((?:`\w+`(?:, )?)+)", cell)
        for name in re.findall(r"`(\w+)`", names)
    ]
    assert len(named) > 15
    for path, name in named:
        nodes = ast.walk(ast.parse((ROOT / path).read_text()))
        assert name in {
            node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }, (path, name)
    owners = {"processes": Processes, "policy": Policy, "rewards": Rewards, "model": Flux}
    for owner, cls in owners.items():
        methods = re.findall(rf"`{owner}\.(\w+)`", "\n".join(cells))
        assert len(methods) >= 3 and all(callable(getattr(cls, name)) for name in methods)


def test_the_objects_are_those_that_main_makes():
    part = PAGE.read_text().partition("## The objects of main")[2].partition("Setup also")[0]
    shown = re.findall(r"^\| `(\w+)` \|.*\| \[`([\w/]+\.py)`\]", part, re.M)
    made = [Processes, Policy, Rewards, Evaluator, Checkpoints, Log]
    assert [path for _, path in shown] == [cls.__module__.replace(".", "/") + ".py" for cls in made]
    main = inspect.getsource(grpo_base.main)
    for (name, _), cls in zip(shown, made):
        assert f"    {name} = {cls.__name__}(" in main


def test_each_exercise_has_its_answer():
    asked = re.findall(r"^(\d+)\. \*\*", PAGE.read_text(), re.M)
    answered = [name.split("_")[2] for name in globals() if name.startswith("test_exercise_")]
    assert asked == answered == [str(i + 1) for i in range(len(asked))]


# --- The answers ---


def test_exercise_1_rounded_latents_move_the_ratio_by_more_than_the_clip_range():
    at = (torch.tensor(1.0), torch.tensor(0.9), torch.tensor(0.3))
    rows = range(4)
    x, velocity, noise = (sde.RowNoise(0, step, rows)((16, 8)) for step in range(3))
    x_next, sampled, _ = sde.sde_step(velocity, x, *at, noise=noise)
    _, again, _ = sde.sde_step(velocity, x, *at, x_next=x_next)
    assert torch.equal(sampled, again)
    _, rounded, _ = sde.sde_step(
        velocity, x.bfloat16().float(), *at, x_next=x_next.bfloat16().float()
    )
    assert ((rounded - sampled).exp() - 1).abs().max() > 1e-4


def test_exercise_2_the_sum_is_as_many_times_the_mean_as_there_are_dimensions():
    D = 45 * 45 * 64  # 720 / 16 = 45
    x = sde.RowNoise(0, 0, [0])((45 * 45, 64))
    summed = Normal(0.01, 0.1).log_prob(x).sum()
    assert torch.allclose(
        sde.gaussian_log_prob(x, torch.tensor(0.01), torch.tensor(0.1)) * D, summed
    )
    assert D == 129600 and D * 1e-4 == pytest.approx(
        12.96
    )  # exp(13): the range would be gone, at both ends


def test_exercise_3_grpo_sees_no_scale_and_slas_none_that_all_prompts_share():
    reward = torch.tensor([[0.1, 0.2, 0.4, 0.3], [0.5, 0.1, 0.9, 0.7]])
    one = reward * torch.tensor([[2.0], [1.0]])
    for other, grpo_same, slas_same in ((2 * reward + 10, True, True), (one, True, False)):
        for advantages, same in (
            (lambda r: grpo_base.compute_advantages(r, 5.0), grpo_same),
            (lambda r: slas.compute_advantages(r, 0.5, 5.0), slas_same),
        ):
            assert torch.allclose(advantages(other), advantages(reward), atol=1e-5) == same


def test_exercise_4_at_the_pole_the_standard_deviation_is_eta():
    sigmas = sde.shifted_sigmas(10, 3.0)
    s = sde.diffusion_coefficients(sigmas, 0.7, "flow")
    assert sde.transition_std(sigmas[0], sigmas[1], s[0]).item() == pytest.approx(0.7)


def test_exercise_5_clipping_acts_in_later_updates_alone():
    def slope(ratio, advantage, clip_range):
        ratio = torch.tensor([ratio], requires_grad=True)
        return torch.autograd.grad(
            loss.clipped_surrogate(ratio, torch.tensor([advantage]), clip_range).sum(), ratio
        )[0]

    for advantage in (1.0, -1.0):  # the first update: the ratio is 1, inside of any range
        assert slope(1.0, advantage, 1e-4) == slope(1.0, advantage, 0.9) == -advantage
    assert slope(1.2, 1.0, 0.1) == 0  # a good sample has been raised enough
    assert slope(1.2, -1.0, 0.1) == 1  # a bad one was raised: back with it, unclipped


def test_exercise_6_trust_is_1_at_the_prior_and_1_plus_alpha_at_most():
    trust = bpgo.reliability_weights(
        torch.tensor([[0.5], [math.inf], [-math.inf]]), 0.5, alpha=0.3, k=1.0
    )
    assert torch.allclose(trust, torch.tensor([[1.0], [1.3], [0.7]]))
    assert (
        bpgo.reliability_weights(torch.rand(5, 1), 0.5, alpha=0.0, k=1.0) == 1
    ).all()  # and beta 0: no second term


def test_exercise_7_four_of_sixteen_are_two_thirds_on_the_way_to_one_alone():
    scores = torch.zeros(16)
    scores[:4] = 1.0  # (sqrt(16) - 4 / sqrt(4)) / (sqrt(16) - 1)
    assert self_paced.hoyer_sparsity(scores).item() == pytest.approx((4 - 2) / (4 - 1))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_exercise_8_noise_changes_the_path_and_not_what_comes_out(eta):
    def velocity(x, sigma):
        return (sigma - (1 - sigma) / 4) / ((1 - sigma) ** 2 / 4 + sigma**2) * x

    generator = torch.Generator().manual_seed(0)
    sigmas = sde.shifted_sigmas(200, 1.0)
    s = sde.diffusion_coefficients(sigmas, eta, "dance")
    x = torch.randn(4000, 1, generator=generator)
    samples = sde.rollout(
        velocity, x, sigmas, s, lambda shape: torch.randn(4000, *shape, generator=generator)
    )[0][:, -1]
    assert samples.std().item() == pytest.approx(0.5, rel=0.05)


def test_exercise_9_the_kl_is_that_of_the_books_per_dimension():
    d, std, D = 0.3, 0.2, 6
    mean = torch.zeros(1, D)
    book = kl_divergence(*(Independent(Normal(m, std), 1) for m in (mean + d, mean)))
    ours = loss.gaussian_kl(mean + d, mean, std)
    assert ours.item() == pytest.approx(d**2 / (2 * std**2)) and torch.allclose(ours * D, book)


def test_exercise_10_equal_or_missing_scores_teach_nothing():
    nan = math.nan
    reward = torch.tensor([[0.4, 0.4, 0.4, 0.4], [nan, 0.9, nan, nan], [0.1, nan, 0.3, 0.2]])
    assert grpo_base.compute_advantages(reward, 5.0)[:2].abs().max() == 0
    kept = groups.keep_rows(reward, best_of=0)
    assert kept.tolist() == [
        [True] * 4,
        [False] * 4,
        [True, False, True, True],
    ]  # the first is kept, with advantage 0
