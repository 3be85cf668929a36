"""Rewards: a table of names, `name=weight` parsing, and scoring with every score checked.

A reward is a class, in the table or in a file of one's own (`my/file.py:Class`, own.py), with
    score(media, prompts) -> [b] float32    media [b, C, H, W] (video [b, F, C, H, W]) in [0, 1], one prompt a row
    fields                                  optional: names of what the prompts' lines of JSONL must have besides; score
                                            gets each by its name, a list of b values: score(media, prompts, text)
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
import traceback
from pathlib import Path

import torch

from common import errors
from common.errors import InputError, RunError
from common.prompts import caption_of, fields_of
from common.rewards import own
from common.rewards.weights import Source

REWARDS = {
    "verifier": ("common.rewards.verifier", "Verifier"),
    "verifier:quality": ("common.rewards.verifier", "Quality"),
    "verifier:layout": ("common.rewards.verifier", "Layout"),
    "verifier:passed": ("common.rewards.verifier", "Passed"),
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
    "judge:quality": ("common.rewards.judge", "JudgeQuality"),
    "judge:smoothness": ("common.rewards.judge", "JudgeSmoothness"),
    "judge:alignment": ("common.rewards.judge", "JudgeAlignment"),
    "videoalign": ("common.rewards.videoalign", "VideoAlign"),
    "videoalign:vq": ("common.rewards.videoalign", "VisualQuality"),
    "videoalign:mq": ("common.rewards.videoalign", "MotionQuality"),
    "videoalign:ta": ("common.rewards.videoalign", "TextAlignment"),
    "videoclip-xl": ("common.rewards.videoclip_xl", "VideoClipXL"),
}


def split(spec):
    """What a flag says -> (what is loaded, what it is called, the weight or None): "clip=0.5" -> ("clip", "clip",
    "0.5"), "my/ocr.py:Ocr" -> ("my/ocr.py:Ocr", "ocr.py:Ocr", None)."""
    file, mark, rest = spec.rpartition(own.MARK)
    name, equals, weight = rest.partition("=")
    source = file + mark + name
    return source, Path(source).name if mark else source, weight if equals else None


def parse(specs):
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
                f"reward: {spec!r} has no number after '='; write NAME or NAME=WEIGHT, as in jpeg=0.5"
            ) from None
        if not abs(value) <= 1e6:
            raise InputError(f"reward: the weight in {spec!r} must be finite, at most 1e6")
        if name in weights:
            raise InputError(f"reward: {name!r} is there twice; give it once, with one weight")
        weights[name] = value
    if not weights:
        raise InputError(f"reward: name at least one of {', '.join(REWARDS)}")
    if not any(weights.values()):
        raise InputError("reward: all weights are 0; --watch NAME scores a reward without training on it")
    return weights


def in_units(unit, weights, scorers):
    """{name: weight} as the flags have them -> as they count: weights of the rewards in their own units ("own"), or of
    rewards in units of the spread that each declares ("spread")."""
    return {name: weight / scorers[name].scale if unit == "spread" else weight for name, weight in weights.items()}


def load(specs, prompts, reward_path=(), reward_batch=16, reward_frames="all", fps=15.0, judge=None, clips=None):
    """The scorers by name, with their weights, each having looked at the prompts that it will be asked about.

    specs: NAME or FILE.py:CLASS, of --reward and --watch; a =WEIGHT is not looked at.
    reward_path: "NAME=FILE" of weights that do not come from the hub. reward_batch: media that a model looks at at
    once. reward_frames: see `chosen_frames`. fps: frames a second of the clips. judge: the flags --judge-..., by what
    follows the hyphen. clips: whether the model to train makes clips; None: unknown.
    Returns {name: scorer}; raises InputError for what is wrong with any of this.
    """
    sources, scorers, paths = {}, {}, parse_paths(reward_path)
    for source, name, _ in map(split, specs):
        if sources.setdefault(name, source) != source:
            raise InputError(f"reward: {sources[name]} and {source} are both called {name}; rename one of the files")
    for name, source in sources.items():
        scorers[name] = scorer = own.load(source) if own.MARK in source else _of_table(name)
        if clips is False and not getattr(scorer, "image", True):
            raise InputError(f"reward {name} scores clips, and this --model makes images; take another of the two")
        check_fields(name, scorer, prompts)
        try:
            getattr(scorer, "check", lambda _: None)([caption_of(prompt) for prompt in prompts])
        except Exception as error:  # of code of one's own, whatever
            raise InputError(f"reward {name}: {errors.text(error)}") from None
    for name, scorer in scorers.items():  # gigabytes, so after everything that can be wrong without them
        scorer.frames, scorer.fps, scorer.judge = reward_frames, fps, judge
        if hasattr(scorer, "load"):
            _load(name, scorer, Source(name, paths), reward_batch)
    return scorers


def _load(name, scorer, source, batch):
    try:
        scorer.load(source, batch)
    except Exception as error:  # whatever a broken file of a reward makes its libraries say
        if isinstance(error, InputError) or errors.of_the_machine(error):
            raise
        where = f"--reward-path {name}={source.given}" if source.given else "the hub's cache"
        raise InputError(
            f"reward {name}: its files in {where} do not load ({type(error).__name__}: {errors.text(error)}); "
            "download them again"
        ) from None


def _of_table(name):
    check_name(name)
    module, attribute = REWARDS[name]
    return getattr(importlib.import_module(module), attribute)()


def check_name(name):
    """Raises InputError for a reward that is neither in the table, with the nearest that are, nor in a file."""
    if name not in REWARDS and own.MARK not in name:
        near = difflib.get_close_matches(name, REWARDS, n=2, cutoff=0.4) or REWARDS
        raise InputError(
            f"reward: there is no {name!r}; did you mean {' or '.join(near)}? All: {', '.join(REWARDS)}; one of your "
            "own is FILE.py:CLASS"
        )


def check_fields(name, scorer, prompts):
    """Raises InputError for the first prompt without a field that the scorer asks for."""
    for field in getattr(scorer, "fields", ()):
        for prompt in prompts:
            if field not in fields_of(prompt):
                raise InputError(
                    f"reward {name} needs the field {field!r}, which {caption_of(prompt)[:60]!r} lacks; give --prompts "
                    "and --eval-prompts as .jsonl, each line with it beside the prompt"
                )


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
    """Every scorer on every sample: media [b, ...], b prompts -> {name: [b] float32}, without gradients, on the media's
    device.

    A scorer that raises, whatever it is, gets infinite scores and its error is kept, for `check_finite` to raise on
    every process: one process that stopped here would leave the others waiting for it.
    """
    scores, numbers = {}, media.isfinite().all()
    for name, scorer in scorers.items():
        try:
            if not numbers:
                raise errors.Diverged(
                    "the samples are no numbers: the weights have diverged. Go on from an earlier checkpoint in a new "
                    "run (--resume RUN/checkpoints/step_NNNNNN --output NEW), with a lower --learning-rate"
                )
            before, found = media._version, torch.as_tensor(score_one(scorer, media, prompts)).detach()
            if found.is_complex() or found.dtype == torch.bool:
                raise ValueError(f"it returned {found.dtype}, no numbers of which one is the better")
            scores[name] = found.to(media.device, torch.float32)
            if scores[name].shape != (len(prompts),):
                raise ValueError(f"it returned {tuple(scores[name].shape)} for {len(prompts)} samples")
            if media._version != before:
                raise ValueError("it changed the media, which the other rewards and the pictures need; clone them")
        except BaseException as error:  # a reward is anybody's code: it may end the program
            if errors.from_a_signal(error):
                raise
            scorer.error, scores[name] = error, torch.full((len(prompts),), torch.inf, device=media.device)
    return scores


def of_samples(scorers, model, x0, prompts, score=score):
    """Decodes latents x0 [b, ...] and scores them: {name: [b] float32}. A decoder without memory is like a scorer that
    raises."""
    try:
        media = model.decode(x0)
    except Exception as error:
        if not errors.of_the_machine(error):
            raise
        for scorer in scorers.values():
            scorer.error = RunError(errors.of_the_machine(error))
        return {name: torch.full((len(prompts),), torch.inf, device=x0.device) for name in scorers}
    return score(scorers, media, prompts)


def try_out(scorers, model, prompt):
    """Lets the model and the rewards work on one sample of nothing: what would fail after the first rollout (weights
    that are no numbers, too few frames, a server that takes no pictures) fails before it. Raises InputError."""
    scores = score(scorers, model.try_out(prompt), [prompt])
    for name, scorer in scorers.items():
        if failure(name, scorer):
            raise InputError(failure(name, scorer)) from scorer.error
        if outside(scorer, scores[name]).any():
            raise InputError(
                f"reward {name} gives {scores[name].item():g}, outside of the range {tuple(scorer.range)} that it "
                "declares; None is no bound"
            )


def outside(scorer, scores):
    """Which scores [...] leave the range that the scorer declares, by more than rounding."""
    low, high = (bound if bound is not None else torch.nan for bound in getattr(scorer, "range", (None, None)))
    return (scores < low - 1e-3 * max(1, abs(low))) | (scores > high + 1e-3 * max(1, abs(high)))


def score_one(scorer, media, prompts):
    """The scores [b] of media [b, ...]; of a clip, by a scorer of images, the mean of the chosen frames' scores."""
    if media.ndim == 4 or scorer.video:
        return ask(scorer, media, prompts)
    chosen = media[:, chosen_frames(getattr(scorer, "frames", "all"), media.shape[1])]
    b, f = chosen.shape[:2]
    return ask(scorer, chosen.flatten(0, 1), [prompt for prompt in prompts for _ in range(f)]).view(b, f).mean(1)


