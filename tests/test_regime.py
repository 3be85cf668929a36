"""lab.regime measures what is planted in scores, and finds the dial's position they came from."""

import math

import numpy as np
import pytest
import torch

from common.errors import InputError
from evaluation.folder import Folder
from lab import dials, regime

P, S = 64, 8
G = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=G)


def test_agreement_is_kendalls_tau():
    """Of normal scores with correlation rho it is 2 / pi asin(rho)."""
    first = normal(4000, 12)
    for rho in (-0.5, 0.0, 0.8):
        second = rho * first + math.sqrt(1 - rho**2) * normal(4000, 12)
        tau = regime.agreement(first, second)
        assert tau.shape == (4000,)
        assert tau.mean().item() == pytest.approx(2 / math.pi * math.asin(rho), abs=0.01)
    assert torch.allclose(regime.agreement(first, 3 * first + 1), torch.ones(4000))


def test_measures_of_planted_scores():
    """A quarter of the groups is flat, a quarter wide; on another the judges disagree."""
    base = torch.linspace(-1, 1, S) / torch.linspace(-1, 1, S).std(unbiased=False)  # spread 1
    spreads = torch.tensor([0.0, 1.0, 2.0, 4.0]).repeat_interleave(P // 4)
    first = spreads[:, None] * base + 5
    unsure = torch.arange(P) // (P // 4) == 1
    first[unsure] -= 3.5
    second = first.clone()
    second[unsure] = -first[unsure]  # the order turned round
    found = regime.measures(first, second)
    assert found["flat"] == pytest.approx(0.25)
    assert found["spread"] == pytest.approx(7 / 4)
    assert found["tightness"] == pytest.approx(0.0, abs=1e-6)
    assert found["agreement, widest quarter"] == pytest.approx(1.0)
    assert found["agreement"] == pytest.approx((0 - 1 + 1 + 1) / 4)
    assert found["unsure"] == pytest.approx(-3.5 / (7 / 4), rel=1e-5)
    assert regime.measures(first).keys() == {"flat", "spread", "tightness"}


def test_gains_are_counted_in_spreads():
    base = normal(P, S), 10 * normal(P, S)
    widths = [regime.spread(scores).mean() for scores in base]
    run = base[0] + 2 * widths[0], base[1] + 0.5 * widths[1]
    assert regime.kept(base, run) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("measure", [name for name in regime.DIAL_OF if name != "kept"])
@pytest.mark.parametrize("samples", [4, 8])
def test_positions_are_those_of_other_worlds(measure, samples):
    """A measure is monotone over its dial, and scores of independent worlds find their position."""
    dial = dials.DIALS[regime.DIAL_OF[measure]]
    reference = regime.references(measure, samples)
    steps = np.diff([reference[value] for value in dial.values])
    assert (steps > 0).all() or (steps < 0).all()
    for number, value in enumerate(dial.values):
        groups = (one[dial.world.trained] for one in regime.base_groups(dial, value, samples, 9))
        place = regime.position(regime.measures(*groups)[measure], reference)
        nearest = min(dial.values, key=lambda other: abs(other - place))
        assert abs(dial.values.index(nearest) - number) <= 1
    ends = sorted(reference.values())
    assert {regime.position(n, reference) for n in (ends[0] - 9, ends[-1] + 9)} == {
        dial.values[0], dial.values[-1]
    }  # fmt: skip


@pytest.fixture
def evaluated(tmp_path):
    """Writes an evaluation of planted scores {model: {reward: [P, S]}}; returns its folder."""

    def write(models, prompts=P, samples=S):
        captions = tmp_path / "captions.txt"
        captions.write_text("".join(f"caption {n}\n" for n in range(prompts)), encoding="utf-8")
        settings = {"prompts": str(captions), "samples": samples, "layout": ""}
        folder = Folder(str(tmp_path / "out"), settings, {name: {"a": 1} for name in models})
        folder.begin()
        for name, rewards in models.items():
            flat = {reward: scores.T.flatten().split(50) for reward, scores in rewards.items()}
            for part, values in enumerate(zip(*flat.values())):
                folder.add(name, part, dict(zip(flat, values)))
        return folder.path

    return write


def judged(value, bank=9):
    """Rewards of base samples at a value of bpgo-unsure, by two judges."""
    two = regime.base_groups(dials.DIALS["bpgo-unsure"], value, S, bank)
    return {name: one["judge"] for name, one in zip(("first", "second"), two)}


def args_of(folder, **more):
    return regime.Args(folder, **more)


def test_the_report_of_an_evaluation(evaluated):
    scores = judged(0.2)
    number = len(scores["first"])
    scores["first"][3, 2] = torch.nan  # this prompt is left out
    run = {name: one + 0.1 for name, one in scores.items()}
    folder = evaluated({"base": scores, "mine": run}, prompts=number)
    text = regime.report(args_of(folder))
    assert f"first, second judge second: {number - 1} prompts of 8 samples" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    known = scores["first"].isnan().logical_not().all(1)
    found = regime.measures(*(one[known] for one in scores.values()))
    assert float(rows["unsure"][1]) == pytest.approx(found["unsure"], abs=1e-3)
    assert rows["unsure"][2] == "bpgo-unsure" and 0.15 < float(rows["unsure"][3]) < 0.25
    assert float(rows["kept"][1]) == pytest.approx(1, abs=0.02)
    least = text.split("agree least on: ")[1].split("; ")
    tau = regime.agreement(*(one[known] for one in scores.values()))
    first = torch.arange(number)[known][tau.argsort()[0]].item()
    assert least[0] == f"caption {first}"


def test_one_reward_has_the_measures_of_one_judge(evaluated):
    scores = judged(0.2)
    text = regime.report(args_of(evaluated({"base": {"first": scores["first"]}}, 1024)))
    rows = [line.split("  ")[0] for line in text.splitlines()]
    assert "second judge none" in text and "flat" in rows and "agreement" not in rows


def test_wrong_evaluations_are_refused(evaluated, tmp_path):
    few = {"base": {"first": normal(8, S)}}
    with pytest.raises(InputError, match="8 prompts of 8 samples are too few"):
        regime.report(args_of(evaluated(few, 8)))
    with pytest.raises(InputError, match="--reward x: the evaluation has first"):
        regime.report(args_of(evaluated(few, 8), reward="x"))
    with pytest.raises(InputError, match="name the folder of an evaluation"):
        regime.report(args_of(tmp_path / "nothing"))


def test_what_the_second_judge_keeps_falls_over_the_dial():
    """Its references come from the committed results; 1 without a preference."""
    kept = regime.references("kept", S)
    values = sorted(kept)
    assert len(values) >= 3 and values[0] == 0
    assert kept[0] == pytest.approx(1, abs=0.1)
    assert (np.diff([kept[value] for value in values]) < 0).all()


def test_advice_names_the_methods_of_the_nearest_value():
    said = regime.advice("kept", 0.09)
    assert said.startswith("at 0.1: ") and "gamma 2 +0." in said and "again" not in said
