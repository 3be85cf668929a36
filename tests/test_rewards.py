"""The reward table: names and weights, each sample with its own prompt, every score a number; JPEG
size against PIL."""

import io
import re

import pytest
import torch
from PIL import Image

from common import rewards
from common.errors import InputError, RunError
from common.rewards.jpeg import JpegSize
from worlds.shapes import render, sample_captions, sample_scenes

# --- Names and weights ---


@pytest.mark.parametrize(
    "specs, weights",
    [
        (["verifier"], {"verifier": 1.0}),
        (("verifier=0.7",), {"verifier": 0.7}),
        (["jpeg=-1"], {"jpeg": -1.0}),
        (["verifier=2", "jpeg"], {"verifier": 2.0, "jpeg": 1.0}),
        (["hpsv2.1=1e-3", "clip=0"], {"hpsv2.1": 1e-3, "clip": 0.0}),
    ],
)
def test_parse(specs, weights):
    assert rewards.parse(specs) == weights
    assert list(rewards.parse(specs)) == list(weights)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e999", "much", "0,5", "0.5=0.6"])
def test_bad_weight_is_refused(weight):
    with pytest.raises(InputError) as error:
        rewards.parse(["verifier", f"jpeg={weight}"])
    assert f"'jpeg={weight}'" in str(error.value) and "\n" not in str(error.value)


def test_no_reward_is_refused():
    with pytest.raises(
        InputError, match="at least one of verifier, verifier:quality, .*, motion, .*jpeg"
    ):
        rewards.parse([])


@pytest.mark.parametrize(
    "typo, near", [("verifer", "verifier"), ("Verifier", "verifier"), ("jpg", "jpeg")]
)
def test_unknown_reward_names_the_nearest(typo, near):
    with pytest.raises(InputError) as error:
        rewards.load([typo], ["a circle"])
    assert re.search(
        f"there is no '{typo}'; did you mean {near}( or [a-z:]+)?\\?", str(error.value)
    )


def test_hopeless_name_lists_all():
    with pytest.raises(InputError) as error:
        rewards.load(["zzz"], [])
    assert all(name in str(error.value) for name in rewards.REWARDS)


def test_load_returns_every_scorer():
    scorers = rewards.load(["jpeg", "verifier"], ["a red circle"])
    assert list(scorers) == ["jpeg", "verifier"]
    for scorer in scorers.values():
        assert scorer.scale > 0 and len(scorer.range) == 2


def test_prompt_that_a_reward_cannot_score_is_refused():
    prompts = ["a red circle", "an astronaut on a horse"]
    with pytest.raises(InputError) as error:
        rewards.load({"verifier": 1.0}, prompts)
    message = str(error.value)
    assert (
        "reward verifier" in message
        and "'an astronaut on a horse'" in message
        and "\n" not in message
    )
    assert "red circle'" not in message  # that one is fine
    assert list(rewards.load(["jpeg"], prompts)) == ["jpeg"]


# --- Scoring ---


@pytest.fixture(scope="module")
def pairs():
    """24 different captions and an image of each."""
    captions = list(dict.fromkeys(sample_captions(60, seed=0)))[:24]
    return render(sample_scenes(captions, seed=1)), captions


@pytest.fixture(scope="module")
def scorers():
    return rewards.load(["verifier", "jpeg"], [])


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_each_sample_is_scored_with_its_own_prompt(pairs, scorers, shift):
    images, captions = pairs
    captions = captions[shift:] + captions[:shift]
    together = rewards.score(scorers, images, captions)
    for name in scorers:
        alone = [
            rewards.score(scorers, images[i : i + 1], captions[i : i + 1])[name] for i in range(24)
        ]
        assert together[name].shape == (24,) and together[name].dtype == torch.float32
        torch.testing.assert_close(together[name], torch.cat(alone), atol=1e-6, rtol=0)
    if shift:
        assert together["verifier"].mean() < 0.6  # another one's prompt
    else:
        assert together["verifier"].min() > 0.98


def test_one_prompt_does_not_judge_the_others(pairs, scorers):
    images, captions = pairs
    right = rewards.score(scorers, images, captions)["verifier"]
    for row in range(24):
        blamed = captions[:row] + ["four black crosses"] + captions[row + 1 :]
        score = rewards.score(scorers, images, blamed)["verifier"]
        others = torch.arange(24) != row
        torch.testing.assert_close(score[others], right[others], atol=1e-6, rtol=0)
        assert score[row] < 0.8


@pytest.mark.parametrize("size", [1, 5, 7, 23])
def test_scores_do_not_depend_on_the_split_into_batches(pairs, scorers, size):
    images, captions = pairs
    captions = captions[12:] + captions[:12]
    together = rewards.score(scorers, images, captions)
    parts = [
        rewards.score(scorers, images[i : i + size], captions[i : i + size])
        for i in range(0, 24, size)
    ]
    for name in scorers:
        torch.testing.assert_close(
            torch.cat([p[name] for p in parts]), together[name], atol=1e-6, rtol=0
        )


def test_permuted_pairs_give_permuted_scores(pairs, scorers):
    images, captions = pairs
    images = torch.cat([images[:12], images[12:].flip(0)])  # half of the pairs are wrong
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    before, after = (
        rewards.score(scorers, images, captions),
        rewards.score(scorers, images[order], [captions[i] for i in order]),
    )
    for name in scorers:
        torch.testing.assert_close(after[name], before[name][order], atol=1e-6, rtol=0)


