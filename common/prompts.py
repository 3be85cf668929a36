"""Prompt files and the deterministic order in which a run visits them.

A prompt is a string: a caption, or for image-to-video models the path of an image, a tab, and a caption.
"""

import functools
from pathlib import Path

import torch

from common.errors import InputError

HPSV2 = ("anime", "concept-art", "paintings", "photo")  # its styles, 800 prompts each


def read_prompts(path):
    """One prompt a line, UTF-8 with or without a byte-order mark, blank lines skipped -> [str]; or InputError.

    In a line IMAGE <tab> CAPTION the image's path counts from the file's folder. A path `hpsv2:STYLE` or `hpsv2:all`
    means the official prompts of HPSv2 (arXiv 2306.09341).
    """
    if str(path).startswith("hpsv2:"):
        return _hpsv2_prompts(str(path).removeprefix("hpsv2:"))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"prompts: cannot read {path} ({error.strerror}); give a text file with one prompt a line"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"prompts: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"prompts: {path} has no prompt in it; give a text file with one prompt a line")
    folder = Path(path).parent
    return [str(folder / prompt) if "\t" in prompt else prompt for prompt in prompts]


def caption_of(prompt):
    """The words of a prompt."""
    return prompt.rpartition("\t")[2]


def image_of(prompt):
    """The path of a prompt's conditioning image, "" if it has none."""
    return prompt.rpartition("\t")[0]


def prompts_of_step(prompts, step, number, seed):
    """The `number` prompts of a step. Every epoch is a new permutation; no state, so a resumed run visits the same.

    Where an epoch ends a prompt may occur twice in a step: groups are told apart by their number, never by text.
    """
    first = step * number
    return [
        prompts[_permutation(len(prompts), seed, i // len(prompts))[i % len(prompts)]]
        for i in range(first, first + number)
    ]


@functools.lru_cache(maxsize=2)  # a step asks once a prompt, and may span two epochs
def _permutation(length, seed, epoch):
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch) & 0xFFFFFFFF)
    return torch.randperm(length, generator=generator).tolist()


def _hpsv2_prompts(style):
    """The official prompts of a style, or of all, as the hpsv2 package has them; the first time it downloads them."""
    if style not in (*HPSV2, "all"):
        raise InputError(f"prompts: hpsv2 has no {style!r}; it has {', '.join(HPSV2)} and all")
    try:
        import hpsv2
    except ImportError as error:
        raise InputError(f"prompts: hpsv2:{style} takes the package hpsv2 ({error}); pip install hpsv2") from None
    try:
        try:
            prompts = hpsv2.benchmark_prompts(style)
        except FileExistsError:  # another process wrote its link at the same moment
            prompts = hpsv2.benchmark_prompts(style)
    except (OSError, ValueError) as error:  # the hub's errors among them
        raise InputError(
            f"prompts: hpsv2:{style} is not in the Hugging Face cache (data set zhwang/HPDv2, benchmark/), and the "
            f"hub does not give it: {str(error).splitlines()[0]}; start where there is a network, or give a text file"
        ) from None
    return [prompt for part in prompts.values() for prompt in part] if style == "all" else prompts
