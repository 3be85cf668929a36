"""The reward table: names and weights, each sample with its own prompt, every score a number; JPEG
size against PIL."""

import io
import re

import pytest
import torch
from learned import made, score_all
from PIL import Image

from common import rewards
from common.errors import Diverged, InputError, RunError
from common.rewards import table
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
    assert f"--reward jpeg={weight}: " in str(error.value) and "\n" not in str(error.value)


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
        table.load([typo], ["a circle"])
    assert re.search(
        f"there is no '{typo}'; did you mean {near}( or [a-z:]+)?\\?", str(error.value)
    )


def test_hopeless_name_lists_all():
    with pytest.raises(InputError) as error:
        table.load(["zzz"], [])
    assert all(name in str(error.value) for name in rewards.REWARDS)


def test_load_returns_every_scorer():
    scorers = table.load(["jpeg", "verifier"], ["a red circle"])
    assert list(scorers) == ["jpeg", "verifier"]
    for scorer in scorers.values():
        assert scorer.scale > 0 and len(scorer.range) == 2


def test_prompt_that_a_reward_cannot_score_is_refused():
    prompts = ["a red circle", "an astronaut on a horse"]
    with pytest.raises(InputError) as error:
        table.load({"verifier": 1.0}, prompts)
    message = str(error.value)
    assert (
        "reward verifier" in message
        and "'an astronaut on a horse'" in message
        and "\n" not in message
    )
    assert "red circle'" not in message  # that one is fine
    assert list(table.load(["jpeg"], prompts)) == ["jpeg"]


# --- Scoring ---


@pytest.fixture(scope="module")
def pairs():
    """24 different captions and an image of each."""
    captions = list(dict.fromkeys(sample_captions(60, seed=0)))[:24]
    return render(sample_scenes(captions, seed=1)), captions


@pytest.fixture(scope="module")
def scorers():
    return table.load(["verifier", "jpeg"], [])


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_each_sample_is_scored_with_its_own_prompt(pairs, scorers, shift):
    images, captions = pairs
    captions = captions[shift:] + captions[:shift]
    together = score_all(scorers, images, captions)
    for name in scorers:
        alone = [
            score_all(scorers, images[i : i + 1], captions[i : i + 1])[name] for i in range(24)
        ]
        assert together[name].shape == (24,) and together[name].dtype == torch.float32
        torch.testing.assert_close(together[name], torch.cat(alone), atol=1e-6, rtol=0)
    if shift:
        assert together["verifier"].mean() < 0.6  # another one's prompt
    else:
        assert together["verifier"].min() > 0.98


def test_one_prompt_does_not_judge_the_others(pairs, scorers):
    images, captions = pairs
    right = score_all(scorers, images, captions)["verifier"]
    for row in range(24):
        blamed = captions[:row] + ["four black crosses"] + captions[row + 1 :]
        score = score_all(scorers, images, blamed)["verifier"]
        others = torch.arange(24) != row
        torch.testing.assert_close(score[others], right[others], atol=1e-6, rtol=0)
        assert score[row] < 0.8


@pytest.mark.parametrize("size", [1, 5, 7, 23])
def test_scores_do_not_depend_on_the_split_into_batches(pairs, scorers, size):
    images, captions = pairs
    captions = captions[12:] + captions[:12]
    together = score_all(scorers, images, captions)
    parts = [
        score_all(scorers, images[i : i + size], captions[i : i + size]) for i in range(0, 24, size)
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
        score_all(scorers, images, captions),
        score_all(scorers, images[order], [captions[i] for i in order]),
    )
    for name in scorers:
        torch.testing.assert_close(after[name], before[name][order], atol=1e-6, rtol=0)


def test_a_score_per_pair_is_required():
    class Square:  # images against all prompts, the peers' bug
        video = False

        def score(self, media, prompts):
            return torch.zeros(len(media), len(prompts))

    with pytest.raises(
        RunError, match=r"reward square failed: ValueError: it returned \(2, 2\) for 2 samples"
    ):
        check({"square": Square()}, torch.zeros(2, 3, 8, 8), ["a", "b"])


