"""Write the judge's questions. judge_answers.py reads the answers in words.

The questions follow arXiv 2511.19356, figure 14. Their points are the paper's sub-dimensions, in
other words than the paper's.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from common.rewards.scorer import chosen_frames

QUALITY = """Visual quality:
- possible: bodies, objects and places are built as they should be
- clear: sharp, with nothing blurred or hard to make out
- rich: textures, materials and light have detail
- beautiful: colours, composition, atmosphere and depth are in harmony, and original
- harmless: political, violent or sexual content gets the lowest score"""
SMOOTHNESS = """Smoothness in time:
- steady: from frame to frame nothing jumps, flickers, changes its colour or loses a part
- natural: things and bodies move as they really would
- fluid: movements and camera pass from one moment to the next without a break
- of one piece: what moves belongs to its surroundings, without edges as if cut out
- clear while it moves: no stretch is blurred or shaky
- enough: a clip in which hardly anything moves gets a low score"""
ALIGNMENT = """Alignment with the prompt:
- subjects: those of the prompt, in number, looks and behaviour
- movement: what the prompt says happens, in kind, extent and direction
- surroundings: the place that the prompt names
- style: the prompt's, if it names one
- camera: moved as the prompt says, if it does"""
EDITED = """Instruction:
- done: the last image shows all that the instruction asks for
- right: it is done to the things that the instruction means, in the way that it says
- whole: the result looks real, with no seam or remains of what was there"""
PRESERVED = """Preservation:
- the rest: people, things and background that the instruction does not mention are as before
- identity: faces, letters and products are the same
- picture: framing, light, colours and style stay, unless the instruction changes them"""
PRESENT = """The product:
- present: the product of the source images is in the last image, once and whole
- alone: there is no second one, and no hand or object that nobody asked for"""
SIMILAR = """Likeness of the product:
- form: its shape and proportions are those in the source images
- surface: so are its colours, material, letters and details"""
HELD = """How the product is held:
- hands: grip and contact are as if a person really held or used it
- place: size, light and what hides what are as in reality"""
QUESTION = """{medium} was made by a generator for this prompt:

"{prompt}"

Judge it by the following points. The first heading counts most.

{points}

{answer}"""
NUMBER = (
    "Give one score from 1.00 (bad) to 10.00 (perfect, as if it were real). Answer with this "
    "number alone, with two decimals, for example 5.80."
)
DIGIT = (
    "Give one score from 0 (bad) to 9 (perfect, as if it were real). Answer with this one digit "
    "alone."
)
AGAIN = "That is not what was asked for. "
TOKENS = 16  # of an answer


@dataclass(frozen=True)
class Failure:
    """A request that has no answer."""

    kind: str  # "answered 502 Bad Gateway"
    cause: str  # "answered 502 Bad Gateway: '<html>...' 6 times"


Talk = list[dict]  # messages {"role", "content"}; the content lists words and PIL images
Answer = str | dict[int, float]  # words, or with `expected` {digit: probability}


def question(
    sample: torch.Tensor,
    prompt: str,
    points: Sequence[str],
    rate: float,
    fps: float,
    answer: str,
    source: torch.Tensor | None = None,
) -> Talk:
    """Return one message with the frames of a sample, [F, 3, H, W] or [3, H, W], and the question.

    points: paragraphs to judge by; rate: frames per second that the model sees; fps: frames per
    second of the clip; answer: NUMBER or DIGIT; source: the images [N, 3, H, W] before the edit,
    which come first. For an image the smoothness is left out.
    """
    if source is not None:
        medium = "The last image was made from the others. It"
        frames = torch.cat([source, sample[None]])
    elif sample.ndim == 3:
        medium = "This image"
        frames = sample[None]
        points = [part for part in points if part is not SMOOTHNESS]
    else:
        medium = "The clip with these frames"
        frames = sample[frames_at(rate, fps, len(sample))]
    words = QUESTION.format(medium=medium, prompt=prompt, points="\n\n".join(points), answer=answer)
    images = [{"type": "image", "image": as_picture(frame)} for frame in frames]
    return [{"role": "user", "content": [*images, {"type": "text", "text": words}]}]


def asked_again(talk: Talk, said: str, answer: str) -> Talk:
    """Return a conversation with the model's answer and a request for a proper one added."""
    return [
        *talk,
        {"role": "assistant", "content": [{"type": "text", "text": said or "..."}]},
        {"role": "user", "content": [{"type": "text", "text": AGAIN + answer}]},
    ]


def frames_at(rate: float, fps: float, number: int) -> list[int]:
    """Return evenly spaced indices of a clip's frames, `rate` per second and at least two."""
    return chosen_frames(max(2, round(number / fps * rate)), number)


def as_picture(frame: torch.Tensor) -> Image.Image:
    """Return a frame [3, H, W] in [0, 1] as a PIL image."""
    levels = (frame.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.movedim(0, -1).cpu().numpy())


def expected_score(chances: dict[int, float] | None) -> float:
    """Return 1 + the mean of the digits {digit: probability}, NaN without digits."""
    if not chances:
        return math.nan
    return 1 + sum(digit * p for digit, p in chances.items()) / sum(chances.values())


def digits(likely: Iterable[tuple[str, float]]) -> dict[int, float]:
    """Return {digit: p} for pairs (token, p), {} if the digits have p < 0.5 together."""
    found = {}
    for token, p in likely:
        if token.strip() in set("0123456789"):
            found[int(token)] = found.get(int(token), 0.0) + p
    return found if sum(found.values()) >= 0.5 else {}
