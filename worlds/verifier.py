"""Verify images of the shapes world exactly: read the scene and compare it with the caption.

The method is GenEval's, a detector and then rules. The detector is exact, because the world is
simple:

    segment     a pixel is foreground if a palette colour covers more than half of it; connected
                pixels are an object
    measure     area, centroid and colour of each object come from the coverage of its pixels
    classify    the shape is found by overlap with each shape drawn at that place and size, the
                colour by distance to the palette
    re-draw     the scene is drawn again from these values; the difference to the image (blur,
                noise) lowers `quality`
    compare     objects are assigned to the words of the caption; the best assignment counts

All scores but `passed` are in [0, 1]:

    quality     whether the image looks like a drawing of shapes
    layout      quality * whether number and places of objects match the caption, whatever they are
    alignment   the share of the caption's words that hold: shapes, colours, number, relation
    score       quality * alignment
    passed      whether every word of the caption holds, with quality above 0.5

This file and scene.py, which draws scenes and reads captions, need torch alone. They can be copied
into other projects.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from worlds.scene import (
    ANY,
    MAX_WANTED,
    Wanted,
    background,
    coverage,
    paint,
    palette,
    parse,
    pixel_grid,
)

MAX_READ = 6  # objects that are looked at closely; more are only counted
MIN_AREA, MAX_RADIUS = (
    8.0,
    8.0,
)  # pixels; a smaller speck or a larger field is no object, it only lowers the score
MAX_AREA = (
    150.0  # pixels that the objects of a scene cover at most; more is noise and buys no tolerance
)

# --- Reading an image ---


@dataclass
class Reading:
    """Hold the objects of B images, the largest first.

    All fields are [B, N, ...], but `count` and `quality` are [B].
    """

    present: torch.Tensor  # [B, N] in [0, 1]
    shape: torch.Tensor  # [B, N, S] probabilities
    colour: torch.Tensor  # [B, N, K] probabilities
    x: torch.Tensor  # [B, N] pixels
    y: torch.Tensor
    radius: torch.Tensor
    count: torch.Tensor  # [B] objects, the doubtful ones by degrees
    quality: torch.Tensor  # [B] in [0, 1]


def segment(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coverage of each pixel of images [B, 3, H, W], and its component.

    The coverage [B, H, W] float is the share that the nearest palette colour covers. The component
    [B, H, W] int is a label, 0 for the background.
    """
    ink = palette(images.device) - background(images.device)  # [K, 3]
    offset = images.movedim(1, -1) - background(images.device)  # [B, H, W, 3]
    cover = (offset @ ink.T / ink.square().sum(-1)).clamp(0, 1)  # [B, H, W, K]
    # |offset - cover * ink|^2 without the [B, H, W, K, 3] tensor
    residual = (
        offset.square().sum(-1, keepdim=True)
        - 2 * cover * (offset @ ink.T)
        + cover.square() * ink.square().sum(-1)
    )
    cover = cover.gather(-1, residual.argmin(-1, keepdim=True))[..., 0]

    mask = cover > 0.5
    labels = (
        torch.arange(1, mask[0].numel() + 1, device=images.device, dtype=torch.float32).view(
            1, *mask.shape[1:]
        )
        * mask
    )
    while True:  # the largest label floods its component; a handful of rounds for convex shapes
        spread = F.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, labels):
            return cover, labels.long()
        labels = spread


