"""The verifier against the renderer: it accepts what a caption says, rejects what it does not; blur
and noise cost."""

import random
from pathlib import Path

import pytest
import torch

from worlds import shapes, verifier
from worlds.scene import ANY, BACKGROUND, COLOURS, RELATIONS, SHAPES, TASKS, draw, parse
from worlds.shapes import (
    change_one,
    corrupt,
    render,
    sample_captions,
    sample_scenes,
    split_captions,
    write,
)
from worlds.verifier import read, verify

PARTS = ("quality", "layout", "alignment", "score")
CAPTIONS = [caption for of_task in shapes.captions().values() for caption in of_task]
PROMPTS = Path(__file__).resolve().parents[1] / "assets" / "prompts"


def verify_all(images, captions, size=50):
    """verify() in batches that fit a cache."""
    parts = [
        verify(images[i : i + size], captions[i : i + size]) for i in range(0, len(captions), size)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def images_of(captions, seed):
    return torch.cat(
        [
            render(sample_scenes(captions[i : i + 250], seed + i))
            for i in range(0, len(captions), 250)
        ]
    )


def blur(images, sigma):
    """Gaussian blur; a pixel near the border averages over what there is."""
    place = torch.arange(images.shape[-1], dtype=torch.float32)
    kernel = (-((place[:, None] - place) ** 2) / (2 * sigma**2)).softmax(1)
    return kernel @ images @ kernel.T


def noise_like(images, seed=0):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def attributes(wanted):
    """All that can be wrong with a caption: {"shape 0", "colour 0", ..., "relation", "count":
    value}."""
    distinct = list(dict.fromkeys(wanted.objects))
    kinds = ("shape", "colour")
    named = {f"{kinds[k]} {i}": o[k] for i, o in enumerate(distinct) for k in (0, 1) if o[k] != ANY}
    if wanted.relation:
        named["relation"] = wanted.relation
    if len(wanted.objects) > len(distinct):
        named["count"] = len(wanted.objects)
    return named


def changed(before, after):
    before, after = attributes(parse(before)), attributes(parse(after))
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


@pytest.fixture(scope="module")
def world():
    """2,000 captions, their renders and verdicts, and the verdicts on captions with one attribute
    changed."""
    captions, rng = sample_captions(2000, seed=0), random.Random(0)
    images, wrong = images_of(captions, seed=1), [change_one(caption, rng) for caption in captions]
    return captions, images, verify_all(images, captions), wrong, verify_all(images, wrong)


# --- Agreement with the renderer ---


def test_agrees_with_the_caption_and_rejects_a_changed_one(world):
    captions, _, right, _, wrong = world
    task = [parse(caption).task for caption in captions]
    accepted, rejected = right["passed"].float(), 1 - wrong["passed"].float()
    for name in TASKS:
        of_task = torch.tensor([t == name for t in task])
        yes, no = accepted[of_task].mean().item(), rejected[of_task].mean().item()
        print(
            f"{name:12} {of_task.sum():4} renders: {yes:.4f} accepted, {no:.4f} rejected with "
            "one attribute changed"
        )
        assert of_task.sum() > 200 and yes >= 0.98 and no >= 0.98, name
    print(f"all: {accepted.mean():.4f} accepted, {rejected.mean():.4f} rejected")
    assert accepted.mean() >= 0.99 and rejected.mean() >= 0.99


def test_a_wrong_attribute_costs(world):
    captions, _, right, wrong_captions, wrong = world
    kind = [changed(before, after)[0].split()[0] for before, after in zip(captions, wrong_captions)]
    loss = right["score"] - wrong["score"]
    for name in ("shape", "colour", "count", "relation"):
        of_kind = torch.tensor([k == name for k in kind])
        print(
            f"wrong {name}: {of_kind.sum()} renders, the score falls by {loss[of_kind].mean():.3f}"
        )
        assert of_kind.sum() > 50 and loss[of_kind].mean() >= 0.3, name
        assert (loss[of_kind] > 0.2).all(), name


def test_parts_are_float32_in_unit_range(world):
    captions, images, right, _, wrong = world
    garbage = verify_all(
        torch.rand(250, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.5, captions[:250]
    )
    for result, n in ((right, 2000), (wrong, 2000), (garbage, 250)):
        for name in PARTS:
            assert result[name].dtype == torch.float32 and result[name].shape == (n,), name
            assert result[name].min() >= 0 and result[name].max() <= 1, name
        assert result["passed"].dtype == torch.bool and result["passed"].shape == (n,)
        assert torch.equal(result["score"], result["quality"] * result["alignment"])


def test_vague_captions_accept_what_fits_and_reject_the_rest():
    vague = shapes.captions()["vague"]
    scenes = sample_scenes(sample_captions(150, seed=4), seed=5)
    images, verdicts = render(scenes), {}
    number = (scenes.shape != ANY).sum(1)
    for caption in vague:
        (_, colour), wanted = parse(caption).objects[0], len(parse(caption).objects)
        fits = (number == wanted) & ((colour == ANY) | (scenes.colour[:, 0] == colour))
        verdicts[caption] = verify_all(images, [caption] * 150)["passed"]
        assert fits.any() and not fits.all()
        assert torch.equal(verdicts[caption], fits), caption
    shapes_seen = scenes.shape[verdicts["a shape"], 0].unique()
    assert len(shapes_seen) == len(SHAPES)  # the accepted scenes are of every shape


def test_each_extra_object_lowers_the_score():
    full = sample_scenes(["four shapes"] * 100, seed=6)

    def thing(row, i):
        return f"a {list(COLOURS)[full.colour[row, i]]} {SHAPES[full.shape[row, i]]}"

    wanted = {
        1: [thing(row, 0) for row in range(100)],
        2: [f"{thing(row, 0)} and {thing(row, 1)}" for row in range(100)],
        3: ["three shapes"] * 100,
    }
    images = {}
    for n in range(1, 5):
        shown = torch.where(torch.arange(4) < n, full.shape, ANY)
        images[n] = draw(shown, full.colour, full.x, full.y, full.radius, 32)
    for n, captions in wanted.items():
        results = [verify_all(images[m], captions) for m in range(n, 5)]
        score, passed = (
            torch.stack([result[name] for result in results]) for name in ("score", "passed")
        )  # [5-n, 100]
        assert passed[0].all() and not passed[1:].any()
        assert (score[1:] < score[:-1] - 0.05).all()
        assert (score[1] < score[0] - 0.2).all()


def test_blank_image_scores_zero():
    blank = torch.tensor(BACKGROUND)[:, None, None].expand(len(CAPTIONS), 3, 32, 32)
    for image in (blank, torch.ones_like(blank)):
        result = verify_all(image, CAPTIONS)
        assert not result["score"].any() and not result["passed"].any()


def test_an_image_of_one_colour_shows_no_shape():
    captions = [
        caption for task in ("single", "colours", "vague") for caption in shapes.captions()[task]
    ]
    best = {}
    for name, colour in COLOURS.items():
        image = torch.tensor(colour)[:, None, None].expand(len(captions), 3, 32, 32)
        score = verify(image, captions)["score"]
        best |= {
            f"{name} for {caption!r}": round(value.item(), 3)
            for caption, value in zip(captions, score)
        }
    best = {name: value for name, value in best.items() if value > 0.5}
    assert not best


# --- Continuity ---


def falls(images, captions):
    """Mean scores of a list of degraded copies."""
    mean = [verify_all(copy, captions)["score"].mean().item() for copy in images]
    print([f"{value:.2e}" for value in mean])
    return all(later < earlier for earlier, later in zip(mean, mean[1:]))


def test_blur_lowers_the_score(world):
    captions, images = world[0][:500], world[1][:500]
    sigmas = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
    assert falls([images, *(blur(images, sigma) for sigma in sigmas)], captions)


def test_noise_lowers_the_score(world):
    captions, images = world[0][:500], world[1][:500]
    noise, levels = noise_like(images), (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert falls([(images + level * noise).clamp(0, 1) for level in levels], captions)


@pytest.mark.parametrize(
    "sigma, little, share", [(0, 0.005, 1.0), (0.5, 0.005, 1.0), (1.0, 0.05, 0.99)]
)
def test_a_small_change_changes_the_score_by_little(world, sigma, little, share):
    captions, images = world[0][:500], world[1][:500]
    images = blur(images, sigma) if sigma else images
    before = verify_all(images, captions)["score"]
    after = verify_all((images + 1e-3 * noise_like(images, 1)).clamp(0, 1), captions)["score"]
    change = (after - before).abs()
    print(f"blur {sigma}: mean change {change.mean():.5f}, largest {change.max():.5f}")
    assert change.mean() < 2e-3 and (change < little).float().mean() >= share


# --- Batches ---


def test_batched_equals_one_by_one_in_any_order(world):
    captions, images = world[0][:200], world[1][:200]
    images = (images + 0.05 * noise_like(images, 2)).clamp(0, 1)
    captions = captions[:100] + captions[101:] + captions[100:101]  # half of the captions are wrong
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    together = verify(images, captions)
    alone = [verify(images[i : i + 1], captions[i : i + 1]) for i in range(200)]
    permuted = verify(images[order], [captions[i] for i in order])
    assert 0.2 < together["passed"].float().mean() < 0.8
    for name in PARTS:
        torch.testing.assert_close(
            torch.cat([a[name] for a in alone]), together[name], atol=1e-6, rtol=0
        )
        torch.testing.assert_close(permuted[name], together[name][order], atol=1e-6, rtol=0)
    assert torch.equal(torch.cat([a["passed"] for a in alone]), together["passed"])
    assert torch.equal(permuted["passed"], together["passed"][order])


def test_refuses_unequal_numbers_and_other_sizes():
    with pytest.raises(AssertionError, match="2 images, 1 captions"):
        verify(torch.zeros(2, 3, 32, 32), ["a circle"])
    for size in ((1, 32, 32), (3, 32, 48)):
        with pytest.raises(AssertionError, match="square RGB"):
            verify(torch.zeros(1, *size), ["a circle"])


# --- Drawing and reading ---


@pytest.mark.parametrize("radius", [3.3, 4.0, 6.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_a_shape_is_that_of_the_circle(shape, radius):
    x, y = 12 + 8 * torch.rand(2, 100, 1, generator=torch.Generator().manual_seed(0))
    index = torch.full((100, 1), SHAPES.index(shape))
    black = list(COLOURS).index("black")
    image = draw(index, torch.full((100, 1), black), x, y, torch.full((100, 1), radius), 32)
    ink = COLOURS["black"][0] - BACKGROUND[0]
    area = ((image[:, 0] - BACKGROUND[0]) / ink).sum((1, 2)) / (torch.pi * radius**2)
    assert area.mean() == pytest.approx(1, abs=0.015)
    assert area.min() > 0.97 and area.max() < 1.03


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_middle_of_a_shape_has_its_colour(shape, colour):
    index = torch.tensor([[SHAPES.index(shape)]]), torch.tensor([[list(COLOURS).index(colour)]])
    place = torch.tensor([[16.5]])
    image = draw(*index, place, place, torch.tensor([[6.0]]), 32)[0]
    torch.testing.assert_close(image[:, 16, 16], torch.tensor(COLOURS[colour]), atol=1e-6, rtol=0)
    assert image.min() >= 0 and image.max() <= 1
    torch.testing.assert_close(image[:, 0, 0], torch.tensor(BACKGROUND), atol=1e-6, rtol=0)


def test_overlapping_objects_stay_in_range():
    same = torch.full((1, 4), 16.0)
    image = draw(
        torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], same, same, same / 3, 32
    )
    assert image.min() >= 0 and image.max() <= 1


def test_read_finds_every_object(world):
    scenes = sample_scenes(world[0][:500], seed=7)
    reading, exists = read(render(scenes)), scenes.shape != ANY
    assert torch.equal(reading.count, exists.sum(1).float())
    place = torch.stack([reading.x, reading.y], -1)
    true_place = torch.stack([scenes.x, scenes.y], -1)
    distance = torch.cdist(
        true_place, torch.where(reading.present[..., None] > 0, place, 1e3)
    )  # [B, true, read]
    nearest, which = distance.min(-1)
    print(f"largest error of a centroid: {nearest[exists].max():.3f} px")
    assert nearest[exists].max() < 0.5
    assert torch.equal(reading.shape.argmax(-1).gather(1, which)[exists], scenes.shape[exists])
    assert torch.equal(reading.colour.argmax(-1).gather(1, which)[exists], scenes.colour[exists])
    ratio = reading.radius.gather(1, which)[exists] / scenes.radius[exists]
    assert ratio.min() > 0.97 and ratio.max() < 1.03


# --- Captions ---


def test_parse_and_write_are_inverse():
    assert len(set(CAPTIONS)) == len(CAPTIONS)
    assert list(shapes.captions()) == list(TASKS)
    for task, of_task in shapes.captions().items():
        for caption in of_task:
            assert write(parse(caption)) == caption
            assert parse(caption).task == task


def test_parse_reads_the_words():
    circle, square, red = SHAPES.index("circle"), SHAPES.index("square"), list(COLOURS).index("red")
    assert parse("a circle above a red square").objects == ((circle, ANY), (square, red))
    assert parse("a circle above a red square").relation == (0, -1)  # y points down
    assert parse("three red crosses").objects == ((SHAPES.index("cross"), red),) * 3
    assert parse("something red").objects == ((ANY, red),)


@pytest.mark.parametrize(
    "caption", ["A Red CIRCLE left of a blue square.", "  a red\tcircle  left of a blue square . "]
)
def test_case_blanks_and_full_stop_do_not_matter(caption):
    assert parse(caption) == parse("a red circle left of a blue square")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a pink circle",
        "circle",
        "five circles",
        "two circle",
        "a red circle and",
        "a circle near a square",
    ]
    + [
        "a circle, a square",
        "a red circle and a square and a cross",
        "something",
        "a red blue circle",
        "ein Kreis",
        "🙂",
    ],
)
def test_other_captions_are_refused_with_the_grammar(caption):
    with pytest.raises(ValueError) as error:
        parse(caption)
    message = str(error.value)
    assert repr(caption) in message and "\n" not in message
    assert all(
        word in message
        for word in ("a [COLOUR] SHAPE", "left of|right of|above|below", *SHAPES, *COLOURS)
    )
    with pytest.raises(ValueError):
        verify(torch.zeros(1, 3, 32, 32), [caption])


def test_corrupt_with_probability_zero_changes_nothing():
    rng = random.Random(0)
    assert [corrupt(caption, 0.0, rng) for caption in CAPTIONS] == CAPTIONS


@pytest.mark.parametrize("task", TASKS)
def test_corrupt_with_probability_one_changes_every_attribute(task):
    rng, kept = random.Random(0), []
    for caption in shapes.captions()[task] * 3:
        after = corrupt(caption, 1.0, rng)
        before, after = attributes(parse(caption)), attributes(parse(after))
        assert before.keys() == after.keys()
        kept.append(any(before[name] == after[name] for name in before))
    assert not any(kept), f"{sum(kept)} of {len(kept)} captions keep an attribute"


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_corrupt_is_seeded_and_changes_each_attribute_that_often(probability):
    captions = shapes.captions()["colours"] * 50
    first, second, other = (
        [corrupt(c, probability, random.Random(s + c)) for c in captions] for s in "aab"
    )
    assert first == second != other
    rng = random.Random(0)
    after = [attributes(parse(corrupt(caption, probability, rng))) for caption in captions]
    for name in ("shape 0", "colour 0"):
        share = sum(a[name] != attributes(parse(c))[name] for a, c in zip(after, captions)) / len(
            captions
        )
        assert share == pytest.approx(
            probability, abs=4 * (probability * (1 - probability) / len(captions)) ** 0.5
        )


def test_change_one_changes_exactly_one_attribute():
    rng = random.Random(0)
    for caption in CAPTIONS:
        after = change_one(caption, rng)
        assert len(changed(caption, after)) == 1, (caption, after)
    first, second = (
        [change_one(caption, random.Random(5)) for caption in CAPTIONS] for _ in range(2)
    )
    assert first == second


# --- Scenes and prompt files ---


def test_split_is_disjoint_and_covers_all_tasks():
    train, held_out = split_captions()
    assert len(held_out) == len(set(held_out)) == 128
    assert len(train) == len(set(train))
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) <= set(CAPTIONS)
    for part in (train, held_out):
        assert {parse(caption).task for caption in part} == set(TASKS)
    assert split_captions() == (train, held_out)
    assert split_captions(seed=1) != (train, held_out)


@pytest.mark.parametrize("name, part", [("shapes.txt", 0), ("shapes_heldout.txt", 1)])
def test_prompt_files_are_not_stale(name, part):
    lines = (PROMPTS / name).read_text(encoding="utf-8").splitlines()
    assert lines == split_captions()[part], "run `python -m worlds.shapes`"


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(CAPTIONS, seed=8)


def test_scenes_are_seeded(scenes):
    again, other = sample_scenes(CAPTIONS, seed=8), sample_scenes(CAPTIONS, seed=9)
    for name, value in vars(scenes).items():
        assert torch.equal(value, vars(again)[name]), name
    assert not torch.equal(scenes.x, other.x)
    assert sample_captions(50, seed=1) == sample_captions(50, seed=1) != sample_captions(50, seed=2)


def test_scenes_show_what_the_captions_name(scenes):
    for row, caption in enumerate(CAPTIONS):
        for i, (shape, colour) in enumerate(parse(caption).objects):
            assert scenes.shape[row, i] == shape or (
                shape == ANY and 0 <= scenes.shape[row, i] < len(SHAPES)
            )
            assert scenes.colour[row, i] == colour or (
                colour == ANY and 0 <= scenes.colour[row, i] < len(COLOURS)
            )
        assert (scenes.shape[row, len(parse(caption).objects) :] == ANY).all()


def test_objects_do_not_touch(scenes):
    b, n = scenes.shape.shape
    one = [value.reshape(b * n, 1) for value in vars(scenes).values()]
    ink = (draw(*one, 32) - torch.tensor(BACKGROUND)[:, None, None]).abs().amax(1).view(
        b, n, 32, 32
    ) > 1e-4
    assert ink.any(-1).any(-1).equal(scenes.shape != ANY)
    assert ink.sum(1).max() == 1  # no pixel belongs to two objects


def test_relations_hold(scenes):
    left_to_right, top_to_bottom = scenes.x[:, 1] - scenes.x[:, 0], scenes.y[:, 1] - scenes.y[:, 0]
    gap = {
        "right of": -left_to_right,
        "left of": left_to_right,
        "below": -top_to_bottom,
        "above": top_to_bottom,
    }
    assert gap.keys() == RELATIONS.keys()
    for name in RELATIONS:
        rows = [row for row, caption in enumerate(CAPTIONS) if f" {name} " in caption]
        across = top_to_bottom if name in ("left of", "right of") else left_to_right
        assert len(rows) == len(SHAPES) * (len(SHAPES) - 1)
        assert (gap[name][rows] > across[rows].abs() + 4).all()


def test_verifier_reward_is_the_score(world):
    captions, images, right = world[0][:50], world[1][:50], world[2]["score"][:50]
    reward = verifier.Verifier()
    torch.testing.assert_close(reward.score(images, captions), right, atol=1e-6, rtol=0)
    assert reward.range == (0.0, 1.0)
    reward.check(CAPTIONS)
    with pytest.raises(ValueError, match="a cat"):
        reward.check([*CAPTIONS, "a cat"])
