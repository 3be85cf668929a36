"""Generate the world of moving shapes: captions, and clips that show them or do not.

    captions()        every caption of the grammar, by task
    sample_scenes     captions -> random scenes that show them, all at once
    render            scenes -> clips
    corrupt           a caption with each attribute replaced with some probability, for the training
                      of the base models
    change_one        a caption that differs in exactly one attribute, which the verifier must
                      reject
    main              writes the prompt files, and the first frames for image-to-video

Captions are read in worlds/motion.py and scenes drawn in worlds/scene.py. Everything is seeded.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from worlds.motion import DIRECTIONS, PIXEL, SPEEDS, TASKS, parse
from worlds.scene import ANY, COLOURS, SHAPES, draw

FRAMES, SIZE = 5, 32
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
}
PATHS = {
    "slowly": (5 * PIXEL, 8 * PIXEL),
    "quickly": (13 * PIXEL, 17 * PIXEL),
}  # of the whole clip; share of the side
RADII = (4.0, 5.0)  # pixels; the largest triangle just has room for the longest path
# how far a shape of radius 1 reaches from its centroid: to a side, up, down
REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.89, 0.89, 0.89),
    "triangle": (1.35, 1.56, 0.78),
    "cross": (1.19, 1.19, 1.19),
}


# --- Captions ---


def captions():
    """Return every caption of the world, {task: [caption, ...]}, in a fixed order."""
    motions = {
        speed: [f" moving {d}{speed}" for d in DIRECTIONS]
        for speed in ("", *(f" {s}" for s in SPEEDS))
    }
    any_speed = [motion for of_speed in motions.values() for motion in of_speed]
    coloured = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    vague = ["a shape"] + [f"something {colour}" for colour in COLOURS]
    return {
        "full": [
            thing + motion
            for thing in coloured
            for speed in SPEEDS
            for motion in motions[f" {speed}"]
        ],
        "direction": [thing + motion for thing in coloured for motion in motions[""]],
        "shape": [f"a {shape}{motion}" for shape in SHAPES for motion in any_speed],
        "vague": [thing + motion for thing in vague for motion in any_speed],
    }


def write(wanted):
    """Return the caption of a Wanted: the inverse of `parse`."""
    shape, colour, direction, speed = (
        "" if getattr(wanted, kind) == ANY else names[getattr(wanted, kind)]
        for kind, names in ATTRIBUTES.items()
    )
    thing = f"something {colour}" if colour and not shape else f"a {colour} {shape or 'shape'}"
    return " ".join(
        f"{thing} moving {direction} {speed}".split()
    )  # one blank where a word is left open


def corrupt(caption, probability, rng, only=tuple(ATTRIBUTES)):
    """Return the caption with attributes of `only` replaced, each with `probability`.

    Attributes that the caption leaves open stay open.
    """
    wanted = parse(caption)
    named = [kind for kind in ATTRIBUTES if kind in only and getattr(wanted, kind) != ANY]
    return write(
        replace(wanted, **{k: _other(wanted, k, rng) for k in named if rng.random() < probability})
    )


def change_one(caption, rng):
    """Return a caption that differs in exactly one attribute, so that no clip shows both."""
    wanted = parse(caption)
    kind = rng.choice([kind for kind in ATTRIBUTES if getattr(wanted, kind) != ANY])
    return write(replace(wanted, **{kind: _other(wanted, kind, rng)}))


def _other(wanted, kind, rng):
    """Return another value of an attribute."""
    return rng.choice(
        [value for value in range(len(ATTRIBUTES[kind])) if value != getattr(wanted, kind)]
    )


# --- Scenes ---


@dataclass
class Scenes:
    """Hold B scenes of one object at constant speed. All fields but the last two are [B]."""

    shape: torch.Tensor
    colour: torch.Tensor
    x: torch.Tensor  # of the first frame, pixels
    y: torch.Tensor
    path_x: torch.Tensor  # from the first frame to the last, pixels
    path_y: torch.Tensor
    radius: torch.Tensor
    frames: int
    size: int


def render(scenes):
    """Return the clips of scenes, [B, F, 3, H, W] in [0, 1]."""
    time = torch.linspace(0, 1, scenes.frames)
    x = scenes.x[:, None] + time * scenes.path_x[:, None]  # [B, F]
    y = scenes.y[:, None] + time * scenes.path_y[:, None]
    fields = [field[:, None].expand_as(x) for field in (scenes.shape, scenes.colour, scenes.radius)]
    shape, colour, radius, x, y = (field.reshape(-1, 1) for field in (*fields, x, y))
    parts = zip(*(field.split(1000) for field in (shape, colour, x, y, radius)))
    images = torch.cat(
        [draw(*part, scenes.size) for part in parts]
    )  # in parts that fit the processor's caches
    return images.unflatten(0, (-1, scenes.frames))


def sample_scenes(captions, seed, frames=FRAMES, size=SIZE):
    """Return a random scene for each caption, with the whole path inside the image.

    Attributes that the caption leaves open are random. The number of frames does not change the
    scene.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = [parse(caption) for caption in captions]
    shape, colour, direction, speed = (
        _fill([getattr(w, kind) for w in wanted], len(names), generator)
        for kind, names in ATTRIBUTES.items()
    )

    def between(low, high):
        return low + (high - low) * torch.rand(len(wanted), generator=generator)

    radius = between(*RADII)
    path = between(*(torch.tensor([PATHS[name] for name in SPEEDS])[speed] * size).T)
    path_x, path_y = (torch.tensor(list(DIRECTIONS.values()))[direction] * path[:, None]).T
    # half a pixel for the antialiased rim
    side, up, down = (
        torch.tensor([REACH[name] for name in SHAPES])[shape] * (radius + 0.5)[:, None]
    ).T
    left, right = side - path_x.clamp(max=0), size - side - path_x.clamp(min=0)
    top, bottom = up - path_y.clamp(max=0), size - down - path_y.clamp(min=0)
    if ((left > right) | (top > bottom)).any():
        raise ValueError(
            f"a clip of {size} x {size} pixels has no room for the paths; {SIZE} x {SIZE} has"
        )
    return Scenes(
        shape,
        colour,
        between(left, right),
        between(top, bottom),
        path_x,
        path_y,
        radius,
        frames,
        size,
    )


