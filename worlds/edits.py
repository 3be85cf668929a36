"""The edit world: scenes of shapes, an instruction for each, and an exact verifier of the result.

    make the red circle blue        the colour of one object changes
    make the square a cross         its shape changes
    remove the green triangle       it disappears
    add a blue cross above it       a new object; "it" is the only one, else "the [COLOUR] SHAPE"

The verifier reads the source and the sample (worlds/verifier.py). An object of the source is
unique by its shape, so the instruction decides what each object must be in the result:

    quality     whether the sample looks like a drawing of shapes
    rest        quality * how much of what the instruction does not name stayed as it was: place,
                size, shape and colour of each object, and the number of objects
    asked       how much of the asked change was made
    score       rest * asked: both count, so neither a copy of the source nor a new scene scores
    passed      whether the change was made and all else stayed, with quality above 0.5

`python -m worlds.edits` writes the prompt files and source images of assets/prompts.
"""

import functools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from worlds.scene import ANY, COLOURS, RELATIONS, SHAPES
from worlds.shapes import MAX_WANTED, Scenes, _fits, render
from worlds.verifier import MAX_READ, Reading, read

COLOUR_NAMES = tuple(COLOURS)
SIZE = 32
TASKS = ("colour", "shape", "remove", "add")
STEADY = 2.0  # pixels: at twice this distance from its place an object counts as another one

# --- Instructions ---


@dataclass(frozen=True)
class Edit:
    """Hold what an instruction asks for.

    task: one of TASKS. shape, colour: of the object that it names, ANY if they are not named; with
    "add" it is the one beside which the new object is. new_shape, new_colour: what it asks for.
    relation: of a new object to the named one.
    """

    task: str
    shape: int
    colour: int
    new_shape: int = ANY
    new_colour: int = ANY
    relation: tuple[int, int] | None = None


_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_NAMED = rf"the (?:({_COLOUR}) )?({_SHAPE})"
_GRAMMAR = {
    "colour": re.compile(rf"make {_NAMED} ({_COLOUR})"),
    "shape": re.compile(rf"make {_NAMED} an? ({_SHAPE})"),
    "remove": re.compile(rf"remove {_NAMED}"),
    "add": re.compile(rf"add an? ({_COLOUR}) ({_SHAPE}) ({'|'.join(RELATIONS)}) (?:it|{_NAMED})"),
}


@functools.lru_cache(maxsize=100_000)
def parse(instruction: str) -> Edit:
    """Return what an instruction asks for. Raises ValueError, with the grammar, for others."""
    text = " ".join(instruction.lower().split()).removesuffix(".").strip()
    for task, pattern in _GRAMMAR.items():
        if match := pattern.fullmatch(text):
            return _edit(task, match.groups())
    raise ValueError(
        f"the edit world has no instruction {instruction[:80]!r}; it knows 'make the [COLOUR] "
        "SHAPE COLOUR', 'make the [COLOUR] SHAPE a SHAPE', 'remove the [COLOUR] SHAPE' and 'add a "
        "COLOUR SHAPE left of|right of|above|below it|the [COLOUR] SHAPE', with SHAPE "
        f"{', '.join(SHAPES)} and COLOUR {', '.join(COLOURS)}"
    )


def _edit(task: str, groups: tuple[str | None, ...]) -> Edit:
    def index(names: Sequence[str], word: str | None) -> int:
        return ANY if word is None else list(names).index(word)

    if task == "add":
        colour, shape, relation, named_colour, named_shape = groups
        named = index(SHAPES, named_shape), index(COLOURS, named_colour)
        new = index(SHAPES, shape), index(COLOURS, colour)
        return Edit(task, *named, *new, RELATIONS[relation])
    named = index(SHAPES, groups[1]), index(COLOURS, groups[0])
    if task == "colour":
        return Edit(task, *named, new_colour=index(COLOURS, groups[2]))
    if task == "shape":
        return Edit(task, *named, new_shape=index(SHAPES, groups[2]))
    return Edit(task, *named)