def ask(scorer, media, prompts):
    """The scorer's own scores of media [b, ...], with the captions of b prompts and the fields that it asks for."""
    fields = {name: [fields_of(prompt)[name] for prompt in prompts] for name in getattr(scorer, "fields", ())}
    return scorer.score(media, [caption_of(prompt) for prompt in prompts], **fields)


def failure(name, scorer):
    """What a scorer raised when it was last asked, as a line; "" if nothing."""
    error = getattr(scorer, "error", None)
    if error is None or isinstance(error, (InputError, RunError)):
        return str(error or "")
    *_, place = traceback.extract_tb(error.__traceback__)
    _, cure = errors.out_of_memory(error) or ("", "")
    said = f"{type(error).__name__}: {errors.text(error)} ({place.filename}, line {place.lineno})"
    return f"reward {name} raised {said}{f': {cure}' * bool(cure)}"


def check_finite(scores, scorers, prompts):
    """{name: [P, G]} of P prompts, from all processes; raises RunError on all of them for a scorer that raised, an
    infinite score, a NaN where `masks` does not allow it, and if nothing has a score."""
    for name, values in scores.items():
        masks = getattr(scorers[name], "masks", False)
        if failure(name, scorers[name]):
            kind = errors.Diverged if isinstance(scorers[name].error, errors.Diverged) else RunError
            raise kind(failure(name, scorers[name])) from scorers[name].error
        if masks and values.isnan().all():
            raise RunError(f"reward {name} has no score for any of {values.numel()} samples")
        wrong = (~torch.isfinite(values) & ~(values.isnan() & masks)).nonzero().tolist()
        if wrong:
            row, sample = wrong[0]
            raise RunError(
                f"reward {name} is {values[row, sample].item()} for the prompt {prompts[row]!r} "
                f"({len(wrong)} of {values.numel()} samples), or it failed in another process"
            )


