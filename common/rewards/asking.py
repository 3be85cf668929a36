"""Asking the scorers: every score looked at, and what a scorer raises kept until all processes can
hear of it."""

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from common import errors
from common.errors import InputError, RunError
from common.prompts import caption_of, fields_of

if TYPE_CHECKING:  # it loads more than torch
    from common.models.family import Family


def chosen_frames(which: str | int, number: int) -> list[int]:
    """Indices of the frames of a clip of `number` that an image reward scores: the "first", the
    "middle" one, "all", or n evenly spaced ones, the first and the last among them."""
    if which == "all":
        return list(range(number))
    if which in ("first", "middle") or which == 1:
        return [0 if which == "first" else number // 2]
    return torch.linspace(0, number - 1, min(which, number)).round().long().tolist()


def score(scorers: dict, media: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Every scorer on every sample: media [b, ...], b prompts -> {name: [b] float32}, without
    gradients, on the media's device.

    A scorer that raises, whatever it is, gets infinite scores and its error is kept, for
    `check_finite` to raise on every process: one process that stopped here would leave the others
    waiting for it."""
    scores, numbers = {}, media.isfinite().all()
    for name, scorer in scorers.items():
        try:
            if not numbers:
                raise errors.Diverged(
                    "the samples are no numbers: the weights have diverged. Go on from an "
                    "earlier checkpoint in a new "
                    "run (--resume RUN/checkpoints/step_NNNNNN --output NEW), with a lower "
                    "--learning-rate"
                )
            before, found = (
                media._version,
                torch.as_tensor(score_one(scorer, media, prompts)).detach(),
            )
            if found.is_complex() or found.dtype == torch.bool:
                raise ValueError(
                    f"it returned {found.dtype}, no numbers of which one is the better"
                )
            scores[name] = found.to(media.device, torch.float32)
            if scores[name].shape != (len(prompts),):
                raise ValueError(
                    f"it returned {tuple(scores[name].shape)} for {len(prompts)} samples"
                )
            if media._version != before:
                raise ValueError(
                    "it changed the media, which the other rewards and the pictures need; clone "
                    "them"
                )
        except BaseException as error:  # a reward is anybody's code: it may end the program
            if errors.from_a_signal(error):
                raise
            scorer.error, scores[name] = (
                error,
                torch.full((len(prompts),), torch.inf, device=media.device),
            )
    return scores


def score_one(scorer: Any, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The scores [b] of media [b, ...]; of a clip, by a scorer of images, the mean of the chosen
    frames' scores."""
    if media.ndim == 4 or scorer.video:
        return ask(scorer, media, prompts)
    chosen = media[:, chosen_frames(getattr(scorer, "frames", "all"), media.shape[1])]
    b, f = chosen.shape[:2]
    return (
        ask(scorer, chosen.flatten(0, 1), [prompt for prompt in prompts for _ in range(f)])
        .view(b, f)
        .mean(1)
    )


def ask(scorer: Any, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The scorer's own scores of media [b, ...], with the captions of b prompts and the fields that
    it asks for."""
    fields = {
        name: [fields_of(prompt)[name] for prompt in prompts]
        for name in getattr(scorer, "fields", ())
    }
    return scorer.score(media, [caption_of(prompt) for prompt in prompts], **fields)


def of_samples(
    scorers: dict, model: "Family", x0: torch.Tensor, prompts: list[str], score: Callable = score
) -> dict[str, torch.Tensor | Callable]:
    """Decodes latents x0 [b, ...] and scores them: {name: [b] float32}, or what `score` gives. A
    decoder without memory is like a scorer that raises."""
    try:
        media = model.decode(x0)
    except Exception as error:
        if not errors.of_the_machine(error):
            raise
        for scorer in scorers.values():
            scorer.error = RunError(errors.of_the_machine(error))
        return {name: torch.full((len(prompts),), torch.inf, device=x0.device) for name in scorers}
    return score(scorers, media, prompts)


def try_out(scorers: dict, model: "Family", prompt: str) -> None:
    """Lets the model and the rewards work on one sample of nothing: what would fail after the first
    rollout (weights that are no numbers, too few frames, a server that takes no pictures) fails
    before it. Raises InputError."""
    scores = score(scorers, model.try_out(prompt), [prompt])
    for name, scorer in scorers.items():
        if failure(name, scorer):
            raise InputError(failure(name, scorer)) from scorer.error
        if outside(scorer, scores[name]).any():
            raise InputError(
                f"reward {name} gives {scores[name].item():g}, outside of the range "
                f"{tuple(scorer.range)} that it "
                "declares; None is no bound"
            )


def outside(scorer: Any, scores: torch.Tensor) -> torch.Tensor:
    """Which scores [...] leave the range that the scorer declares, by more than rounding."""
    low, high = (
        bound if bound is not None else torch.nan
        for bound in getattr(scorer, "range", (None, None))
    )
    return (scores < low - 1e-3 * max(1, abs(low))) | (scores > high + 1e-3 * max(1, abs(high)))


def failure(name: str, scorer: Any) -> str:
    """What a scorer raised when it was last asked, as a line; "" if nothing."""
    error = getattr(scorer, "error", None)
    if error is None or isinstance(error, (InputError, RunError)):
        return str(error or "")
    *_, place = traceback.extract_tb(error.__traceback__)
    _, cure = errors.out_of_memory(error) or ("", "")
    said = f"{type(error).__name__}: {errors.text(error)} ({place.filename}, line {place.lineno})"
    return f"reward {name} raised {said}{f': {cure}' * bool(cure)}"


def check_finite(scores: dict[str, torch.Tensor], scorers: dict, prompts: list[str]) -> None:
    """{name: [P, G]} of P prompts, from all processes; raises RunError on all of them for a scorer
    that raised, an infinite score, a NaN where `masks` does not allow it, and if nothing has a
    score."""
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


def blame(scores: dict[str, torch.Tensor], advantages: torch.Tensor, prompts: list[str]) -> str:
    """What a step whose gradient is no number can have stumbled over, as a line: the prompts whose
    scores give no advantages, else all, with what each reward gave. {name: [P, G]}, advantages [P,
    G], P prompts."""
    wrong = (~advantages.isfinite()).any(1).nonzero().flatten().tolist()
    listed = []
    for row in (wrong or range(len(prompts)))[:3]:
        known = {
            name: values[row][values[row].isfinite()].tolist() or [torch.nan]
            for name, values in scores.items()
        }
        given = ", ".join(
            f"{name} {min(values):.4g} to {max(values):.4g}" for name, values in known.items()
        )
        listed.append(f"{caption_of(prompts[row])[:100]!r} ({given})")
    if wrong:
        return (
            f"no advantages follow from the rewards of {len(wrong)} prompts: "
            f"{'; '.join(listed)}. Mend that reward, or "
            "take the prompt out of --prompts"
        )
    return (
        f"the rewards are not the cause: {'; '.join(listed)}. A new run with another --seed "
        "draws other samples, one "
        "from an earlier checkpoint may have a lower --learning-rate"
    )