def test_a_score_per_pair_is_required():
    class Square:  # images against all prompts, the peers' bug
        def score(self, media, prompts):
            return torch.zeros(len(media), len(prompts))

    with pytest.raises(
        RunError, match=r"reward square raised ValueError: it returned \(2, 2\) for 2 samples"
    ):
        check({"square": Square()}, torch.zeros(2, 3, 8, 8), ["a", "b"])


def check(scorers, media, prompts):
    scores = rewards.score(scorers, media, prompts)
    rewards.check_finite({name: value[:, None] for name, value in scores.items()}, scorers, prompts)


def test_a_reward_that_raises_is_named_with_the_place_once_all_processes_have_met():
    class Broken:
        def score(self, media, prompts):
            raise KeyError("no such thing")

    scorers = {"broken": Broken(), "fine": JpegSize()}
    scores = rewards.score(
        scorers, torch.zeros(2, 3, 8, 8), ["a", "b"]
    )  # no error yet: other processes wait
    assert scores["fine"].isfinite().all() and scores["broken"].isinf().all()
    with pytest.raises(
        RunError,
        match=r"reward broken raised KeyError: 'no such thing' .*test_rewards.py, line \d+",
    ):
        check(scorers, torch.zeros(2, 3, 8, 8), ["a", "b"])


# --- Every score is a number ---


@pytest.mark.parametrize("bad, text", [("nan", "nan"), ("inf", "inf"), ("-inf", "-inf")])
def test_a_score_that_is_no_number_stops_the_run(bad, text):
    scores = {"fine": torch.zeros(3, 4), "verifier": torch.zeros(3, 4)}
    scores["verifier"][1, 2] = scores["verifier"][2, 0] = float(bad)
    with pytest.raises(RunError) as error:
        rewards.check_finite(scores, dict.fromkeys(scores), ["a circle", "a square", "a cross"])
    message = str(error.value)
    assert (
        f"reward verifier is {text} for the prompt 'a square' (2 of 12 samples" in message
        and "\n" not in message
    )


def test_finite_scores_pass():
    assert (
        rewards.check_finite({"a": torch.tensor([[-1e30, 0.0, 1e30]])}, {"a": None}, ["p"]) is None
    )


def test_an_image_of_nan_never_gets_a_number(pairs):
    images, captions = pairs[0][:4].clone(), pairs[1][:4]
    images[2, 1, 5, 5] = float("nan")
    scorers = rewards.load(["verifier"], captions)
    score = rewards.score(scorers, images, captions)["verifier"]
    assert not score.isfinite().any()
    with pytest.raises(RunError, match="the samples are no numbers: the weights have diverged"):
        rewards.check_finite({"verifier": score.view(2, 2)}, scorers, ["first", "second"])


def test_weighted_sum():
    scores = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[10.0, -4.0]])}
    assert rewards.weighted_sum(scores, {"a": 2.0, "b": -0.5}).tolist() == [[-3.0, 6.0]]
    assert rewards.weighted_sum(scores, {"b": 1.0}).tolist() == [[10.0, -4.0]]


# --- JPEG size ---


def pil_bytes(pixels):
    """Bytes of [3, H, W] uint8 as a JPEG of quality 95."""
    file = io.BytesIO()
    Image.fromarray(pixels.movedim(0, -1).contiguous().numpy()).save(
        file, format="JPEG", quality=95
    )
    return len(file.getvalue())


@pytest.fixture(scope="module")
def pixels():
    """uint8 [8, 3, 24, 40]: from flat over coarse to fine noise."""
    generator = torch.Generator().manual_seed(0)
    amplitude = torch.linspace(0, 1, 8)[:, None, None, None]
    noise = torch.randint(0, 256, (8, 3, 24, 40), generator=generator)
    return (128 + amplitude * (noise - 128)).round().clamp(0, 255).to(torch.uint8)


def test_jpeg_equals_pil(pixels):
    score = JpegSize().score(pixels.float() / 255, [""] * 8)
    expected = [-pil_bytes(image) / (24 * 40) for image in pixels]
    assert score.dtype == torch.float32 and score.shape == (8,)
    assert score.tolist() == pytest.approx(expected, abs=1e-6)
    assert (score[1:] < score[:-1]).all()  # more noise, more bytes
    assert score[0] > score[-1] + 1 and score.max() < 0


def test_jpeg_of_every_grey_level_equals_pil():
    grey = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 3, 8, 8)
    score = JpegSize().score(grey.float() / 255, [""] * 256)
    assert score.tolist() == pytest.approx([-pil_bytes(image) / 64 for image in grey], abs=1e-6)


def test_jpeg_of_a_video_is_the_mean_over_its_frames(pixels):
    video = pixels.view(2, 4, 3, 24, 40).float() / 255
    frames = JpegSize().score(pixels.float() / 255, [""] * 8)
    score = rewards.score({"jpeg": JpegSize()}, video, ["", ""])["jpeg"]
    assert score.shape == (2,)
    torch.testing.assert_close(score, frames.view(2, 4).mean(1), atol=1e-6, rtol=0)


def test_a_negative_weight_rewards_incompressibility(pixels):
    weights = rewards.parse(["jpeg=-1"])
    scores = rewards.score(rewards.load(weights, []), pixels.float() / 255, [""] * 8)
    total = rewards.weighted_sum(scores, weights)
    assert torch.equal(total, -scores["jpeg"])
    assert total.argmax() == 7 and scores["jpeg"].argmax() == 0


def test_jpeg_takes_values_out_of_range(pixels):
    wild = pixels.float() / 255 * 3 - 1
    assert torch.equal(
        JpegSize().score(wild, [""] * 8), JpegSize().score(wild.clamp(0, 1), [""] * 8)
    )