def write(edit: Edit) -> str:
    """Return the instruction of an Edit: the inverse of `parse`."""
    colour = f"{COLOUR_NAMES[edit.colour]} " if edit.colour != ANY else ""
    named = f"the {colour}{SHAPES[edit.shape]}" if edit.shape != ANY else "it"
    if edit.task == "colour":
        return f"make {named} {COLOUR_NAMES[edit.new_colour]}"
    if edit.task == "shape":
        return f"make {named} a {SHAPES[edit.new_shape]}"
    if edit.task == "remove":
        return f"remove {named}"
    relation = next(name for name, axis in RELATIONS.items() if axis == edit.relation)
    return f"add a {COLOUR_NAMES[edit.new_colour]} {SHAPES[edit.new_shape]} {relation} {named}"


def corrupt(edit: Edit, shapes: Sequence[int], probability: float, rng: random.Random) -> Edit:
    """Return the edit with each of its attributes wrong with `probability`.

    shapes: those of the objects in the source; another of them may be named.
    """

    def other(value: int, options: Iterable[int], taken: Iterable[int] = ()) -> int:
        options = [option for option in options if option != value and option not in taken]
        if value in (ANY, None) or not options or rng.random() >= probability:
            return value
        return rng.choice(options)

    shape = other(edit.shape, shapes, taken=[edit.new_shape])
    return replace(
        edit,
        shape=shape,
        colour=edit.colour if shape == edit.shape else ANY,
        new_shape=other(edit.new_shape, range(len(SHAPES)), taken=[*shapes, shape]),
        new_colour=other(edit.new_colour, range(len(COLOURS))),
        relation=other(edit.relation, RELATIONS.values()),
    )


# --- Scenes ---


def sample(
    number: int, seed: int, careless: float = 0.0
) -> tuple[list[Edit], list[list[int]], Scenes, Scenes]:
    """Return edits, the shapes of each source's objects, sources, and results.

    The result of an edit differs from its source by what is asked. careless: the probability that
    one more object of it has another colour.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    edits, shapes, counts, values = [], [], [], torch.zeros(2, 2, number, MAX_WANTED)
    relation = torch.zeros(number, 2)
    for row in range(number):
        task = rng.choice(TASKS)
        old = rng.choice((1, 2)) if task == "add" else rng.choice((2, 3))
        chosen = rng.sample(range(len(SHAPES)), old + 1)
        colours = rng.choices(range(len(COLOURS)), k=old + 1)
        shape, colour = chosen[0], colours[0]
        another = rng.choice([c for c in range(len(COLOURS)) if c != colour])
        named = Edit(task, shape, colour if rng.random() < 0.5 else ANY)
        new = {
            "colour": dict(new_colour=another),
            "shape": dict(new_shape=chosen[old]),
            "remove": {},
            "add": dict(
                new_shape=chosen[old],
                new_colour=colours[old],
                relation=rng.choice(list(RELATIONS.values())),
            ),
        }[task]
        if task == "add" and old == 1 and rng.random() < 0.5:
            named = Edit(task, ANY, ANY)  # "it"
        edit = replace(named, **new)
        # the named object is the second of a relation, as `_fits` counts them
        order = [old, *range(old)] if task == "add" else [*range(old)]
        for place, thing in enumerate(order):
            values[:, 0, row, place] = chosen[thing]
            values[:, 1, row, place] = colours[thing]
        if task == "add":
            values[0, 0, row, 0] = ANY
            relation[row] = torch.tensor(edit.relation, dtype=torch.float32)
        elif task == "remove":
            values[1, 0, row, 0] = ANY
        else:
            kind, value = (0, chosen[old]) if task == "shape" else (1, another)
            values[1, kind, row, 0] = value
        values[:, 0, row, len(order) :] = ANY
        last = len(order) - 1  # never the object that changes
        if rng.random() < careless:
            own = int(values[1, 1, row, last])
            values[1, 1, row, last] = rng.choice([c for c in range(len(COLOURS)) if c != own])
        edits.append(edit)
        shapes.append(chosen[:old])
        counts.append(len(order))
    places = _places(torch.tensor(counts), relation, generator)
    before, after = (Scenes(*values[k].long(), *places) for k in (0, 1))
    return edits, shapes, before, after


def _places(
    counts: torch.Tensor, relation: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Return x, y and radius [B, MAX_WANTED] of objects that do not touch.

    counts [B]: objects; relation [B, 2]: of the first to the second, 0 for none.
    """
    exists = torch.arange(MAX_WANTED) < counts[:, None]
    x, y, radius = torch.zeros(3, len(counts), MAX_WANTED)
    todo = torch.arange(len(counts))
    while len(todo):  # rejection: draw all that are still wrong again
        r, px, py = torch.rand(3, len(todo), MAX_WANTED, generator=generator)
        r = 3.7 + 1.0 * r
        reach = 1.3 * r + 0.5
        px, py = (reach + (SIZE - 2 * reach) * p for p in (px, py))
        x[todo], y[todo], radius[todo] = px, py, r
        todo = todo[~_fits(px, py, r, exists[todo], relation[todo])]
    return x, y, radius


