"""Read prompts by file or by name, and visit them in a deterministic order.

A prompt is a string: a caption, or for models that take images (image to video, editing) the path
of an image, a tab, and a caption; or several paths, each with a tab. A prompt from a line of JSONL
also holds the other values of the line (files.Prompt), for rewards that need them.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from common.prompts import files, sets

AHEAD = 8  # steps whose prompts are embedded together when encoders come from the CPU for it


def read_prompts(spec: str | Path) -> list[str]:
    """Return the prompts of --prompts or --eval-prompts. Raises InputError.

    spec: the name of a set (sets.py), hub:OWNER/NAME/FILE[:COLUMN], or FILE[:COLUMN] (files.py).
    """
    spec = str(spec)
    if sets.is_name(spec):
        return sets.read(spec)
    path, column = files.parse(spec)
    return files.read(path, column)


def caption_of(prompt: str) -> str:
    """Return the caption of a prompt as a plain string, without image and fields."""
    return str(prompt.rpartition("\t")[2])


def images_of(prompt: str) -> list[str]:
    """Return the paths of a prompt's images, [] if it has none."""
    return prompt.split("\t")[:-1]


def image_of(prompt: str) -> str:
    """Return the path of a prompt's first image, "" if it has none."""
    return next(iter(images_of(prompt)), "")


def fields_of(prompt: str) -> dict:
    """Return the other values of the prompt's line of JSONL: {name: value}."""
    return getattr(prompt, "fields", {})


def caption_with_fields(prompt: str) -> str:
    """Return the caption of a prompt without its image; fields_of still returns its fields."""
    if not fields_of(prompt):
        return caption_of(prompt)
    caption = files.Prompt(caption_of(prompt))
    caption.fields = fields_of(prompt)
    return caption


def place_of(prompt: str) -> str:
    """Return where a prompt was read, for errors: "line 3 of FILE"; "" if it is not known."""
    return getattr(prompt, "place", "")


def key_of(prompt: str) -> str:
    """Return a key of a prompt with its image and fields; without fields it is the prompt's text.

    Equality of prompts is that of their text alone.
    """
    fields = fields_of(prompt)
    return f"{prompt}\n{json.dumps(fields, sort_keys=True)}" if fields else str(prompt)


def prompts_of_step(prompts: list[str], step: int, number: int, seed: int) -> list[str]:
    """Return the `number` prompts of a step. Every epoch is a new permutation.

    The result depends on the arguments alone, so a resumed run visits the same prompts. A prompt
    may occur twice in a step in which an epoch ends. So groups are identified by number, never by
    text.
    """
    first = step * number
    return [
        prompts[_permutation(len(prompts), seed, i // len(prompts))[i % len(prompts)]]
        for i in range(first, first + number)
    ]


def prompts_ahead(
    prompts: list[str], step: int, number: int, seed: int, groups: Iterable[int]
) -> list[str]:
    """Return the prompts of these groups in the next AHEAD - 1 steps, each once.

    groups [b]: numbers below `number`, repeated or not.
    """
    groups = sorted(set(map(int, groups)))
    later = [prompts_of_step(prompts, step + after, number, seed) for after in range(1, AHEAD)]
    return list(dict.fromkeys(batch[group] for batch in later for group in groups))


@functools.lru_cache(maxsize=2)  # a step may span two epochs
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch) & 0xFFFFFFFF)
    return torch.randperm(length, generator=generator).tolist()
