"""Verify clips of moving shapes exactly: follow the object and compare it with the caption.

The verifier reads each frame as `worlds/verifier.py` reads an image, then combines the frames:

    follow      take the largest object of each frame as the one that moves
    fit         fit a straight line at constant speed to its places, by least squares
    compare     compare its shape, its colour, and the direction and the length of that line with
                the words of the caption

All scores but `passed` are in [0, 1], and each stage includes the one before it:

    quality     whether the frames look like drawings of shapes, on average
    smooth      quality * smoothness: whether a single object moves at constant speed and stays the
                same, whatever it is
    alignment   the share of the caption's words that hold: shape, colour, direction, speed
    score       quality * smoothness * alignment
    passed      whether every word of the caption holds, shape and colour in every frame, with
                quality and smoothness above 0.5

Lengths are shares of the image's side, so images may have any size. A speed is the length of the
whole path, so clips may have any number of frames. The file needs torch and the image verifier.
"""

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
    """Hold what a caption asks for: indices into SHAPES, COLOURS, DIRECTIONS and SPEEDS.

    ANY marks an attribute that the caption leaves open.
    """

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
    """Return what a caption asks for. Raises ValueError, with the grammar, for other captions."""
    match = _GRAMMAR.fullmatch(" ".join(caption.lower().split()).removesuffix(".").strip())
    if match is None:
        raise ValueError(
            f"the world of moving shapes has no caption {caption[:80]!r}; it knows 'a [COLOUR] "
            "SHAPE moving DIRECTION [SPEED]' and 'something COLOUR moving DIRECTION [SPEED]', "
            f"with SHAPE {', '.join(SHAPES)} or shape, COLOUR {', '.join(COLOURS)}, DIRECTION "
            f"{', '.join(DIRECTIONS)} and SPEED {' or '.join(SPEEDS)}"
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
    """Hold the object of each clip, frame by frame. Lengths are shares of the image's side."""

    present: torch.Tensor  # [B, F] in [0, 1]
    shape: torch.Tensor  # [B, F, S] probabilities
    colour: torch.Tensor  # [B, F, K] probabilities
    place: torch.Tensor  # [B, F, 2]
    radius: torch.Tensor  # [B, F]
    count: torch.Tensor  # [B, F] objects, this one and others
    quality: torch.Tensor  # [B, F] in [0, 1], of the frames
    path: torch.Tensor  # [B, 2] from the first frame to the last, along the fitted line


def follow(clips: torch.Tensor) -> Track:
    """Return the Track of clips [B, F, 3, H, W] in [0, 1], with H = W and F >= 3."""
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
    """Fit a line at constant speed to places [B, F, 2] by least squares.

    weight [B, F]: that of each frame. Returns the fitted places [B, F, 2], and the vector [B, 2]
    from the first to the last.
    """
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
    """Return how steadily an object is present, unchanged and moving, [B] in [0, 1]."""
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
    """Return alignment [B] and passed [B], the latter without regard to quality or smoothness."""
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
    """Return the scores of `verify`, each [B], for the Track of B clips and their captions."""
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
    """Return the scores {"quality", "smooth", "alignment", "score", "passed"}, each [B].

    "passed" is bool, the others are float32 in [0, 1].
    clips: [B, F, 3, H, W] in [0, 1]; captions: B strings. Raises ValueError for a caption that is
    not in the grammar.
    """
    assert len(captions) == len(clips), f"{len(clips)} clips, {len(captions)} captions"
    for caption in captions:
        parse(caption)  # before the work
    return judge(follow(clips), captions)


@functools.lru_cache(maxsize=1)  # the parts of one batch are asked for one after another
def _verify_once(clips: torch.Tensor, captions: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return verify(clips, captions)


class Motion:
    """Score clips by the motion verifier's `score`, in [0, 1].

    Tests check it against the renderer (tests/test_motion.py).
    """

    part = "score"
    video, image = True, False
    # standard deviation within groups of clean renders with 30% of the attributes wrong: 0.26
    scale = 0.25
    range = (0.0, 1.0)

    def check(self, prompts: Iterable[str]) -> None:
        """Raise ValueError for the first prompt that the verifier cannot read."""
        for prompt in prompts:
            parse(prompt)

    @torch.no_grad()
    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of clips [b, F, 3, H, W] in [0, 1] of F >= 3 frames.

        prompts: b strings. Raises ValueError for images.
        """
        if media.dim() != 5:
            raise ValueError(
                "the motion reward scores clips [b, F, C, H, W], not media of shape "
                f"{list(media.shape)}"
            )
        return _verify_once(media, tuple(prompts))[self.part]


class MotionQuality(Motion):
    """Score clips by the motion verifier's `quality`, whatever moves."""

    part = "quality"


class MotionSmooth(Motion):
    """Score clips by the motion verifier's `smooth`: quality and smoothness without the caption."""

    part = "smooth"
