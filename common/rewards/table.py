"""The table of rewards, and how the names on the command line become scorers."""

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import errors
from common.errors import InputError
from common.prompts import caption_of, caption_with_fields, fields_of, image_of, place_of
from common.rewards import own
from common.rewards.scorer import SOURCE
from common.rewards.weights import Source

REWARDS = {  # name -> "module:Class"
    "verifier": "worlds.verifier:Verifier",
    "verifier:quality": "worlds.verifier:Quality",
    "verifier:layout": "worlds.verifier:Layout",
    "verifier:passed": "worlds.verifier:Passed",
    "motion": "worlds.motion:Motion",
    "motion:quality": "worlds.motion:MotionQuality",
    "motion:smooth": "worlds.motion:MotionSmooth",
    "edit": "worlds.edits:EditVerifier",
    "edit:quality": "worlds.edits:EditQuality",
    "edit:rest": "worlds.edits:EditRest",
    "edit:passed": "worlds.edits:EditPassed",
    "letters": "worlds.letters:Letters",
    "letters:quality": "worlds.letters:LettersQuality",
    "points": "worlds.points:Score",
    "points:quality": "worlds.points:Quality",
    "points:layout": "worlds.points:Layout",
    "jpeg": "common.rewards.jpeg:JpegSize",
    "hpsv2": "common.rewards.clip:HPSv2",
    "hpsv2.1": "common.rewards.clip:HPSv21",
    "clip": "common.rewards.clip:Clip",
    "clip-h": "common.rewards.clip:ClipH",
    "preserve": "common.rewards.preserve:Preserve",
    "pickscore": "common.rewards.pickscore:PickScore",
    "aesthetic": "common.rewards.aesthetic:Aesthetic",
    "imagereward": "common.rewards.imagereward:ImageReward",
    "judge:quality": "common.rewards.judge:JudgeQuality",
    "judge:smoothness": "common.rewards.judge:JudgeSmoothness",
    "judge:alignment": "common.rewards.judge:JudgeAlignment",
    "judge:edit": "common.rewards.judge:JudgeEdit",
    "judge:preserve": "common.rewards.judge:JudgePreserve",
    "judge:present": "common.rewards.judge:JudgePresent",
    "judge:similar": "common.rewards.judge:JudgeSimilar",
    "judge:held": "common.rewards.judge:JudgeHeld",
    "videoalign": "common.rewards.videoalign:VideoAlign",
    "videoalign:vq": "common.rewards.videoalign:VisualQuality",
    "videoalign:mq": "common.rewards.videoalign:MotionQuality",
    "videoalign:ta": "common.rewards.videoalign:TextAlignment",
    "videoclip-xl": "common.rewards.videoclip_xl:VideoClipXL",
    "ocr": "common.rewards.ocr:Ocr",
    "ocr:whole": "common.rewards.ocr:OcrWhole",
    "ocr:second": "common.rewards.ocr:OcrSecond",
    "geneval": "common.rewards.geneval:GenEval",
    "geneval:passed": "common.rewards.geneval:GenEvalPassed",
}


# --- Words of the command line ---


def split(spec: str) -> tuple[str, str, str | None]:
    """Return (source, name, weight or None) of one word of --reward or --watch.

    "clip=0.5" -> ("clip", "clip", "0.5"); "my/ocr.py:Ocr" -> ("my/ocr.py:Ocr", "ocr.py:Ocr", None).
    """
    file, mark, rest = spec.rpartition(own.MARK)
    name, equals, weight = rest.partition("=")
    source = file + mark + name
    return source, Path(source).name if mark else source, weight if equals else None


def parse(specs: Iterable[str]) -> dict[str, float]:
    """Return {name: weight} of --reward: ["hpsv2.1=0.7", "clip"] -> {"hpsv2.1": 0.7, "clip": 1.0}.

    Raise InputError for a weight that is not a number, for a name given twice and for no weights.
    """
    weights = {}
    for spec in specs:
        _, name, weight = split(spec)
        if weights and spec.replace(".", "", 1).isdigit():
            raise InputError(f"--reward {spec}: has no name. Write {list(weights)[-1]}={spec}.")
        try:
            value = 1.0 if weight is None else float(weight)
        except ValueError:
            raise InputError(
                f"--reward {spec}: {weight!r} is not a number. Write NAME or NAME=WEIGHT, for "
                "example jpeg=0.5."
            ) from None
        if not abs(value) <= 1e6:
            raise InputError(f"--reward {spec}: the weight must be finite and at most 1e6.")
        if name in weights:
            raise InputError(f"--reward {spec}: {name} is given twice. Give it one weight.")
        weights[name] = value
    if not weights:
        raise InputError(f"--reward is empty: name at least one of {', '.join(REWARDS)}.")
    if not any(weights.values()):
        raise InputError(
            "--reward: all weights are 0. Use --watch NAME to score without training on it."
        )
    return weights