def blame(scores, advantages, prompts):
    """What a step whose gradient is no number can have stumbled over, as a line: the prompts whose scores give no
    advantages, else all, with what each reward gave. {name: [P, G]}, advantages [P, G], P prompts."""
    wrong = (~advantages.isfinite()).any(1).nonzero().flatten().tolist()
    listed = []
    for row in (wrong or range(len(prompts)))[:3]:
        known = {name: values[row][values[row].isfinite()].tolist() or [torch.nan] for name, values in scores.items()}
        given = ", ".join(f"{name} {min(values):.4g} to {max(values):.4g}" for name, values in known.items())
        listed.append(f"{caption_of(prompts[row])[:100]!r} ({given})")
    if wrong:
        return (
            f"no advantages follow from the rewards of {len(wrong)} prompts: {'; '.join(listed)}. Mend that reward, or "
            "take the prompt out of --prompts"
        )
    return (
        f"the rewards are not the cause: {'; '.join(listed)}. A new run with another --seed draws other samples, one "
        "from an earlier checkpoint may have a lower --learning-rate"
    )


def require_range(scorers):
    """Raises InputError for the first scorer without two bounds."""
    for name, scorer in scorers.items():
        if None in scorer.range:
            raise InputError(f"reward {name}: its scores have no bounds, so they cannot be put on [0, 1]")


def on_unit_interval(scores, scorers, names):
    """{name: [...]} -> {name: [...]} of `names` on [0, 1], by the ranges that the scorers declare; a sample without one
    of these scores (NaN) has none of them."""
    bounds = {name: scorers[name].range for name in names}
    masked = sum(scores[name] for name in names).isnan()
    return {
        name: ((scores[name] - low) / (high - low)).masked_fill(masked, torch.nan)
        for name, (low, high) in bounds.items()
    }


def scale(scorers, weights):
    """Typical spread within a group of the weighted sum: of terms that rise and fall together, an upper limit."""
    return sum(abs(weight) * scorers[name].scale for name, weight in weights.items())


def terms(aggregate, total, scores, weights):
    """What advantages are computed from, [(rewards [P, G], its weight)]: the weighted sum `total` of the scores {name:
    [P, G]}; or, "advantages", each of them by itself, a sample without one of them (NaN) having none."""
    if aggregate == "rewards":
        return [(total, 1.0)]
    return [(scores[name].masked_fill(total.isnan(), torch.nan), weight) for name, weight in weights.items()]


def shares(scores, weights, parts=()):
    """How much of what is added up each of several rewards is, {"share_NAME": 0 to 1}, together 1; {} of one reward.

    scores {name: [P, G]}, weights {name: number or [P, 1]}. The standard deviation of weight * score within each group,
    averaged over the groups, and divided by the sum of that over the rewards. Where advantages are added up instead,
    `parts`, an [P, G] for each reward, have taken the place of weight * score. Without any spread: 0.
    """
    if len(weights) < 2:
        return {}
    added = parts if len(parts) > 1 else [weight * scores[name] for name, weight in weights.items()]
    spreads = [(part - part.nanmean(1, keepdim=True)).square().nanmean(1).sqrt().nanmean() for part in added]
    spreads = torch.stack(spreads).nan_to_num(0.0)  # of a reward without any score
    return {f"share_{name}": share for name, share in zip(weights, spreads / spreads.sum().clamp(min=1e-30))}


def weighted_sum(scores, weights):
    """{name: [...]} and {name: weight} -> [...]; a reward of weight 0 takes no part, nor does its NaN."""
    return sum(weight * scores[name] for name, weight in weights.items() if not isinstance(weight, float) or weight)