def read(images: torch.Tensor) -> Reading:
    """Return the objects of images [B, 3, H, W] in [0, 1], H = W.

    The docstring of the file explains the steps.
    """
    b, c, h, w = images.shape
    assert c == 3 and h == w, f"expected square RGB images [B, 3, H, W], got {tuple(images.shape)}"
    images = images.float().clamp(0, 1)
    cover, labels = segment(images)

    # the N largest components
    area = torch.zeros(b, h * w + 1, device=images.device).scatter_add_(
        1, labels.flatten(1), (labels > 0).float().flatten(1)
    )
    count = _large_enough(area).sum(1)
    area, ids = area.topk(MAX_READ, dim=1)  # [B, N]
    mine = (
        (labels[:, None] == ids[..., None, None]) & (area > 0)[..., None, None]
    ).float()  # [B, N, H, W]
    # a pixel further out belongs to it too: the antialiased rim
    rim = F.max_pool2d(mine, 3, stride=1, padding=1) * (labels == 0)[:, None]
    cover = cover[:, None] * (mine + rim).clamp(max=1)

    # measure
    px, py = pixel_grid(h, images.device)
    weight = cover.sum((2, 3)).clamp(min=1e-6)
    x, y = (cover * px).sum((2, 3)) / weight, (cover * py).sum((2, 3)) / weight
    radius = (weight / torch.pi).sqrt()
    core = cover.square()
    mean_colour = (
        torch.einsum("bnhw,bchw->bnc", core, images) / core.sum((2, 3)).clamp(min=1e-6)[..., None]
    )
    full = (core * cover).sum((2, 3)) / core.sum((2, 3)).clamp(
        min=1e-6
    )  # undo the share of background in that mean
    back = background(images.device)
    mean_colour = back + (mean_colour - back) / full.clamp(min=0.1)[..., None]

    # classify
    drawn = coverage(
        px - x[..., None, None], py - y[..., None, None], radius[..., None, None]
    )  # [S, B, N, H, W]
    overlap = torch.minimum(drawn, cover).sum((-2, -1)) / torch.maximum(drawn, cover).sum(
        (-2, -1)
    ).clamp(min=1e-6)
    shape = (overlap / 0.03).softmax(0).movedim(0, -1)  # [B, N, S]
    distance = (mean_colour[:, :, None] - palette(images.device)).square().sum(-1)  # [B, N, K]
    colour = (-distance / 0.03).softmax(-1)

    # re-draw with the likeliest attributes; what stays unexplained, in object areas, costs quality
    present = _large_enough(area) * (MAX_RADIUS + 1 - radius).clamp(0, 1)
    best = torch.where(present > 0, shape.argmax(-1), ANY)
    error = (images - paint(drawn, best, colour.argmax(-1))).square().sum((1, 2, 3))
    quality = torch.exp(
        -error / (0.5 * weight.mul(present).sum(1).clamp(MIN_AREA, MAX_AREA))
    ) * present.amax(1)
    return Reading(present, shape, colour, x, y, radius, count, quality)


def _large_enough(area: torch.Tensor) -> torch.Tensor:
    """Return 0 to 1 for areas in pixels, rising from half of MIN_AREA to MIN_AREA."""
    return (area / (MIN_AREA / 2) - 1).clamp(0, 1)


# --- Comparing with captions ---


@functools.lru_cache(maxsize=1)
def _assignments() -> torch.Tensor:
    """Return all ordered choices of MAX_WANTED of MAX_READ objects, [A, MAX_WANTED]."""
    return torch.tensor(list(itertools.permutations(range(MAX_READ), MAX_WANTED)))


