"""Prompts by file or by name, and the deterministic order in which a run visits them.

A prompt is a string: a caption, or for image-to-video models the path of an image, a tab, and a
caption. One from a line of JSONL also has the line's other fields (files.Prompt), for the rewards
that ask for them."""

import functools
from collections.abc import Iterable
from pathlib import Path

import torch

from common.prompts import files, sets

AHEAD = 8  # steps whose prompts are embedded together, where the encoders come from the CPU for it


def read_prompts(spec: str | Path) -> list[str]:
    """What --prompts and --eval-prompts say -> [str]: the name of a set (sets.py),
    `hub:OWNER/NAME/FILE[:COLUMN]`, or a file, `FILE[:COLUMN]` (files.py). Raises InputError."""
    spec = str(spec)
    if sets.is_name(spec):
        return sets.read(spec)
    return files.read(*files.parse(spec))


def caption_of(prompt: str) -> str:
    """The words of a prompt."""
    return str(
        prompt.rpartition("\t")[2]
    )  # without its fields: tokenizers and caches want a plain string


def image_of(prompt: str) -> str:
    """The path of a prompt's conditioning image, "" if it has none."""
    return prompt.rpartition("\t")[0]


def fields_of(prompt: str) -> dict:
    """What the prompt's line of JSONL had besides: {name: value}."""
    return getattr(prompt, "fields", {})


def prompts_of_step(prompts: list[str], step: int, number: int, seed: int) -> list[str]:
    """The `number` prompts of a step. Every epoch is a new permutation; no state, so a resumed run
    visits the same.

    Where an epoch ends a prompt may occur twice in a step: groups are told apart by their number,
    never by text."""
    first = step * number
    return [
        prompts[_permutation(len(prompts), seed, i // len(prompts))[i % len(prompts)]]
        for i in range(first, first + number)
    ]


def prompts_ahead(
    prompts: list[str], step: int, number: int, seed: int, groups: Iterable[int]
) -> list[str]:
    """The prompts of these groups [b] (numbers below `number`, any often) in the next AHEAD - 1
    steps, each once."""
    groups = sorted(set(map(int, groups)))
    later = [prompts_of_step(prompts, step + after, number, seed) for after in range(1, AHEAD)]
    return list(dict.fromkeys(batch[group] for batch in later for group in groups))


@functools.lru_cache(maxsize=2)  # a step asks once a prompt, and may span two epochs
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch) & 0xFFFFFFFF)
    return torch.randperm(length, generator=generator).tolist()
