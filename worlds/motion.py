"""The exact verifier of moving shapes: follows the one object of a clip and checks it against a
caption.

It reads each frame as `worlds/verifier.py` reads an image, then looks at the frames together:

    follow      the largest object of each frame is the one that moves
    fit         a straight line at constant speed through its places, by least squares
    compare     its shape, its colour, and the direction and the length of that line, with the words of the caption

Every part is graded, in [0, 1]; the stages build on each other:

    quality     the frames look like drawings of shapes at all, on average
    smooth      quality * smoothness: one object, always the same, moves at constant speed, whatever it is
    alignment   the share of what the caption names that is there: shape, colour, direction, speed; of one object
    score       quality * smoothness * alignment
    passed      yes or no: every word of the caption holds, in every frame where it can, at quality and smoothness
                above 0.5

Lengths are shares of the image's side, so an image of any size will do, and a speed is the length
of the whole path, so a clip of any number of frames will do. The file needs torch and the image
verifier."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from worlds.scene import ANY, COLOURS, SHAPES
from worlds.verifier import read

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y down
SPEEDS = {"slowly": -1, "quickly": 1}  # the side of BOUNDARY
TASKS = ("full", "direction", "shape", "vague")

PIXEL = 1 / 32  # the scale on which direction and speed are graded: a pixel where the side has 32
BOUNDARY = 10.5 * PIXEL  # a path over the whole clip that is longer is quick
MOVES = (
    2.5 * PIXEL
)  # half of the slowest path: an object that goes less far stands rather than moves
STEADY = 1.5 * PIXEL  # mean second difference of the place that halves the smoothness
# changes of the object over the clip that halve it; a change of shape is 1, as is one of colour
SAME = 0.75


# --- Captions ---


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for: indices into SHAPES, COLOURS, DIRECTIONS and SPEEDS, ANY where left
    open."""

    task: str
    shape: int
    colour: int
    direction: int
    speed: int


_GRAMMAR = re.compile(
    rf"(?:an? (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|shape)|something "
    rf"({'|'.join(COLOURS)}))"
    rf" moving ({'|'.join(DIRECTIONS)})(?: ({'|'.join(SPEEDS)}))?"
)


@functools.lru_cache(maxsize=100_000)
def parse(caption: str) -> Wanted:
    """Caption -> Wanted; raises ValueError with the grammar for a caption that is not of this
    world."""
    match = _GRAMMAR.fullmatch(" ".join(caption.lower().split()).removesuffix(".").strip())
    if match is None:
        raise ValueError(
            f"the world of moving shapes has no caption {caption[:80]!r}; it knows 'a [COLOUR] "
            "SHAPE moving DIRECTION "
            "[SPEED]' and 'something COLOUR moving DIRECTION [SPEED]', with SHAPE "
            f"{', '.join(SHAPES)} or shape, "
            f"COLOUR {', '.join(COLOURS)}, DIRECTION {', '.join(DIRECTIONS)} and SPEED "
            f"{' or '.join(SPEEDS)}"
        )
    colour, shape, something, direction, speed = match.groups()
    shape, colour, direction, speed = (
        list(names).index(word) if word in names else ANY
        for word, names in (
            (shape, SHAPES),
            (colour or something, COLOURS),
            (direction, DIRECTIONS),
            (speed, SPEEDS),
        )
    )
    if shape == ANY:
        task = "vague"
    elif colour == ANY:
        task = "shape"
    else:
        task = "direction" if speed == ANY else "full"
    return Wanted(task, shape, colour, direction, speed)


# --- Watching a clip ---


@dataclass
class Track:
    """The object of each clip, frame by frame; lengths in shares of the image's side."""

    present: torch.Tensor  # [B, F] in [0, 1]
    shape: torch.Tensor  # [B, F, S] probabilities
    colour: torch.Tensor  # [B, F, K] probabilities
    place: torch.Tensor  # [B, F, 2]
    radius: torch.Tensor  # [B, F]
    count: torch.Tensor  # [B, F] objects, this one and others
    quality: torch.Tensor  # [B, F] in [0, 1], of the frames
    path: torch.Tensor  # [B, 2] from the first frame to the last, along the fitted line


def follow(clips: torch.Tensor) -> Track:
    """clips [B, F, 3, H, W] in [0, 1], H = W, F >= 3 -> Track"""
    assert clips.dim() == 5 and clips.shape[1] >= 3, (
        f"expected clips [B, F, 3, H, W] of F >= 3 frames, got {tuple(clips.shape)}"
    )
    reading, side = read(clips.flatten(0, 1)), clips.shape[-1]

    def frames(field: torch.Tensor) -> torch.Tensor:
        return field.unflatten(0, clips.shape[:2])

    present, shape, colour, radius = (
        frames(field[:, 0])
        for field in (reading.present, reading.shape, reading.colour, reading.radius)
    )
    place = frames(torch.stack([reading.x[:, 0], reading.y[:, 0]], dim=-1)) / side
    line, path = fit_line(place, present)
    place = line + present[..., None] * (
        place - line
    )  # where the object is missing it is on its way
    return Track(
        present,
        shape,
        colour,
        place,
        radius / side,
        frames(reading.count),
        frames(reading.quality),
        path,
    )