def _fill(values, options, generator):
    """Return B attribute indices [B], with a random one in place of every ANY."""
    values = torch.tensor(values)
    return torch.where(
        values == ANY, torch.randint(options, values.shape, generator=generator), values
    )


def sample_captions(number, seed, weights=None):
    """Return `number` random captions; weights {task: share}, by default equal shares."""
    rng, by_task = random.Random(seed), captions()
    tasks = rng.choices(TASKS, [1.0 if weights is None else weights[t] for t in TASKS], k=number)
    return [rng.choice(by_task[task]) for task in tasks]


# --- Prompt files ---

HELD_OUT = {
    "full": 36,
    "direction": 34,
    "shape": 24,
    "vague": 34,
}  # 128, as equal as half of the fewest allows
TRAINED = {"full": 46}  # the others: all that are not held out
FIRST_FRAMES = 120  # training lines of the image-to-video file; of the held-out one: all


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
    """Write the prompt files that the embedded models use by default.

    A line for image-to-video has the first frame of a clip that shows the caption, and the caption.
    """
    path = Path(folder)
    (path / "motion_frames").mkdir(parents=True, exist_ok=True)
    train, held_out = split_captions()
    lines = {"motion.txt": train, "motion_heldout.txt": held_out}
    first = train[:FIRST_FRAMES] + held_out
    lined = [f"motion_frames/{number:04d}.png\t{caption}" for number, caption in enumerate(first)]
    lines |= {
        "motion_i2v.txt": lined[:FIRST_FRAMES],
        "motion_i2v_heldout.txt": lined[FIRST_FRAMES:],
    }

    for line, clip in zip(lined, render(sample_scenes(first, seed=0))):
        pixels = (clip[0] * 255).round().byte().movedim(0, -1).numpy()  # [H, W, 3]
        Image.fromarray(pixels).save(path / line.split("\t")[0])
    for name, of_file in lines.items():
        (path / name).write_text("\n".join(of_file) + "\n", encoding="utf-8")
        print(f"{path / name}: {len(of_file)} lines")


if __name__ == "__main__":
    main()