def check(scorers, media, prompts):
    found = made("jpeg", scorers=scorers)
    scores = found.score(media, prompts)  # raises nothing: other processes wait for the scores
    found.check({name: value[:, None] for name, value in scores.items()}, prompts)


class Broken:
    """Raises what it was given."""

    video, scale, range = False, 0.1, (0.0, 1.0)

    def __init__(self, error):
        self.error = error

    def score(self, media, prompts):
        raise self.error


class Bright:
    """The mean of all levels."""

    video, scale, range = False, 0.1, (0.0, 1.0)

    def score(self, media, prompts):
        return media.flatten(1).mean(1)


@pytest.mark.parametrize(
    "error, said",
    [
        (KeyError("no such thing"), r"reward broken failed: KeyError: 'no such thing'.*line \d+"),
        (SystemExit(0), "reward broken failed: SystemExit"),
        (KeyboardInterrupt(), "reward broken failed: KeyboardInterrupt"),
        (MemoryError("no room"), "out of memory in reward broken .*lower --reward-batch"),
        (RunError("the server is gone"), "^the server is gone"),
    ],
)
def test_a_reward_that_raises_is_named_once_all_processes_have_met(monkeypatch, error, said):
    # as inside errors.run, where Ctrl-C is an exception of another class
    monkeypatch.setattr("signal.getsignal", lambda _: None)
    found = made("jpeg", scorers={"broken": Broken(error), "fine": JpegSize()})
    scores = found.score(torch.zeros(2, 3, 8, 8), ["a", "b"])
    assert scores["fine"].isfinite().all() and scores["broken"].isinf().all()
    with pytest.raises(RunError, match=said) as raised:
        found.check({name: value[:, None] for name, value in scores.items()}, ["a", "b"])
    assert type(raised.value) is RunError  # every process raises it
    assert not found.failures


def test_other_processes_hear_of_a_failure():
    scores = made("jpeg", scorers={"bright": Broken(OSError("x"))}).score(
        torch.zeros(1, 3, 8, 8), ["a"]
    )
    gathered = {"bright": torch.tensor([[0.5, scores["bright"].item()]])}
    with pytest.raises(RunError, match="or it failed in another process"):
        made("jpeg", scorers={"bright": Bright()}).check(gathered, ["a"])


def test_decoding_fails_like_a_scorer():
    def decode(x0):
        raise MemoryError("no room")

    for elsewhere in (False, True):
        scorer = Bright()
        scorer.elsewhere = elsewhere
        found = made("jpeg", scorers={"bright": scorer, "jpeg": JpegSize()})
        scoring = found.begin(decode, ["a"] * 5, 2)
        scoring.add(torch.zeros(6, 4))
        scores = {name: value[:, None] for name, value in scoring.result().items()}
        assert all(value.shape == (5, 1) for value in scores.values())
        with pytest.raises(RunError, match="reward bright failed: MemoryError: no room"):
            found.check(scores, ["a"] * 5)


# --- Every score is a number ---


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_score_that_is_not_finite_stops_the_run(bad):
    scores = {"fine": torch.zeros(3, 4), "verifier": torch.zeros(3, 4)}
    scores["verifier"][1, 2] = scores["verifier"][2, 0] = float(bad)
    with pytest.raises(RunError) as error:
        made("jpeg", scorers=dict.fromkeys(scores, Bright())).check(
            scores, ["a circle", "a square", "a cross"]
        )
    message = str(error.value)
    assert f"reward verifier is {bad} for the prompt 'a square' (2 of 12 samples" in message
    assert "\n" not in message


def test_finite_scores_pass():
    scores = {"a": torch.tensor([[-1e30, 0.0, 1e30]])}
    assert made("jpeg", scorers={"a": Bright()}).check(scores, ["p"]) is None


