"""Rewards: a table of names, `name=weight` parsing, loading. asking.py has them score, mixing.py
adds them up.

A reward is a class, in the table or in a file of one's own (`my/file.py:Class`, own.py), with
    score(media, prompts) -> [b] float32    media [b, C, H, W] (video [b, F, C, H, W]) in [0, 1], one prompt a row
    fields                                  optional: names of what the prompts' lines of JSONL must have besides; score
                                            gets each by its name, a list of b values: score(media,
                                            prompts, text)
    masks                                   optional: True if a score may be NaN, for a sample that it failed to judge,
                                            which then counts nowhere in its group
    video                                   whether it scores clips; if not, a clip's score is the mean of some frames'
    elsewhere                               optional: True if another machine does the work, meanwhile others can
    image                                   optional: False if it scores nothing but clips
    scale                                   typical standard deviation within a group, above 0
    range                                   (lowest, highest); None where there is no bound
    check(prompts)                          optional: raises ValueError for a prompt that it cannot score
    load(source, batch)                     optional: fetches its weights (weights.Source); InputError if there are none
What each is good for, and its licence: README.md beside this file.
"""

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import errors
from common.errors import InputError
from common.prompts import caption_of, fields_of
from common.rewards import own
from common.rewards.asking import blame, check_finite, score, try_out
from common.rewards.mixing import (
    in_units,
    on_unit_interval,
    require_range,
    scale,
    shares,
    terms,
    weighted_sum,
)
from common.rewards.weights import Source

__all__ = [
    "parse", "load", "REWARDS",
    "blame", "check_finite", "score", "try_out",  # asking.py
    # mixing.py
    "in_units", "on_unit_interval", "require_range", "scale", "shares", "terms", "weighted_sum",
]  # fmt: skip

REWARDS = {
    "verifier": ("worlds.verifier", "Verifier"),
    "verifier:quality": ("worlds.verifier", "Quality"),
    "verifier:layout": ("worlds.verifier", "Layout"),
    "verifier:passed": ("worlds.verifier", "Passed"),
    "motion": ("worlds.motion", "Motion"),
    "motion:quality": ("worlds.motion", "MotionQuality"),
    "motion:smooth": ("worlds.motion", "MotionSmooth"),
    "jpeg": ("common.rewards.jpeg", "JpegSize"),
    "hpsv2": ("common.rewards.clip", "HPSv2"),
    "hpsv2.1": ("common.rewards.clip", "HPSv21"),
    "clip": ("common.rewards.clip", "Clip"),
    "clip-h": ("common.rewards.clip", "ClipH"),
    "pickscore": ("common.rewards.pickscore", "PickScore"),
    "aesthetic": ("common.rewards.aesthetic", "Aesthetic"),
    "imagereward": ("common.rewards.imagereward", "ImageReward"),
    "judge:quality": ("common.rewards.judge", "JudgeQuality"),
    "judge:smoothness": ("common.rewards.judge", "JudgeSmoothness"),
    "judge:alignment": ("common.rewards.judge", "JudgeAlignment"),
    "videoalign": ("common.rewards.videoalign", "VideoAlign"),
    "videoalign:vq": ("common.rewards.videoalign", "VisualQuality"),
    "videoalign:mq": ("common.rewards.videoalign", "MotionQuality"),
    "videoalign:ta": ("common.rewards.videoalign", "TextAlignment"),
    "videoclip-xl": ("common.rewards.videoclip_xl", "VideoClipXL"),
}


def split(spec: str) -> tuple[str, str, str | None]:
    """What a flag says -> (what is loaded, what it is called, the weight or None): "clip=0.5" ->
    ("clip", "clip", "0.5"), "my/ocr.py:Ocr" -> ("my/ocr.py:Ocr", "ocr.py:Ocr", None)."""
    file, mark, rest = spec.rpartition(own.MARK)
    name, equals, weight = rest.partition("=")
    source = file + mark + name
    return source, Path(source).name if mark else source, weight if equals else None


def parse(specs: Iterable[str]) -> dict[str, float]:
    """["hpsv2.1=0.7", "clip"] -> {"hpsv2.1": 0.7, "clip": 1.0}; raises InputError."""
    weights = {}
    for spec in specs:
        _, name, weight = split(spec)
        if weights and spec.replace(".", "", 1).isdigit():
            raise InputError(f"reward: {spec!r} stands alone; write {list(weights)[-1]}={spec}")
        try:
            value = 1.0 if weight is None else float(weight)
        except ValueError:
            raise InputError(
                f"reward: {spec!r} has no number after '='; write NAME or NAME=WEIGHT, as in "
                "jpeg=0.5"
            ) from None
        if not abs(value) <= 1e6:
            raise InputError(f"reward: the weight in {spec!r} must be finite, at most 1e6")
        if name in weights:
            raise InputError(f"reward: {name!r} is there twice; give it once, with one weight")
        weights[name] = value
    if not weights:
        raise InputError(f"reward: name at least one of {', '.join(REWARDS)}")
    if not any(weights.values()):
        raise InputError(
            "reward: all weights are 0; --watch NAME scores a reward without training on it"
        )
    return weights