def fit_line(place: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares at constant speed: place [B, F, 2], weight of each frame [B, F] -> the fitted
    places [B, F, 2] and the way from the first to the last [B, 2]."""
    total = weight.sum(1, keepdim=True).clamp(min=1e-6)
    time = torch.arange(place.shape[1], dtype=place.dtype, device=place.device)
    time = time - (weight * time).sum(1, keepdim=True) / total  # [B, F]
    middle = (weight[..., None] * place).sum(1, keepdim=True) / total[..., None]
    # two full frames next to each other have a spread of 0.5; less tells nothing about a speed
    spread = (weight * time.square()).sum(1).clamp(min=0.5)
    speed = ((weight * time)[..., None] * (place - middle)).sum(1) / spread[
        :, None
    ]  # [B, 2] a frame
    return middle + speed[:, None] * time[..., None], speed * (place.shape[1] - 1)


def smoothness(track: Track) -> torch.Tensor:
    """How constantly the object is there, stays itself and moves, whatever it is: [B] in [0, 1]"""
    bend = track.place.diff(n=2, dim=1).norm(dim=-1).mean(1)
    both = torch.minimum(
        track.present[:, 1:], track.present[:, :-1]
    )  # a missing object is not another one
    change = (
        track.shape.diff(dim=1).abs().sum(-1) / 2
        + track.colour.diff(dim=1).abs().sum(-1) / 2
        + track.radius.clamp(min=1e-3).log().diff(dim=1).abs()
    )
    change = (both * change).sum(1)
    return track.present.mean(1) / (1 + (bend / STEADY).square()) / (1 + (change / SAME).square())


# --- Comparing with captions ---


def compare(track: Track, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (alignment [B], passed [B], the latter without a look at quality or smoothness)"""
    device = track.path.device
    wanted = [parse(caption) for caption in captions]
    want = torch.tensor(
        [(w.shape, w.colour, w.direction, w.speed) for w in wanted], device=device
    )  # [B, 4]
    named, index = want != ANY, want.clamp(min=0)

    chance = torch.stack(  # of the shape and the colour in each frame: [B, F, 2]
        [
            probability.gather(2, index[:, k, None, None].expand(*track.present.shape, 1))[..., 0]
            * track.present
            for k, probability in enumerate((track.shape, track.colour))
        ],
        dim=-1,
    )
    axis = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32, device=device)[
        index[:, 2]
    ]  # [B, 2]
    along = (track.path * axis).sum(1)
    across = (track.path * axis.flip(1)).sum(1).abs()
    side = torch.tensor(list(SPEEDS.values()), device=device)[index[:, 3]]
    motion = torch.stack(
        [along - across - MOVES, side * (track.path.norm(dim=1) - BOUNDARY)], dim=1
    )  # [B, 2]
    motion = torch.sigmoid(motion / PIXEL)

    share = torch.cat([chance.mean(1), motion], dim=1)  # partial credit
    every = torch.cat(
        [chance.amin(1), motion], dim=1
    )  # what passing takes: shape and colour in every frame
    right_number = track.count.clamp(max=1) / track.count.clamp(min=1)  # [B, F]
    alignment = (share * named).sum(1) / named.sum(1) * right_number.mean(1)
    one = ((track.present > 0.5) & (track.count.round() == 1)).all(1)
    return alignment, ((every > 0.5) | ~named).all(1) & one


def judge(track: Track, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Track of B clips and their captions -> the parts, each [B]; see `verify`."""
    quality, constancy = track.quality.mean(1), smoothness(track)
    alignment, passed = compare(track, captions)
    return {
        "quality": quality,
        "smooth": quality * constancy,
        "alignment": alignment,
        "score": quality * constancy * alignment,
        "passed": passed & (quality > 0.5) & (constancy > 0.5),
    }


def verify(clips: torch.Tensor, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """clips [B, F, 3, H, W] in [0, 1] and their B captions -> {"quality", "smooth", "alignment",
    "score": [B] float32 in [0, 1], "passed": [B] bool}. A caption that is not of this world raises
    ValueError."""
    assert len(captions) == len(clips), f"{len(clips)} clips, {len(captions)} captions"
    for caption in captions:
        parse(caption)  # before the work
    return judge(follow(clips), captions)


@functools.lru_cache(maxsize=1)  # the parts of one batch are asked for one after another
def _verify_once(clips: torch.Tensor, captions: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return verify(clips, captions)


class Motion:
    """Reward: the motion verifier's `score` in [0, 1]. Checked against the renderer itself
    (tests/test_motion.py)."""

    part = "score"
    video, image = True, False
    # standard deviation within groups of clean renders with 30% of the attributes wrong: 0.26
    scale = 0.25
    range = (0.0, 1.0)

    def check(self, prompts: Iterable[str]) -> None:
        """Raises ValueError for the first prompt that the verifier cannot read."""
        for prompt in prompts:
            parse(prompt)

    @torch.no_grad()
    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """media [b, F, 3, H, W] in [0, 1] of F >= 3 frames, prompts b strings -> [b] float32.
        Raises ValueError."""
        if media.dim() != 5:
            raise ValueError(
                "the motion reward scores clips [b, F, C, H, W], not media of shape "
                f"{list(media.shape)}"
            )
        return _verify_once(media, tuple(prompts))[self.part]


class MotionQuality(Motion):
    """Reward: the motion verifier's `quality`, whatever moves and wherever."""

    part = "quality"


class MotionSmooth(Motion):
    """Reward: the motion verifier's `smooth`: quality and constancy, whatever the caption says."""

    part = "smooth"
