"""Call one scorer, and check the form of its scores."""

from typing import Any

import torch

from common.prompts import caption_with_fields, fields_of
from common.prompts.pictures import sources
from common.rewards import own

SOURCE = "source"  # the field that is the prompt's images instead of a value in its line


def chosen_frames(which: str | int, number: int) -> list[int]:
    """Return the indices of the frames, out of `number`, that an image reward scores.

    which: "first", "middle", "all", or a count of evenly spaced frames with both ends.
    """
    if which == "all":
        return list(range(number))
    if which == "first":
        return [0]
    if which in ("middle", 1):
        return [number // 2]
    return torch.linspace(0, number - 1, min(which, number)).round().long().tolist()


def scores_of(scorer: Any, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the scores [b] float32 of media [b, ...] on their device, without gradients.

    An image reward scores a clip by the mean over its chosen frames. Raises ValueError for results
    that are not one number a sample, and any exception of the scorer.
    """
    before = media._version
    if media.ndim == 4 or scorer.video:
        found = _called(scorer, media, prompts)
    else:
        chosen = media[:, chosen_frames(getattr(scorer, "frames", "all"), media.shape[1])]
        b, f = chosen.shape[:2]
        repeated = [prompt for prompt in prompts for _ in range(f)]
        found = torch.as_tensor(_called(scorer, chosen.flatten(0, 1), repeated))
        found = found.view(b, f).mean(1)
    found = torch.as_tensor(found).detach()
    if found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"it returned {found.dtype}, which cannot be ranked")
    found = found.to(media.device, torch.float32)
    if found.shape != (len(prompts),):
        raise ValueError(f"it returned {tuple(found.shape)} for {len(prompts)} samples")
    if media._version != before:
        raise ValueError("it changed the media, which other rewards need; clone them first")
    return found


def _called(scorer: Any, media: torch.Tensor, prompts: list[str]) -> Any:
    """Call scorer.score with the captions of the prompts and their fields, in its own switches."""
    fields = {}
    for name in getattr(scorer, "fields", ()):
        if name == SOURCE:
            height, width = media.shape[-2:]
            fields[name] = sources(prompts, height, width).to(media.device)
        else:
            fields[name] = [fields_of(prompt)[name] for prompt in prompts]
    captions = [caption_with_fields(prompt) for prompt in prompts]
    with own.apart(scorer):
        return scorer.score(media, captions, **fields)


def out_of_range(scorer: Any, scores: torch.Tensor) -> torch.Tensor:
    """Return a mask [...] of the scores outside the declared range by more than rounding."""
    low, high = getattr(scorer, "range", (None, None))
    outside = torch.zeros_like(scores, dtype=torch.bool)
    if low is not None:
        outside |= scores < low - 1e-3 * max(1, abs(low))
    if high is not None:
        outside |= scores > high + 1e-3 * max(1, abs(high))
    return outside
