"""Generate the shapes world: captions, and scenes that show them or do not.

    captions()        every caption of the grammar, by task
    sample_scenes     captions -> random scenes that show them, all at once
    render            scenes -> images
    corrupt           a caption with each attribute replaced with some probability, for the training
                      of the base models
    change_one        a caption that differs in exactly one attribute, which the verifier must
                      reject

worlds/scene.py draws scenes and reads captions, worlds/verifier.py reads images. Everything is
seeded.
"""

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from worlds.scene import (
    ANY,
    COLOURS,
    MAX_WANTED,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    TASKS,
    draw,
    parse,
)

SIZE = 32
COLOUR_NAMES = tuple(COLOURS)


# --- Captions ---


def captions():
    """Return every caption of the world, {task: [caption, ...]}, in a fixed order."""
    coloured = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    pairs = list(itertools.permutations(SHAPES, 2))
    return {
        "single": [f"a {shape}" for shape in SHAPES],
        "two": [f"a {first} and a {second}" for first, second in pairs],
        "counting": [f"{n} {PLURALS[s]}" for n in NUMBERS for s in SHAPES]
        + [f"{n} {c} {PLURALS[s]}" for n in NUMBERS for c in COLOURS for s in SHAPES],
        "colours": coloured,
        "position": [
            f"a {first} {relation} a {second}" for first, second in pairs for relation in RELATIONS
        ],
        "attribution": [
            f"a {c1} {s1} and a {c2} {s2}"
            for s1, s2 in pairs
            for c1, c2 in itertools.permutations(COLOURS, 2)
        ],
        "vague": ["a shape"]
        + [f"something {c}" for c in COLOURS]
        + [f"{n} shapes" for n in NUMBERS],
    }


def write(wanted):
    """Return the caption of a Wanted: the inverse of `parse`."""

    def thing(shape, colour):
        if shape == ANY and colour != ANY:
            return f"something {COLOUR_NAMES[colour]}"
        return (
            "a "
            + (f"{COLOUR_NAMES[colour]} " if colour != ANY else "")
            + ("shape" if shape == ANY else SHAPES[shape])
        )

    objects = wanted.objects
    if wanted.relation:
        name = next(name for name, axis in RELATIONS.items() if axis == wanted.relation)
        return f"{thing(*objects[0])} {name} {thing(*objects[1])}"
    if len(objects) == 1:
        return thing(*objects[0])
    if len(set(objects)) == 1:
        (shape, colour), number = (
            objects[0],
            next(name for name, n in NUMBERS.items() if n == len(objects)),
        )
        return (
            f"{number} "
            + (f"{COLOUR_NAMES[colour]} " if colour != ANY else "")
            + PLURALS["shape" if shape == ANY else SHAPES[shape]]
        )
    return " and ".join(thing(*o) for o in objects)


def corrupt(caption, probability, rng):
    """Return the caption with its attributes replaced, each with `probability`.

    Attributes are shape, colour, number and relation. Two objects never get the same shape or
    colour in this way, so the caption stays in the grammar.
    """
    wanted = parse(caption)
    objects = [list(thing) for thing in wanted.objects]

    def other(value, options, taken=()):
        if value in (ANY, None) or rng.random() >= probability:
            return value
        return rng.choice([option for option in options if option != value and option not in taken])

    if _counts(wanted):  # one shape, one colour, one number for all
        thing = [
            other(objects[0][0], range(len(SHAPES))),
            other(objects[0][1], range(len(COLOURS))),
        ]
        objects = [thing] * other(len(objects), NUMBERS.values())
    else:
        for kind, options in ((0, range(len(SHAPES))), (1, range(len(COLOURS)))):
            for thing in objects:
                thing[kind] = other(thing[kind], options, taken=[o[kind] for o in objects])
    return write(
        replace(
            wanted,
            objects=tuple(map(tuple, objects)),
            relation=other(wanted.relation, RELATIONS.values()),
        )
    )


def _counts(wanted):
    """Return whether the caption counts equal objects."""
    return len(wanted.objects) > 1 and len(set(wanted.objects)) == 1


def change_one(caption, rng):
    """Return a caption that differs in exactly one attribute, so that no image shows both."""
    wanted = parse(caption)
    changes = ["number"] if _counts(wanted) else []
    changes += ["relation"] if wanted.relation else []
    changes += [(i, 0) for i, (shape, _) in enumerate(wanted.objects) if shape != ANY]
    changes += [(i, 1) for i, (_, colour) in enumerate(wanted.objects) if colour != ANY]
    change = rng.choice(changes) if changes else "more"
    objects = [list(o) for o in wanted.objects]
    if change == "number":
        objects = [objects[0]] * rng.choice([n for n in NUMBERS.values() if n != len(objects)])
    elif change == "more":  # "a shape" leaves only the number to change
        objects = objects * 2
    elif change == "relation":
        wanted = replace(
            wanted, relation=rng.choice([r for r in RELATIONS.values() if r != wanted.relation])
        )
    else:
        index, kind = change
        options = range(len(SHAPES)) if kind == 0 else range(len(COLOURS))
        # not an attribute of another object either: "a circle and a circle" is another task
        used = {o[kind] for o in objects}
        new = rng.choice([o for o in options if o not in used])
        for i in range(len(objects)) if "number" in changes else [index]:
            objects[i] = [*objects[i][:kind], new, *objects[i][kind + 1 :]]
    return write(replace(wanted, objects=tuple(map(tuple, objects))))


