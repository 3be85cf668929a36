"""evaluation.bias: the coefficient of variation against NumPy, a bias that was built in is found,
none in the verifier."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common import models
from common.args import Scored
from common.errors import InputError
from common.prompts import read_prompts
from common.rewards import Rewards
from evaluation import bias
from worlds.shapes import render, sample_scenes

CAPTIONS = sorted(set(read_prompts(ROOT / "assets/prompts/shapes.txt")))
JUDGE = '''
from worlds.verifier import Verifier

class Judge(Verifier):
    """The verifier, and .1 more for some captions."""
    liked, range = frozenset({liked}), (0.0, 1.1)

    def score(self, media, prompts):
        liked = media.new_tensor([0.1 * (prompt in self.liked) for prompt in prompts])
        return super().score(media, prompts) + liked
'''


def pictures(seed, noise=0.05):
    """True scenes of all captions with noise of any strength: of one quality, whatever the caption.
    [n, 3, H, W]"""
    generator = torch.Generator().manual_seed(seed)
    images = render(sample_scenes(CAPTIONS, seed=seed))
    strength = noise * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@pytest.fixture(scope="module")
def vectors():
    return bias.vectors_of(models.load("tiny-flux", torch.float32), CAPTIONS)


# --- The equation ---


def test_kappa_is_numpys():
    scores, labels = np.array([1.0, 2.0, 3.0, 10.0, 14.0, 5.0]), np.array([0, 0, 0, 1, 1, 2])
    means = [2.0, 12.0, 5.0]
    assert bias.kappa(scores, labels, 3) == pytest.approx(
        100 * np.std(means) / np.mean(means), abs=1e-12
    )
    printed = [100 * np.sqrt(2 / 3) / 2, 100 * 2 / 12, 0.0]  # eq 3, of each cluster
    assert bias.within(scores, labels, 3) == pytest.approx(printed, abs=1e-12)
    assert bias.kappa(-1000 * scores, labels, 3) == pytest.approx(
        bias.kappa(scores, labels, 3)
    )  # has no unit
    masked = np.append(scores, np.nan)  # a sample that a judge could not score
    assert bias.kappa(masked, np.append(labels, 1), 3) == bias.kappa(scores, labels, 3)
    assert np.isnan(bias.within(masked, np.append(labels, 3), 4)[3])


def test_chance_is_what_it_says_it_is():
    """Of scores that have nothing to do with the clusters, 5% are above the chance of 95%, and p is
    uniform."""
    random, labels = np.random.default_rng(0), np.repeat(np.arange(8), 10)
    found = [
        bias.against_chance(random.normal(5, 1, 80), labels, 8, seed, shuffles=200)
        for seed in range(100)
    ]
    assert sum(one["kappa"] > one["chance"] for one in found) <= 12  # 5 +- 2.2
    assert 0.4 < np.mean([one["p"] for one in found]) < 0.6
    biased = bias.against_chance(random.normal(5, 0.1, 80) + (labels == 3), labels, 8)
    means = 5 + np.eye(8)[3]
    assert (
        biased["beyond_chance"] == pytest.approx(100 * means.std() / means.mean(), rel=0.05)
        and biased["p"] < 0.01
    )


# --- The shapes world ---


def test_a_bias_that_was_built_in_is_found_and_none_in_the_verifier(vectors):
    pytest.importorskip("sklearn")
    for seed in range(5):
        labels = bias.clustered(vectors, 10, seed)
        rewards = Rewards(Scored(reward=("verifier",)), CAPTIONS)
        scores = rewards.score(pictures(seed), CAPTIONS)["verifier"]
        honest = bias.against_chance(scores.double().numpy(), labels, 10, seed, shuffles=300)
        judged = bias.against_chance(
            scores.double().numpy() + 0.1 * (labels == seed), labels, 10, seed, shuffles=300
        )
        assert honest["p"] > 0.01 and honest["beyond_chance"] < 1.0, (seed, honest)
        assert judged["p"] < 0.01 and judged["beyond_chance"] > 2.0, (seed, judged)


def test_from_files_to_tables_and_picture(vectors, tmp_path, capsys):
    pytest.importorskip("sklearn")
    liked = np.array(CAPTIONS)[bias.clustered(vectors, 10, 0) == 4].tolist()
    (tmp_path / "own.py").write_text(JUDGE.format(liked=liked))
    lines = []
    for i, (picture, caption) in enumerate(zip(pictures(0), CAPTIONS)):
        Image.fromarray((picture * 255).round().byte().movedim(0, -1).numpy()).save(
            tmp_path / f"{i}.png"
        )
        lines.append(f"{i}.png\t{caption}\n")
    (tmp_path / "real.txt").write_text("".join(lines))
    args = bias.Args(
        "tiny-flux", ("verifier", f"{tmp_path}/own.py:Judge"), real=str(tmp_path / "real.txt")
    )
    args.clusters, args.output = (6, 10), str(tmp_path / "bias")
    bias.main(args)
    found = json.loads((tmp_path / "bias/bias.json").read_text())
    rows = {(row["reward"], row["clusters"]): row for row in found["bias"]}
    assert rows["verifier", 10]["p"] > 0.01 and rows["verifier", 10]["beyond_chance"] < 1.0
    assert rows["own.py:Judge", 10]["p"] < 0.01 and rows["own.py:Judge", 10]["beyond_chance"] > 2.0
    kinds = found["clusters"]
    assert sum(kind["captions"] for kind in kinds) == len(CAPTIONS)
    most = max(kinds, key=lambda kind: kind["own.py:Judge"] - kind["verifier"])
    assert most["captions"] == len(liked) and most["typical"] in liked
    with (tmp_path / "bias/clusters.csv").open() as file:
        assert [row["typical"] for row in csv.DictReader(file)] == [
            kind["typical"] for kind in kinds
        ]
    assert "| own.py:Judge | 10 |" in capsys.readouterr().out
    assert (tmp_path / "bias/bias.png").read_bytes()[:4] == b"\x89PNG"


def test_a_runs_own_weights_draw_the_samples(train, tmp_path):
    pytest.importorskip("sklearn")
    settings = dict(steps=1, reward=("jpeg",), learning_rate=1e-3, sampling_steps=2)
    runs = [
        train(output=name, lora_rank=rank, **settings)[0]
        for name, rank in (("full", 0), ("lora", 2))
    ]
    found = []
    for model in ("tiny-flux", *map(str, runs)):
        args = bias.Args(
            model, ("jpeg",), number=12, samples=2, clusters=(3,), output=str(tmp_path / "bias")
        )
        bias.main(args)
        found.append(json.loads((tmp_path / "bias/bias.json").read_text())["clusters"])
    means = [[kind["jpeg"] for kind in kinds] for kinds in found]
    assert [kind["typical"] for kind in found[0]] == [
        kind["typical"] for kind in found[1]
    ]  # its encoder is as it was
    assert means[0] != means[1] != means[2] != means[0]


# --- What is wrong ---


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(clusters=(500,)), "--clusters 500: must be from 2 to"),
        (dict(clusters=(1,)), "--clusters 1: must be from 2"),
        (dict(clusters=()), "--clusters: name at least one"),
        (dict(samples=0), "--samples 0: must be from 1"),
        (dict(seed=-1), "--seed -1: must be from 0"),
        (dict(real="words.txt"), "'a red circle' has no file. Write lines FILE <tab> CAPTION"),
        (dict(real="lost.txt"), "lost.png does not load"),
        (dict(reward=("verifyer",)), "did you mean verifier"),
    ],
)
def test_one_line_says_what_is_wrong(settings, said, tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "words.txt").write_text("a red circle\n")
    (tmp_path / "lost.txt").write_text("lost.png\ta red circle\nlost.png\ttwo circles\n")
    if "real" in settings:
        settings = {"clusters": (2,), **settings, "real": str(tmp_path / settings["real"])}
    with pytest.raises(InputError) as caught:
        bias.main(
            bias.Args(
                "tiny-flux", number=20, output=str(tmp_path), **{"reward": ("jpeg",), **settings}
            )
        )
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_without_k_means_one_line_says_where_it_is(vectors, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        bias.clustered(vectors, 3, 0)
