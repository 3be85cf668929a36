"""docs/learn: the answers to its exercises, and its pictures."""

import pytest
import torch
from conftest import ROOT
from PIL import Image

import bpgo
import grpo_base
import self_paced
import slas
from lab import dials, learn
from lab.points import Judge

CLIP = 5.0
WIDE, TIGHT = [0.2, 0.4, 0.6, 0.8], [0.52, 0.54, 0.56, 0.58]
PAGE = ROOT / "docs/learn"


def mean_size(advantages):
    return [round(size, 3) for size in advantages.abs().mean(1).tolist()]


# --- Exercises ---


def test_1_advantages_do_not_depend_on_the_spread():
    """Both groups have the same advantages: (-3, -1, 1, 3) / sqrt(5)."""
    found = grpo_base.compute_advantages(torch.tensor([WIDE, TIGHT]), CLIP)
    answer = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 5**0.5
    assert torch.allclose(found, answer.expand(2, 4), atol=1e-4)
    assert [round(value, 2) for value in answer.tolist()] == [-1.34, -0.45, 0.45, 1.34]


def test_2_one_std_of_the_batch_makes_the_tight_group_small():
    """SLAS: ten times smaller with gamma 0, 32 times with gamma 0.5; GRPO: equal."""
    reward = torch.tensor([WIDE, TIGHT])
    assert mean_size(grpo_base.compute_advantages(reward, CLIP)) == [0.894, 0.894]
    assert mean_size(slas.compute_advantages(reward, 0.0, CLIP)) == [1.243, 0.124]
    assert mean_size(slas.compute_advantages(reward, 0.5, CLIP)) == [1.519, 0.048]


def test_3_trust_takes_a_high_score_for_a_clear_one():
    """Weights 0.619, 1, 1.381. A vague prompt that scores 0.9 has 1.493: more than any other."""
    means = torch.tensor([[0.2], [0.4], [0.6], [0.9]])
    found = bpgo.reliability_weights(means, torch.tensor(0.4), 0.5, torch.tensor(10.0))
    assert [round(weight, 3) for weight in found.flatten().tolist()] == [0.619, 1.0, 1.381, 1.493]


def test_4_an_easy_stage_ranks_what_a_flat_stage_cannot():
    """The last stage alone gives zeros. Mixed equally, the advantages are the easy stage's."""
    easy, last = torch.tensor([[0.1, 0.3, 0.5, 0.7]]), torch.zeros(1, 4)
    stages = torch.stack([easy, last])
    weights = self_paced.stage_weights(torch.zeros(2, 1), 0.0)
    mixed = (weights[..., None] * stages).sum(0)
    assert grpo_base.compute_advantages(last, CLIP).abs().max() == 0
    found = grpo_base.compute_advantages(mixed, CLIP)
    assert torch.allclose(found, grpo_base.compute_advantages(easy, CLIP), atol=1e-4)


def test_5_a_preference_is_exploited():
    """The judge's score rises and the truth falls below the base model's. Samples move along the
    judge's direction."""
    world = Judge(learn.BANK, 1, 2, kind="style", noise=0.3)
    one = learn.trained(world, dials.grpo)
    moved = (one.shown[-1] - one.shown[0]).mean((0, 1))
    assert torch.nn.functional.cosine_similarity(moved, world.world.style.view(2), dim=0) > 0.9
    assert one.truth[-1] < one.truth[0] - 0.1
    judge = one.runs.evaluate()["judge"].item()
    assert judge > 0.6 > one.truth[0]


# --- Pictures ---


def test_the_pictures_of_the_page_are_small_and_move():
    text = (PAGE / "README.md").read_text(encoding="utf-8")
    drawn = {path.name for path in PAGE.iterdir() if path.suffix in (".png", ".gif")}
    assert drawn and all(f"({name})" in text for name in drawn)
    assert sum((PAGE / name).stat().st_size for name in drawn) < 3e6
    with Image.open(PAGE / "training.gif") as gif:
        assert gif.n_frames == 21


def test_the_first_step_is_what_the_page_describes():
    """GRPO: equal sizes; SLAS: small in vague groups; the last stage: groups without a hit."""
    world, stages = learn.judged(), learn.Stages(learn.BANK, 1, floor=0.6)
    vague = learn.shown_prompts(world).vague[0].bool()
    size = {
        name: learn.advantages(world, method)[1].abs().mean(1)
        for name, method in (("grpo", dials.grpo), ("slas", dials.slas_by))
    }
    assert size["grpo"][vague].min() > 0.5 * size["grpo"][~vague].max()
    assert size["slas"][vague].max() < 0.2 * size["slas"][~vague].min()
    flat = learn.advantages(stages, dials.grpo)[1]
    assert (flat.abs() < 0.3).float().mean() > 0.5


@pytest.mark.long
def test_pictures_of_a_short_training(tmp_path):
    runs = learn.main(learn.Args(output=tmp_path, steps=8))
    assert {path.name for path in tmp_path.iterdir()} == {
        "before_after.png", "arrows.png", "advantages.png", "training.gif"
    }  # fmt: skip
    for one in runs.values():
        target = one.prompts.target[0][:, None]
        before, after = ((x - target).norm(dim=-1).mean() for x in (one.shown[0], one.shown[-1]))
        assert len(one.shown) == 3 and after < before