# --- Verifier ---


def verify(
    images: torch.Tensor, instructions: Sequence[str], sources: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the scores {"quality", "rest", "asked", "score", "passed"}, each [B].

    "passed" is bool, the others are float32 in [0, 1]. images, sources: [B, 3, H, W] in [0, 1].
    Raises ValueError for an instruction that is not in the grammar, or that names an object that
    its source does not have.
    """
    b = len(images)
    assert len(instructions) == len(sources) == b
    edits = [parse(text) for text in instructions]
    source, found = read(sources), read(images)
    named = torch.tensor([_named(source, row, edit) for row, edit in enumerate(edits)])
    named = named.to(images.device)
    rows = torch.arange(b, device=images.device)
    is_add, is_remove, has_it = (
        torch.tensor(flags, device=images.device)
        for flags in (
            [edit.task == "add" for edit in edits],
            [edit.task == "remove" for edit in edits],
            [edit.task in ("colour", "shape") for edit in edits],
        )
    )

    there = source.present > 0.5  # [B, N]
    shape, colour = source.shape.argmax(-1), source.colour.argmax(-1)  # [B, N]
    is_named = torch.arange(MAX_READ, device=images.device) == named[:, None]
    stays = there & (~is_named | is_add[:, None])

    # [B, N of the source, N of the sample]: at the same place, and of the same size
    near = _near(source, found) * found.present[:, None]
    alike = near * _chance(found.shape, shape) * _chance(found.colour, colour)
    kept = alike.amax(2)  # [B, N]
    wanted = stays.sum(1) + (is_add | has_it)
    number = torch.minimum(found.count, wanted) / torch.maximum(found.count, wanted).clamp(min=1)
    share = (kept * stays).sum(1) / stays.sum(1).clamp(min=1)
    share = torch.where(stays.any(1), share, 1.0)

    # the change that was asked for
    new_shape, new_colour = (
        torch.tensor([getattr(edit, name) for edit in edits], device=images.device)
        for name in ("new_shape", "new_colour")
    )
    want_shape = torch.where(new_shape == ANY, shape[rows, named], new_shape)
    want_colour = torch.where(new_colour == ANY, colour[rows, named], new_colour)
    right = _chance(found.shape, want_shape[:, None]) * _chance(found.colour, want_colour[:, None])
    right = right[:, 0] * found.present  # [B, N]
    changed = (near[rows, named] * right).amax(1)
    removed = 1 - near[rows, named].amax(1)
    free = 1 - (near * stays[..., None]).amax(1)  # [B, N]: not one of those that stay
    beside = _beside(source, found, named, edits)
    added = (right * free * beside).amax(1)
    asked = torch.where(is_add, added, torch.where(is_remove, removed, changed))

    rest = found.quality * share * number
    kept_all = ((kept > 0.5) | ~stays).all(1)
    passed = (asked > 0.5) & kept_all & (found.count.round() == wanted) & (found.quality > 0.5)
    return {
        "quality": found.quality,
        "rest": rest,
        "asked": asked,
        "score": rest * asked,
        "passed": passed,
    }


def _named(source: Reading, row: int, edit: Edit) -> int:
    """Return the number of the object of a source that an edit names. Raises ValueError."""
    there = source.present[row] > 0.5
    fits = there & (edit.shape == ANY) | there & (source.shape[row].argmax(-1) == edit.shape)
    if edit.colour != ANY:
        fits &= source.colour[row].argmax(-1) == edit.colour
    if fits.sum() != 1:
        raise ValueError(f"{write(edit)!r} names {int(fits.sum())} objects of its source, not one")
    return int(fits.nonzero())


def _near(source: Reading, found: Reading) -> torch.Tensor:
    """Return how nearly objects have the same place and size, [B, N source, N found] in [0, 1].

    One pixel, and half a pixel of the radius, are as good as none.
    """
    dx = source.x[:, :, None] - found.x[:, None]
    dy = source.y[:, :, None] - found.y[:, None]
    away = (torch.sqrt(dx**2 + dy**2) - 1).clamp(min=0) / STEADY
    other_size = ((source.radius[:, :, None] - found.radius[:, None]).abs() - 0.5).clamp(min=0)
    return torch.exp(-(away**2) - other_size**2)


def _chance(probability: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the probability [B, M, N] that object N is what M wants.

    probability [B, N, K] of N objects; wanted [B, M] indices.
    """
    index = wanted.clamp(min=0)[:, :, None].expand(-1, -1, probability.shape[1])
    return probability.mT.gather(1, index)


def _beside(
    source: Reading, found: Reading, named: torch.Tensor, edits: list[Edit]
) -> torch.Tensor:
    """Return how clearly objects [B, N] stand in the relation of an edit to the named object."""
    relation = torch.tensor([edit.relation or (0, 0) for edit in edits], device=found.x.device)
    rows = torch.arange(len(edits), device=found.x.device)
    dx = found.x - source.x[rows, named][:, None]
    dy = found.y - source.y[rows, named][:, None]
    along = dx * relation[:, :1] + dy * relation[:, 1:]
    across = torch.where(relation[:, :1] != 0, dy.abs(), dx.abs())
    return torch.sigmoid(along - across)  # one pixel is the scale


@functools.lru_cache(maxsize=1)  # the parts of one batch are asked for one after another
def _verify_once(
    images: torch.Tensor, instructions: tuple[str, ...], sources: "_Same"
) -> dict[str, torch.Tensor]:
    return verify(images, instructions, sources.tensor)


class _Same:
    """Hold a tensor that is equal to another one with the same values, for a cache."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __hash__(self) -> int:
        return hash(self.tensor.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and torch.equal(self.tensor, other.tensor)


class EditVerifier:
    """Score edited images by the edit verifier's `score`, in [0, 1].

    Tests check it against the renderer (tests/test_edits.py).
    """

    part = "score"
    video = False
    scale = 0.25  # typical standard deviation within a group of tiny-edit samples
    range = (0.0, 1.0)
    fields = ("source",)

    def check(self, prompts: Iterable[str]) -> None:
        """Raise ValueError for the first prompt that the verifier cannot read."""
        for prompt in prompts:
            parse(prompt)

    @torch.no_grad()
    def score(
        self, media: torch.Tensor, prompts: Sequence[str], source: torch.Tensor
    ) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, H, W] and source [b, N, 3, H, W]."""
        sources = source[:, 0].to(media.device)
        return _verify_once(media, tuple(prompts), _Same(sources))[self.part].float()


class EditQuality(EditVerifier):
    """Score by `quality`, whatever was asked."""

    part = "quality"


class EditRest(EditVerifier):
    """Score by `rest`: what the instruction does not name stayed as it was."""

    part = "rest"


class EditPassed(EditVerifier):
    """Score by `passed`, 1 or 0."""

    part = "passed"
    scale = 0.4


# --- Prompt files ---

TRAINED, HELD_OUT = 256, 128


def main(folder: str = "assets/prompts", seed: int = 0) -> None:
    """Write the prompt files, lines IMAGE <tab> INSTRUCTION, and the source images."""
    path = Path(folder)
    (path / "edit_sources").mkdir(parents=True, exist_ok=True)
    edits, _, before, _ = sample(TRAINED + HELD_OUT, seed)
    lines = []
    for number, (edit, image) in enumerate(zip(edits, render(before))):
        lines.append(f"edit_sources/{number:04d}.png\t{write(edit)}")
        pixels = (image * 255).round().byte().movedim(0, -1).numpy()  # [H, W, 3]
        Image.fromarray(pixels).save(path / lines[-1].partition("\t")[0])
    files = {"edits.txt": lines[:TRAINED], "edits_heldout.txt": lines[TRAINED:]}
    for name, of_file in files.items():
        (path / name).write_text("\n".join(of_file) + "\n", encoding="utf-8")
        print(f"{path / name}: {len(of_file)} lines")


if __name__ == "__main__":
    main()
