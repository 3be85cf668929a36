"""Draw scenes of the shapes world, and parse their captions. Needs torch alone.

This file and verifier.py can be copied into other projects.
"""

import functools
import re
from dataclasses import dataclass

import torch

BACKGROUND = (0.94, 0.94, 0.92)
COLOURS = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.15, 0.35, 0.90),
    "yellow": (0.96, 0.78, 0.10),
    "black": (0.10, 0.10, 0.12),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}  # (x, y) of the first, y down
TASKS = ("single", "two", "counting", "colours", "position", "attribution", "vague")

MAX_WANTED = 4  # objects that a caption can name
ANY = -1  # a shape or colour that is left open


# --- Drawing ---


def coverage(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return the share of each pixel that each shape covers, [S, ...] in [0, 1].

    S is in the order of SHAPES, and edges are antialiased over one pixel. dx, dy: pixel position
    minus the shape's centroid, [...]; radius in pixels, broadcastable. A shape of radius r has the
    area of a circle of radius r.
    """
    ax, ay = dx.abs(), dy.abs()
    distance_from_centre = torch.sqrt(dx**2 + dy**2)
    half_square, inradius, half_cross = 0.8862 * radius, 0.7776 * radius, 1.189 * radius
    circle = distance_from_centre - radius
    square = torch.maximum(ax, ay) - half_square
    triangle = torch.maximum(dy, 0.8660 * ax - 0.5 * dy) - inradius  # point upwards
    bar, beam = (
        torch.maximum(ax - half_cross, ay - half_cross / 3),
        torch.maximum(ax - half_cross / 3, ay - half_cross),
    )
    signed_distance = torch.stack([circle, square, triangle, torch.minimum(bar, beam)])
    return (0.5 - signed_distance).clamp(0, 1)


def pixel_grid(size: int, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centres x and y of the pixels of a square image, each [H, W]."""
    axis = torch.arange(size, dtype=torch.float32, device=device) + 0.5
    return axis[None, :].expand(size, size), axis[:, None].expand(size, size)


def draw(
    shape: torch.Tensor,
    colour: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    radius: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Return images [B, 3, H, W] in [0, 1] of B scenes with up to N objects.

    shape, colour: indices [B, N], where shape ANY is no object; x, y, radius: pixels [B, N].
    """
    px, py = pixel_grid(size, x.device)
    covers = coverage(
        px - x[..., None, None], py - y[..., None, None], radius[..., None, None]
    )  # [S, B, N, H, W]
    return paint(covers, shape, colour)


def paint(covers: torch.Tensor, shape: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Return images [B, 3, H, W] with each object's colour on its pixels.

    covers: [S, B, N, H, W]; shape, colour: indices [B, N].
    """
    index = shape.clamp(min=0)[None, :, :, None, None].expand(1, *covers.shape[1:])
    cover = covers.gather(0, index)[0] * (shape >= 0)[..., None, None]  # [B, N, H, W]
    ink = palette(cover.device)[colour.clamp(min=0)] - background(cover.device)  # [B, N, 3]
    return (
        background(cover.device)[:, None, None] + torch.einsum("bnhw,bnc->bchw", cover, ink)
    ).clamp(0, 1)


def palette(device: torch.device | None = None) -> torch.Tensor:
    """Return the colours, [K, 3] in [0, 1], in the order of COLOURS."""
    return torch.tensor(list(COLOURS.values()), device=device)


def background(device: torch.device | None = None) -> torch.Tensor:
    """Return the colour of the background, [3] in [0, 1]."""
    return torch.tensor(BACKGROUND, device=device)


# --- Captions ---


@dataclass(frozen=True)
class Wanted:
    """Hold what a caption asks for: (shape, colour) of each object, and perhaps a relation.

    The relation is that of the first object to the second. ANY marks an attribute that the caption
    leaves open.
    """

    task: str
    objects: tuple[tuple[int, int], ...]
    relation: tuple[int, int] | None = None


PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in (*SHAPES, "shape")}
_SHAPE, _COLOUR = "|".join(SHAPES), "|".join(COLOURS)
_OBJECT = rf"an? (?:({_COLOUR}) )?({_SHAPE}|shape)"
_GRAMMAR = [
    (re.compile(rf"{_OBJECT} ({'|'.join(RELATIONS)}) {_OBJECT}"), "position"),
    (re.compile(rf"{_OBJECT} and {_OBJECT}"), "pair"),
    (
        re.compile(rf"({'|'.join(NUMBERS)}) (?:({_COLOUR}) )?({'|'.join(PLURALS.values())})"),
        "counting",
    ),
    (re.compile(_OBJECT), "one"),
    (re.compile(rf"something ({_COLOUR})"), "something"),
]


@functools.lru_cache(maxsize=100_000)
def parse(caption: str) -> Wanted:
    """Return what a caption asks for. Raises ValueError, with the grammar, for other captions."""
    text = " ".join(caption.lower().split()).removesuffix(".").strip()
    for pattern, kind in _GRAMMAR:
        if match := pattern.fullmatch(text):
            return _wanted(kind, match.groups())
    raise ValueError(
        f"the shapes world has no caption {caption[:80]!r}; it knows 'a [COLOUR] SHAPE', 'a "
        "[COLOUR] SHAPE and a [COLOUR] SHAPE', 'a [COLOUR] SHAPE left of|right of|above|below a "
        "[COLOUR] SHAPE', 'two|three|four [COLOUR] SHAPEs', 'something COLOUR', with SHAPE "
        f"{', '.join(SHAPES)} or shape and COLOUR {', '.join(COLOURS)}"
    )


def _wanted(kind: str, groups: tuple[str | None, ...]) -> Wanted:
    def thing(colour: str | None, shape: str | None) -> tuple[int, int]:
        return (
            ANY if shape in (None, "shape") else SHAPES.index(shape),
            ANY if colour is None else list(COLOURS).index(colour),
        )

    if kind == "position":
        return Wanted("position", (thing(*groups[:2]), thing(*groups[3:])), RELATIONS[groups[2]])
    if kind == "pair":
        objects = (thing(*groups[:2]), thing(*groups[2:]))
        return Wanted(
            "two" if all(colour == ANY for _, colour in objects) else "attribution", objects
        )
    if kind == "counting":
        shape = next(shape for shape, plural in PLURALS.items() if plural == groups[2])
        return Wanted(
            "vague" if shape == "shape" else "counting",
            (thing(groups[1], shape),) * NUMBERS[groups[0]],
        )
    if kind == "something":
        return Wanted("vague", (thing(groups[0], None),))
    shape, colour = thing(*groups)
    return Wanted(
        "vague" if shape == ANY else "single" if colour == ANY else "colours", ((shape, colour),)
    )