def parse_paths(specs: Iterable[str]) -> dict[str, str]:
    """Return {name: path} of --reward-path: ["clip=assets/tiny-clip"].

    Raise InputError for a name or a path that does not exist.
    """
    paths = {}
    for spec in specs:
        name, _, path = spec.partition("=")
        if not path:
            raise InputError(
                f"--reward-path {spec}: write NAME=FILE, as in "
                "hpsv2.1=weights/HPS_v2.1_compressed.pt."
            )
        _check_name(name)
        if not Path(path).exists():
            raise InputError(f"--reward-path {spec}: there is no {path}.")
        paths[name] = path
    return paths


# --- Scorers ---


def load(
    specs: Iterable[str],
    prompts: list[str],
    reward_path: Iterable[str] = (),
    reward_batch: int = 16,
    reward_frames: str | int = "all",
    fps: float = 15.0,
    judge: dict | None = None,
    clips: bool | None = None,
) -> dict[str, Any]:
    """Return {name: scorer} with weights loaded, after each scorer has checked the prompts.

    specs: NAME or FILE.py:CLASS; a =WEIGHT is ignored. reward_path: "NAME=FILE" for weights that
    do not come from the hub. reward_batch: images or clips per forward pass of a reward model.
    reward_frames: see scorer.chosen_frames. fps: frames per second of the clips. judge: the flags
    --judge-..., by the part of their name after judge_, and "trusted". clips: whether the model
    makes clips; None: unknown. Raise InputError for anything that is wrong.
    """
    paths = parse_paths(reward_path)
    sources = {}
    for source, name, _ in map(split, specs):
        if sources.setdefault(name, source) != source:
            raise InputError(
                f"--reward {source}: {sources[name]} is called {name}, too. Rename one file."
            )
    scorers = {}
    for name, source in sources.items():
        scorers[name] = own.load(source) if own.MARK in source else of_table(name)
        _check_prompts(name, scorers[name], prompts, clips)
    for name, scorer in scorers.items():  # weights are gigabytes: after all the quick checks
        scorer.frames = reward_frames
        scorer.fps = fps
        scorer.judge = judge
        if hasattr(scorer, "load"):
            given = Source(name, paths)
            where = f"--reward-path {name}={given.given}" if given.given else "from the hub's cache"
            with (
                errors.loading(
                    f"reward {name}:", where, do="download its files again, or give --reward-path"
                ),
                own.apart(scorer),
            ):
                scorer.load(given, reward_batch)
    return scorers


def of_table(name: str) -> Any:
    """Return a scorer of the table, without weights. Raise InputError for an unknown name."""
    _check_name(name)
    module, _, attribute = REWARDS[name].partition(":")
    with errors.loading(f"reward {name}", do="install the packages of requirements.txt"):
        return getattr(importlib.import_module(module), attribute)()


def _check_name(name: str) -> None:
    """Raise InputError for a name that is neither in the table nor a class in a file."""
    if name in REWARDS or own.MARK in name:
        return
    near = difflib.get_close_matches(name, REWARDS, n=2, cutoff=0.4) or REWARDS
    raise InputError(
        f"reward: there is no {name!r}; did you mean {' or '.join(near)}? All: "
        f"{', '.join(REWARDS)}. Name a reward of your own as FILE.py:CLASS."
    )


def _check_prompts(name: str, scorer: Any, prompts: list[str], clips: bool | None) -> None:
    """Raise InputError if the scorer cannot score the media or one of the prompts."""
    if clips is False and not getattr(scorer, "image", True):
        raise InputError(
            f"reward {name} scores clips, and this --model makes images. Choose another reward or "
            "another --model."
        )
    for field in getattr(scorer, "fields", ()):
        for prompt in prompts:
            if field == SOURCE and not image_of(prompt):
                raise InputError(
                    f"reward {name} compares samples with their source, and "
                    f"{caption_of(prompt)[:60]!r} has no image. Write lines IMAGE <tab> PROMPT, or "
                    "choose another reward."
                )
            if field != SOURCE and field not in fields_of(prompt):
                raise InputError(
                    f"reward {name} needs the field {field!r}, which {caption_of(prompt)[:60]!r} "
                    "lacks. Give --prompts and --eval-prompts as .jsonl files in which every line "
                    "has it."
                )
    if hasattr(scorer, "check"):
        try:
            with own.apart(scorer):
                scorer.check([caption_with_fields(prompt) for prompt in prompts])
        except Exception as error:  # a prompt that it cannot score, or a bug in a user's code
            where = _place_of_refused(scorer, prompts)
            raise InputError(f"reward {name}: {where}{errors.text(error)}") from error


def _place_of_refused(scorer: Any, prompts: list[str]) -> str:
    """Return "PLACE: " of the first prompt that a scorer refuses, "" if it is not known."""
    for prompt in prompts:
        try:
            with own.apart(scorer):
                scorer.check([caption_with_fields(prompt)])
        except Exception:
            return f"{place_of(prompt)}: " if place_of(prompt) else ""
    return ""