def parse_paths(specs: Iterable[str]) -> dict[str, str]:
    """["clip=assets/tiny-clip"] -> {"clip": "assets/tiny-clip"}; raises InputError, also for what
    does not exist."""
    paths = {}
    for spec in specs:
        name, _, path = spec.partition("=")
        if not path:
            raise InputError(
                f"--reward-path {spec}: write NAME=FILE, as in "
                "hpsv2.1=weights/HPS_v2.1_compressed.pt"
            )
        check_name(name)
        if not Path(path).exists():
            raise InputError(f"--reward-path {spec}: there is no {path}")
        paths[name] = path
    return paths


def load(
    specs: Iterable[str],
    prompts: list[str],
    reward_path: Iterable[str] = (),
    reward_batch: int = 16,
    reward_frames: str | int = "all",
    fps: float = 15.0,
    judge: dict | None = None,
    clips: bool | None = None,
) -> dict:
    """The scorers by name, with their weights, each having looked at the prompts that it will be
    asked about.

    specs: NAME or FILE.py:CLASS, of --reward and --watch; a =WEIGHT is not looked at. reward_path:
    "NAME=FILE" of weights that do not come from the hub. reward_batch: media that a model looks at
    at once. reward_frames: see asking.chosen_frames. fps: frames a second of the clips. judge: the
    flags --judge-..., by what follows the hyphen. clips: whether the model to train makes clips;
    None: unknown. Returns {name: scorer}; raises InputError for what is wrong with any of this."""
    sources, scorers, paths = {}, {}, parse_paths(reward_path)
    for source, name, _ in map(split, specs):
        if sources.setdefault(name, source) != source:
            raise InputError(
                f"reward: {sources[name]} and {source} are both called {name}; rename one of the "
                "files"
            )
    for name, source in sources.items():
        scorers[name] = scorer = own.load(source) if own.MARK in source else _of_table(name)
        if clips is False and not getattr(scorer, "image", True):
            raise InputError(
                f"reward {name} scores clips, and this --model makes images; take another of the "
                "two"
            )
        check_fields(name, scorer, prompts)
        try:
            getattr(scorer, "check", lambda _: None)([caption_of(prompt) for prompt in prompts])
        except Exception as error:  # of code of one's own, whatever
            raise InputError(f"reward {name}: {errors.text(error)}") from None
    for (
        name,
        scorer,
    ) in scorers.items():  # gigabytes, so after everything that can be wrong without them
        scorer.frames, scorer.fps, scorer.judge = reward_frames, fps, judge
        if hasattr(scorer, "load"):
            _load(name, scorer, Source(name, paths), reward_batch)
    return scorers


def _load(name: str, scorer: Any, source: Source, batch: int) -> None:
    try:
        scorer.load(source, batch)
    except Exception as error:  # whatever a broken file of a reward makes its libraries say
        if isinstance(error, InputError) or errors.of_the_machine(error):
            raise
        where = f"--reward-path {name}={source.given}" if source.given else "the hub's cache"
        raise InputError(
            f"reward {name}: its files in {where} do not load ({type(error).__name__}: "
            f"{errors.text(error)}); "
            "download them again"
        ) from None


def _of_table(name: str) -> Any:
    check_name(name)
    module, attribute = REWARDS[name]
    return getattr(importlib.import_module(module), attribute)()


def check_name(name: str) -> None:
    """Raises InputError for a reward that is neither in the table, with the nearest that are, nor
    in a file."""
    if name not in REWARDS and own.MARK not in name:
        near = difflib.get_close_matches(name, REWARDS, n=2, cutoff=0.4) or REWARDS
        raise InputError(
            f"reward: there is no {name!r}; did you mean {' or '.join(near)}? All: "
            f"{', '.join(REWARDS)}; one of your "
            "own is FILE.py:CLASS"
        )


def check_fields(name: str, scorer: Any, prompts: list[str]) -> None:
    """Raises InputError for the first prompt without a field that the scorer asks for."""
    for field in getattr(scorer, "fields", ()):
        for prompt in prompts:
            if field not in fields_of(prompt):
                raise InputError(
                    f"reward {name} needs the field {field!r}, which {caption_of(prompt)[:60]!r} "
                    "lacks; give --prompts "
                    "and --eval-prompts as .jsonl, each line with it beside the prompt"
                )