def _choose(
    reading: Reading, wanted: list[Wanted], identity: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return score [B] and pass [B] of the best assignment of objects to the caption's objects.

    Without `identity` shape and colour are ignored.
    """
    b, device = len(wanted), reading.x.device
    want = torch.full((b, MAX_WANTED, 2), ANY)
    relation = torch.zeros(b, 2)
    for row, w in enumerate(wanted):
        want[row, : len(w.objects)] = torch.tensor(w.objects)
        relation[row] = torch.tensor(w.relation or (0, 0))
    want, relation = want.to(device), relation.to(device)
    number = torch.tensor([len(w.objects) for w in wanted], device=device)
    asked = (torch.arange(MAX_WANTED, device=device) < number[:, None]).float()  # [B, R]

    named = ((want != ANY) & identity)[
        :, :, None
    ].float()  # [B, R, 1, 2], 1 where a wish names the shape, the colour
    chance = [
        probability.gather(
            2, want[..., k].clamp(min=0)[:, None].expand(b, MAX_READ, MAX_WANTED)
        ).transpose(1, 2)
        for k, probability in enumerate((reading.shape, reading.colour))
    ]
    chance = (
        torch.where(named > 0, torch.stack(chance, dim=-1), 1.0) * reading.present[:, None, :, None]
    )  # [B, R, N, 2]
    every = chance.amin(-1)  # all that the wish names: what passing takes
    share = torch.where(
        named.sum(-1) > 0, (chance * named).sum(-1) / named.sum(-1).clamp(min=1), every
    )  # partial credit

    choice = _assignments().to(device)
    share, every = (
        torch.stack([m[:, r][:, choice[:, r]] for r in range(MAX_WANTED)], dim=2)
        for m in (share, every)
    )
    dx = reading.x[:, choice[:, 0]] - reading.x[:, choice[:, 1]]  # [B, A]
    dy = reading.y[:, choice[:, 0]] - reading.y[:, choice[:, 1]]
    along = dx * relation[:, :1] + dy * relation[:, 1:]
    across = torch.where(relation[:, :1] != 0, dy.abs(), dx.abs())
    holds = torch.sigmoid(along - across)  # one pixel is the scale
    holds = torch.where((relation == 0).all(1, keepdim=True), 1.0, holds)

    right_number = torch.minimum(reading.count, number) / torch.maximum(
        reading.count, number
    ).clamp(min=1)
    total = (share * asked[:, None]).sum(2) / number[:, None] * (0.5 + 0.5 * holds)  # [B, A]
    passed = (
        ((every > 0.5) | (asked[:, None] == 0)).all(2)
        & (holds > 0.5)
        & (reading.count.round() == number)[:, None]
    )
    return total.amax(1) * right_number, passed.any(1)


def verify(images: torch.Tensor, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the scores {"quality", "layout", "alignment", "score", "passed"}, each [B].

    "passed" is bool, the others are float32 in [0, 1].
    images: [B, 3, H, W] in [0, 1]; captions: B strings. Raises ValueError for a caption that is not
    in the grammar.
    """
    assert len(captions) == len(images), f"{len(images)} images, {len(captions)} captions"
    wanted = [parse(caption) for caption in captions]
    reading = read(images)
    layout, _ = _choose(reading, wanted, identity=False)
    alignment, passed = _choose(reading, wanted, identity=True)
    return {
        "quality": reading.quality,
        "layout": reading.quality * layout,
        "alignment": alignment,
        "score": reading.quality * alignment,
        "passed": passed & (reading.quality > 0.5),
    }


@functools.lru_cache(maxsize=1)  # the parts of one batch are asked for one after another
def _verify_once(images: torch.Tensor, captions: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return verify(images, captions)


class Verifier:
    """Score images by the verifier's `score`, in [0, 1].

    Tests check it against the renderer (tests/test_verifier.py).
    """

    part = "score"
    video = False
    scale = 0.25  # typical standard deviation within a group of tiny-flux samples
    range = (0.0, 1.0)

    def check(self, prompts: Iterable[str]) -> None:
        """Raise ValueError for the first prompt that the verifier cannot read."""
        for prompt in prompts:
            parse(prompt)

    @torch.no_grad()
    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, H, W] in [0, 1] with b prompts."""
        return _verify_once(media, tuple(prompts))[self.part]


class Quality(Verifier):
    """Score images by the verifier's `quality`, without the caption."""

    part = "quality"
    scale = 0.11


class Layout(Verifier):
    """Score images by the verifier's `layout`: quality, number and places of objects."""

    part = "layout"


class Passed(Verifier):
    """Score images by the verifier's `passed`, 1 or 0, as GenEval counts for its table of tasks."""

    part = "passed"
    scale = 0.4

    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return 1 or 0 for each of media [b, 3, H, W] in [0, 1] with b prompts, [b] float32."""
        return super().score(media, prompts).float()
