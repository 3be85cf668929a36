"""Rewards: a table of names, `name=weight` parsing, and scoring with every score checked.

A reward is a class with
    score(media, prompts) -> [b] float32    media [b, C, H, W] (video [b, F, C, H, W]) in [0, 1], one prompt a row
    video                                   whether it scores clips; if not, a clip's score is the mean of its frames'
    scale                                   typical standard deviation within a group
    range                                   (lowest, highest); None where there is no bound
    check(prompts)                          optional: raises ValueError for a prompt that it cannot score
"""

import difflib
import importlib
import math

import torch

from common.errors import InputError, RunError
from common.prompts import caption_of

REWARDS = {
    "verifier": ("common.rewards.verifier", "Verifier"),
    "verifier:quality": ("common.rewards.verifier", "Quality"),
    "verifier:layout": ("common.rewards.verifier", "Layout"),
    "motion": ("common.rewards.motion", "Motion"),
    "motion:quality": ("common.rewards.motion", "MotionQuality"),
    "motion:smooth": ("common.rewards.motion", "MotionSmooth"),
    "jpeg": ("common.rewards.jpeg", "JpegSize"),
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


def load(names, prompts):
    """The scorers by name, each having looked at the prompts that it will be asked about: {name: scorer}."""
    scorers = {}
    for name in names:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=2, cutoff=0.4) or REWARDS
            raise InputError(
                f"reward: there is no {name!r}; did you mean {' or '.join(near)}? All: {', '.join(REWARDS)}"
            )
        module, attribute = REWARDS[name]
        scorers[name] = getattr(importlib.import_module(module), attribute)()
        try:
            getattr(scorers[name], "check", lambda _: None)([caption_of(prompt) for prompt in prompts])
        except ValueError as error:
            raise InputError(f"reward {name}: {error}") from None
    return scorers


def score(scorers, media, prompts):
    """Every scorer on every sample: media [b, ...], b prompts -> {name: [b] float32}"""
    scores, captions = {}, [caption_of(prompt) for prompt in prompts]
    for name, scorer in scorers.items():
        if media.ndim == 5 and not scorer.video:  # the mean of the frames' scores
            b, f = media.shape[:2]
            frames = scorer.score(media.flatten(0, 1), [caption for caption in captions for _ in range(f)])
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


def on_unit_interval(scores, scorers):
    """{name: [...]} -> {name: [...]} on [0, 1], by the ranges that the scorers declare."""
    bounds = {name: scorers[name].range for name in scores}
    return {name: (scores[name] - low) / (high - low) for name, (low, high) in bounds.items()}


def scale(scorers, weights):
    """Typical spread within a group of the weighted sum: of terms that rise and fall together, an upper limit."""
    return sum(abs(weight) * scorers[name].scale for name, weight in weights.items())


def weighted_sum(scores, weights):
    """{name: [...]} and {name: weight} -> [...]"""
    return sum(weights[name] * scores[name] for name in weights)