# --- Scenes ---


@dataclass
class Scenes:
    """Hold B scenes of up to N objects. Every field is [B, N], and shape ANY is no object."""

    shape: torch.Tensor
    colour: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor


def render(scenes, size=SIZE):
    """Return the images of scenes, [B, 3, H, W] in [0, 1]."""
    parts = zip(
        *(
            field.split(1000)
            for field in (scenes.shape, scenes.colour, scenes.x, scenes.y, scenes.radius)
        )
    )
    return torch.cat(
        [draw(*part, size) for part in parts]
    )  # in parts that fit the processor's caches


def sample_scenes(captions, seed, size=SIZE):
    """Return a random scene for each caption.

    Attributes that the caption leaves open are random, objects do not touch, and relations hold
    clearly.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = [parse(caption) for caption in captions]
    b = len(wanted)
    number = torch.tensor([len(w.objects) for w in wanted])
    exists = torch.arange(MAX_WANTED) < number[:, None]
    shape, colour = (
        _fill([[o[k] for o in w.objects] for w in wanted], options, generator)
        for k, options in ((0, len(SHAPES)), (1, len(COLOURS)))
    )
    relation = torch.tensor([w.relation or (0, 0) for w in wanted], dtype=torch.float32)

    low, high = (
        torch.tensor([4.8, 4.2, 3.7, 3.5])[number - 1],
        torch.tensor([6.5, 5.2, 4.5, 4.0])[number - 1],
    )
    x, y, radius = torch.zeros(3, b, MAX_WANTED)
    todo = torch.arange(b)
    while len(todo):  # rejection: draw all that are still wrong again
        n = len(todo)
        r = low[todo, None] + (high - low)[todo, None] * torch.rand(
            n, MAX_WANTED, generator=generator
        )
        reach = 1.3 * r + 0.5
        px, py = (
            reach + (size - 2 * reach) * torch.rand(n, MAX_WANTED, generator=generator)
            for _ in range(2)
        )
        x[todo], y[todo], radius[todo] = px, py, r
        todo = todo[~_fits(px, py, r, exists[todo], relation[todo])]
    return Scenes(torch.where(exists, shape, ANY), colour, x, y, radius)


def _fill(wishes, options, generator):
    """Return attribute indices [B, MAX_WANTED], with a random one in place of every ANY.

    wishes: B lists of indices.
    """
    values = torch.randint(options, (len(wishes), MAX_WANTED), generator=generator)
    for row, wish in enumerate(wishes):
        for i, value in enumerate(wish):
            if value != ANY:
                values[row, i] = value
    return values


def _fits(x, y, r, exists, relation):
    dx, dy = x[:, :, None] - x[:, None], y[:, :, None] - y[:, None]
    apart = torch.sqrt(dx**2 + dy**2) > 1.3 * (r[:, :, None] + r[:, None]) + 1.5
    both = exists[:, :, None] & exists[:, None] & ~torch.eye(MAX_WANTED, dtype=torch.bool)
    separate = (apart | ~both).all(dim=(1, 2))
    along = dx[:, 0, 1] * relation[:, 0] + dy[:, 0, 1] * relation[:, 1]
    across = torch.where(relation[:, 0] != 0, dy[:, 0, 1], dx[:, 0, 1]).abs()
    return separate & ((along - across > 4) | (relation == 0).all(1))


def sample_captions(number, seed, weights=None):
    """Return `number` random captions; weights {task: share}, by default equal shares."""
    rng, by_task = random.Random(seed), captions()
    tasks = rng.choices(TASKS, [1.0 if weights is None else weights[t] for t in TASKS], k=number)
    return [rng.choice(by_task[task]) for task in tasks]


# --- Prompt files ---

# as equal as the number of captions allows, 128 in all
HELD_OUT = {
    "single": 1,
    "two": 6,
    "counting": 38,
    "colours": 10,
    "position": 28,
    "attribution": 41,
    "vague": 4,
}
TRAINED = {"attribution": 40}  # the others: all that are not held out


def split_captions(seed=0):
    """Return (training captions, held-out captions), disjoint and in random order."""
    rng = random.Random(seed)
    train, held_out = [], []
    for task, of_task in captions().items():
        rng.shuffle(of_task)
        held_out += of_task[: HELD_OUT[task]]
        train += of_task[HELD_OUT[task] :][: TRAINED.get(task)]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def main(folder="assets/prompts"):
    """Write the two prompt files that the embedded models use by default."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(("shapes.txt", "shapes_heldout.txt"), split_captions()):
        (path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path / name}: {len(lines)} captions")


if __name__ == "__main__":
    main()
