"""Rewards: a table of names, `name=weight` parsing, and scoring with every score checked.

A reward is a class with
    score(media, prompts) -> [b] float32    media [b, C, H, W] (video [b, F, C, H, W]) in [0, 1], one prompt a row
    video                                   whether it scores clips; if not, a clip's score is the mean of some frames'
    image                                   optional: False if it scores nothing but clips
    scale                                   typical standard deviation within a group
    range                                   (lowest, highest); None where there is no bound
    check(prompts)                          optional: raises ValueError for a prompt that it cannot score
    load(source, batch)                     optional: fetches its weights (weights.Source); InputError if there are none
What each is good for, and its licence: README.md beside this file.
"""

import difflib
import importlib
import math
from pathlib import Path

import torch

from common.errors import InputError, RunError
from common.prompts import caption_of
from common.rewards.weights import Source

REWARDS = {
    "verifier": ("common.rewards.verifier", "Verifier"),
    "verifier:quality": ("common.rewards.verifier", "Quality"),
    "verifier:layout": ("common.rewards.verifier", "Layout"),
    "motion": ("common.rewards.motion", "Motion"),
    "motion:quality": ("common.rewards.motion", "MotionQuality"),
    "motion:smooth": ("common.rewards.motion", "MotionSmooth"),
    "jpeg": ("common.rewards.jpeg", "JpegSize"),
    "hpsv2": ("common.rewards.clip", "HPSv2"),
    "hpsv2.1": ("common.rewards.clip", "HPSv21"),
    "clip": ("common.rewards.clip", "Clip"),
    "clip-h": ("common.rewards.clip", "ClipH"),
    "pickscore": ("common.rewards.pickscore", "PickScore"),
    "aesthetic": ("common.rewards.aesthetic", "Aesthetic"),
    "imagereward": ("common.rewards.imagereward", "ImageReward"),
    "videoclip-xl": ("common.rewards.videoclip_xl", "VideoClipXL"),
}


def parse(specs):
    """["hpsv2.1=0.7", "clip"] -> {"hpsv2.1": 0.7, "clip": 1.0}; raises InputError."""
    weights = {}
    for spec in specs:
        name, equals, weight = spec.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            raise InputError(
                f"reward: {spec!r} has no number after '='; write NAME or NAME=WEIGHT, as in jpeg=0.5"
            ) from None
        if not math.isfinite(value):
            raise InputError(f"reward: the weight in {spec!r} is not finite")
        if name in weights:
            raise InputError(f"reward: {name!r} is there twice; give it once, with one weight")
        weights[name] = value
    if not weights:
        raise InputError(f"reward: name at least one of {', '.join(REWARDS)}")
    return weights


def load(names, prompts, reward_path=(), reward_batch=16, reward_frames="all", clips=None):
    """The scorers by name, with their weights, each having looked at the prompts that it will be asked about.

    reward_path: "NAME=FILE" of weights that do not come from the hub. reward_batch: media that a model looks at at
    once. reward_frames: see `chosen_frames`. clips: whether the model to train makes clips; None: unknown.
    Returns {name: scorer}; raises InputError for what is wrong with any of this.
    """
    names, scorers, paths = list(dict.fromkeys(names)), {}, parse_paths(reward_path)
    for name in names:
        check_name(name)
        module, attribute = REWARDS[name]
        scorers[name] = scorer = getattr(importlib.import_module(module), attribute)()
        if clips is False and not getattr(scorer, "image", True):
            raise InputError(f"reward {name} scores clips, and this --model makes images; take another of the two")
        try:
            getattr(scorer, "check", lambda _: None)([caption_of(prompt) for prompt in prompts])
        except ValueError as error:
            raise InputError(f"reward {name}: {error}") from None
    for name, scorer in scorers.items():  # gigabytes, so after everything that can be wrong without them
        scorer.frames = reward_frames
        if hasattr(scorer, "load"):
            scorer.load(Source(name, paths), reward_batch)
    return scorers


def check_name(name):
    """Raises InputError for a reward that is not in the table, with the nearest that are."""
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=2, cutoff=0.4) or REWARDS
        raise InputError(f"reward: there is no {name!r}; did you mean {' or '.join(near)}? All: {', '.join(REWARDS)}")


def parse_paths(specs):
    """["clip=assets/tiny-clip"] -> {"clip": "assets/tiny-clip"}; raises InputError, also for what does not exist."""
    paths = {}
    for spec in specs:
        name, _, path = spec.partition("=")
        if not path:
            raise InputError(f"--reward-path {spec}: write NAME=FILE, as in hpsv2.1=weights/HPS_v2.1_compressed.pt")
        check_name(name)
        if not Path(path).exists():
            raise InputError(f"--reward-path {spec}: there is no {path}")
        paths[name] = path
    return paths


def chosen_frames(which, number):
    """Indices of the frames of a clip of `number` that an image reward scores: the "first", the "middle" one, "all", or
    n evenly spaced ones, the first and the last among them."""
    if which == "all":
        return list(range(number))
    if which in ("first", "middle") or which == 1:
        return [0 if which == "first" else number // 2]
    return torch.linspace(0, number - 1, min(which, number)).round().long().tolist()


def score(scorers, media, prompts):
    """Every scorer on every sample: media [b, ...], b prompts -> {name: [b] float32}"""
    scores, captions = {}, [caption_of(prompt) for prompt in prompts]
    for name, scorer in scorers.items():
        if media.ndim == 5 and not scorer.video:  # the mean of the chosen frames' scores
            chosen = media[:, chosen_frames(getattr(scorer, "frames", "all"), media.shape[1])]
            b, f = chosen.shape[:2]
            frames = scorer.score(chosen.flatten(0, 1), [caption for caption in captions for _ in range(f)])
            scores[name] = frames.float().view(b, f).mean(1)
        else:
            scores[name] = scorer.score(media, captions).float()
        assert scores[name].shape == (len(prompts),), (
            f"reward {name} returned {tuple(scores[name].shape)} for {len(prompts)} samples"
        )
    return scores


def check_finite(scores, prompts):
    """{name: [P, G]} of P prompts; raises RunError for a NaN or infinite score: it never becomes a number."""
    for name, values in scores.items():
        wrong = (~torch.isfinite(values)).nonzero().tolist()
        if wrong:
            row, sample = wrong[0]
            raise RunError(
                f"reward {name} is {values[row, sample].item()} for the prompt {prompts[row]!r} "
                f"({len(wrong)} of {values.numel()} samples of the step)"
            )


def require_range(scorers):
    """Raises InputError for the first scorer without two bounds."""
    for name, scorer in scorers.items():
        if None in scorer.range:
            raise InputError(f"reward {name}: its scores have no bounds, so they cannot be put on [0, 1]")


def on_unit_interval(scores, scorers, names):
    """{name: [...]} -> {name: [...]} of `names` on [0, 1], by the ranges that the scorers declare."""
    bounds = {name: scorers[name].range for name in names}
    return {name: (scores[name] - low) / (high - low) for name, (low, high) in bounds.items()}


def scale(scorers, weights):
    """Typical spread within a group of the weighted sum: of terms that rise and fall together, an upper limit."""
    return sum(abs(weight) * scorers[name].scale for name, weight in weights.items())


def weighted_sum(scores, weights):
    """{name: [...]} and {name: weight} -> [...]"""
    return sum(weights[name] * scores[name] for name in weights)