def test_an_image_of_nan_never_gets_a_number_and_every_process_hears_of_it(pairs):
    images, captions = pairs[0][:4].clone(), pairs[1][:4]
    images[2, 1, 5, 5] = float("nan")
    found = made("verifier", prompts=captions)
    scores = {n: value.view(2, 2) for n, value in found.score(images, captions).items()}
    assert not scores["verifier"].isfinite().any()
    for process in (found, made("verifier")):  # the second has finite samples of its own
        with pytest.raises(Diverged, match="the samples are not finite"):
            process.check(scores, ["first", "second"])


def test_an_infinite_score_of_a_reward_is_no_divergence():
    class Low(Bright):
        def score(self, media, prompts):
            return torch.full((len(media),), -torch.inf)

    with pytest.raises(RunError, match="reward low is inf") as error:
        check({"low": Low()}, torch.zeros(2, 3, 8, 8), ["a", "b"])
    assert not isinstance(error.value, Diverged)


# --- One object ---


def test_rewards_of_the_flags():
    found = made("verifier=2", "jpeg=3", watch=("verifier:quality",), reward_units="spread")
    assert list(found.scorers) == ["verifier", "jpeg", "verifier:quality"]
    assert found.weights == pytest.approx({"verifier": 2 / 0.25, "jpeg": 3 / 0.05})
    assert found.scale == pytest.approx(5)


def test_the_summary_has_the_means_first_and_then_the_shares():
    found = made("verifier", "jpeg=-0.5", watch=("verifier:quality",))
    scores = {name: torch.rand(2, 4) for name in found.scorers}
    assert list(found.summary(scores)) == [
        "verifier_mean", "jpeg_mean", "verifier:quality_mean", "share_verifier", "share_jpeg",
    ]  # fmt: skip
    ((reward, weight),) = found.terms(rewards.weighted_sum(scores, found.weights), scores)
    assert weight == 1.0 and torch.equal(reward, scores["verifier"] - 0.5 * scores["jpeg"])


def test_each_advantage_term_lacks_the_samples_that_the_sum_lacks():
    found = made("verifier", "jpeg=-0.5", aggregate="advantages")
    scores = {"verifier": torch.tensor([[0.1, 0.2]]), "jpeg": torch.tensor([[torch.nan, -1.0]])}
    terms = found.terms(rewards.weighted_sum(scores, found.weights), scores)
    assert [weight for _, weight in terms] == [1.0, -0.5]
    assert [part.isnan().tolist() for part, _ in terms] == [[[True, False]]] * 2


def test_an_explanation_names_the_prompts_without_advantages():
    found = made("verifier")
    scores = {"verifier": torch.tensor([[0.1, 0.2], [0.3, 0.3]])}
    advantages = torch.tensor([[0.0, 0.0], [torch.nan, 1.0]])
    said = found.explain(scores, advantages, ["a circle", "a square"])
    assert "1 prompts are not finite: 'a square' (verifier 0.3 to 0.3)" in said
    said = found.explain(scores, torch.zeros(2, 2), ["a circle", "a square"])
    assert "not the cause: 'a circle' (verifier 0.1 to 0.2); 'a square'" in said


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
    score = score_all({"jpeg": JpegSize()}, video, ["", ""])["jpeg"]
    assert score.shape == (2,)
    torch.testing.assert_close(score, frames.view(2, 4).mean(1), atol=1e-6, rtol=0)


def test_a_negative_weight_rewards_incompressibility(pixels):
    weights = rewards.parse(["jpeg=-1"])
    scores = score_all(table.load(weights, []), pixels.float() / 255, [""] * 8)
    total = rewards.weighted_sum(scores, weights)
    assert torch.equal(total, -scores["jpeg"])
    assert total.argmax() == 7 and scores["jpeg"].argmax() == 0


def test_jpeg_takes_values_out_of_range(pixels):
    wild = pixels.float() / 255 * 3 - 1
    assert torch.equal(
        JpegSize().score(wild, [""] * 8), JpegSize().score(wild.clamp(0, 1), [""] * 8)
    )
