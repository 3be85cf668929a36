"""The motion verifier against the renderer: it accepts what a caption says and rejects what it does
not; blur, noise, a path that jumps and an object that changes cost."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from worlds import motion, moving
from worlds.motion import DIRECTIONS, SPEEDS, TASKS, follow, judge, parse, verify
from worlds.moving import (
    ATTRIBUTES,
    change_one,
    corrupt,
    render,
    sample_captions,
    sample_scenes,
    split_captions,
    write,
)
from worlds.scene import ANY, BACKGROUND, COLOURS, SHAPES, draw
from worlds.verifier import read

PARTS = ("quality", "smooth", "alignment", "score")
CAPTIONS = [caption for of_task in moving.captions().values() for caption in of_task]
PROMPTS = Path(__file__).resolve().parents[1] / "assets" / "prompts"
PLAIN = torch.tensor(BACKGROUND)[:, None, None]
MIRRORED = {"left": "right", "right": "left", "up": "down", "down": "up"}


def follow_all(clips, size=16):
    """follow() in batches that fit a cache."""
    parts = [follow(part) for part in clips.split(size)]
    return replace(
        parts[0], **{name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])}
    )


def verify_all(clips, captions):
    return judge(follow_all(clips), captions)


def smoothness_of(clips):
    return motion.smoothness(follow_all(clips))


def drawn(x, y, shape=0, colour=0, radius=4.5):
    """Clips [B, F, 3, 32, 32] of one object at the places x and y [B, F]; the rest broadcast to [B,
    F]."""
    fields = (
        torch.as_tensor(field).expand_as(x).reshape(-1, 1)
        for field in (shape, colour, x, y, radius)
    )
    return draw(*fields, 32).unflatten(0, x.shape)


def straight(path_x, path_y, frames=5, **rest):
    """Clips of an object that crosses the middle; path_x and path_y [B] pixels from the first frame
    to the last."""
    time = torch.linspace(-0.5, 0.5, frames)
    return drawn(16 + path_x[:, None] * time, 16 + path_y[:, None] * time, **rest)


def blur(clips, sigma):
    """Gaussian blur of the frames; a pixel near the border averages over what there is."""
    place = torch.arange(clips.shape[-1], dtype=torch.float32)
    kernel = (-((place[:, None] - place) ** 2) / (2 * sigma**2)).softmax(1)
    return kernel @ clips @ kernel.T


def noise_like(clips, seed=0):
    return torch.randn(clips.shape, generator=torch.Generator().manual_seed(seed))


def changed(before, after):
    """The attributes in which two captions differ."""
    before, after = parse(before), parse(after)
    return [kind for kind in ATTRIBUTES if getattr(before, kind) != getattr(after, kind)]


@pytest.fixture(scope="module")
def world():
    """2,000 captions, their renders and verdicts, and the verdicts on captions with one attribute
    changed."""
    captions, rng = sample_captions(2000, seed=0), random.Random(0)
    clips, wrong = (
        render(sample_scenes(captions, seed=1)),
        [change_one(caption, rng) for caption in captions],
    )
    track = follow_all(clips)
    return captions, clips, judge(track, captions), wrong, judge(track, wrong)


# --- Agreement with the renderer ---


def test_agrees_with_the_caption_and_rejects_a_changed_one(world):
    captions, _, right, _, wrong = world
    task = [parse(caption).task for caption in captions]
    accepted, rejected = right["passed"].float(), 1 - wrong["passed"].float()
    for name in TASKS:
        of_task = torch.tensor([t == name for t in task])
        yes, no = accepted[of_task].mean().item(), rejected[of_task].mean().item()
        print(
            f"{name:10} {of_task.sum():4} renders: {yes:.4f} accepted, {no:.4f} rejected with "
            "one attribute changed"
        )
        assert of_task.sum() > 400 and yes >= 0.99 and no >= 0.99, name


def test_clean_renders_score_nearly_one(world):
    for name, least in {"quality": 0.99, "smooth": 0.98, "alignment": 0.93, "score": 0.92}.items():
        print(f"{name}: lowest {world[2][name].min():.3f}, mean {world[2][name].mean():.3f}")
        assert world[2][name].min() > least, name


def test_a_wrong_attribute_costs(world):
    captions, _, right, wrong_captions, wrong = world
    kind = [changed(before, after) for before, after in zip(captions, wrong_captions)]
    loss = right["score"] - wrong["score"]
    for name in ATTRIBUTES:
        of_kind = torch.tensor([k == [name] for k in kind])
        print(
            f"wrong {name}: {of_kind.sum()} renders, the score falls by {loss[of_kind].mean():.3f}"
        )
        assert of_kind.sum() > 200 and loss[of_kind].mean() >= 0.25, name
        assert (loss[of_kind] > 0.15).all(), name


def test_parts_are_float32_in_unit_range_and_build_on_each_other(world):
    captions, _, right, _, wrong = world
    noise = torch.rand(40, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.5
    for result, n in ((right, 2000), (wrong, 2000), (verify(noise, captions[:40]), 40)):
        for name in PARTS:
            assert result[name].dtype == torch.float32 and result[name].shape == (n,), name
            assert result[name].min() >= 0 and result[name].max() <= 1, name
        assert result["passed"].dtype == torch.bool and result["passed"].shape == (n,)
        assert (result["smooth"] <= result["quality"]).all()
        assert torch.equal(result["score"], result["smooth"] * result["alignment"])


@pytest.mark.parametrize("frames", [3, 5, 9])
def test_any_number_of_frames(frames):
    captions, rng = sample_captions(60, seed=2), random.Random(1)
    scenes = sample_scenes(captions, seed=3, frames=frames)
    clips, five = render(scenes), sample_scenes(captions, seed=3)
    assert clips.shape == (60, frames, 3, 32, 32)
    torch.testing.assert_close(clips[:, [0, -1]], render(five)[:, [0, -1]], atol=1e-5, rtol=0)
    track = follow_all(clips)
    path = torch.stack([scenes.path_x, scenes.path_y], dim=1) / 32
    assert (track.path - path).abs().max() < 0.2 / 32
    assert judge(track, captions)["passed"].all()
    assert not judge(track, [change_one(caption, rng) for caption in captions])["passed"].any()


def test_other_sizes():
    captions = sample_captions(24, seed=4)
    assert verify_all(render(sample_scenes(captions, seed=5, size=48)), captions)["passed"].all()
    with pytest.raises(ValueError, match="16 x 16 pixels has no room"):
        sample_scenes(captions, seed=5, size=16)


def test_time_backwards_is_the_other_direction():
    captions = [c for task in ("direction", "shape") for c in moving.captions()[task]][::2]
    clips = render(sample_scenes(captions, seed=6, frames=3)).flip(1)
    other = [" ".join(MIRRORED.get(word, word) for word in caption.split()) for caption in captions]
    track = follow_all(clips)
    assert not judge(track, captions)["passed"].any()
    assert judge(track, other)["passed"].all()


# --- Degrees ---


def falls(clips, captions, clean):
    """Mean scores of a list of degraded copies, after that of the clean clips."""
    mean = [clean["score"][: len(captions)].mean().item()]
    mean += [verify_all(copy, captions)["score"].mean().item() for copy in clips]
    print([f"{value:.2e}" for value in mean])
    return all(later < earlier for earlier, later in zip(mean, mean[1:]))


def test_blur_lowers_the_score(world):
    captions, clips = world[0][:200], world[1][:200, ::2]  # three of five frames: the same path
    assert falls([blur(clips, sigma) for sigma in (0.5, 1.0, 2.0, 3.0)], captions, world[2])


def test_noise_lowers_the_score(world):
    captions, clips = world[0][:200], world[1][:200, ::2]
    noise = noise_like(clips)
    assert falls(
        [(clips + level * noise).clamp(0, 1) for level in (0.02, 0.05, 0.1, 0.2, 0.4)],
        captions,
        world[2],
    )


def test_a_small_change_changes_the_score_by_little(world):
    captions, clips = world[0][:60], world[1][:60, ::2]
    clips = clips + 0.05 * noise_like(clips)
    after = clips + 1e-3 * noise_like(clips, seed=1)
    change = (verify_all(after, captions)["score"] - verify_all(clips, captions)["score"]).abs()
    print(f"mean change {change.mean():.5f}, largest {change.max():.5f}")
    assert change.mean() < 5e-3 and change.max() < 0.03


def test_each_wrong_word_costs_its_share():
    clip = straight(torch.tensor([-15.0]), torch.tensor([0.0]), shape=SHAPES.index("circle"))
    captions = [
        "a red circle moving left quickly",
        "a red circle moving left slowly",
        "a red circle moving right slowly",
        "a blue circle moving right slowly",
        "a blue cross moving right slowly",
    ]
    result = verify(clip.expand(5, -1, -1, -1, -1), captions)
    print("alignment:", [round(value, 3) for value in result["alignment"].tolist()])
    torch.testing.assert_close(result["alignment"], torch.linspace(1, 0, 5), atol=0.02, rtol=0)
    assert result["passed"].tolist() == [True, False, False, False, False]
    fewer = verify(
        clip.expand(2, -1, -1, -1, -1), ["a shape moving right", "something red moving right"]
    )["score"]
    assert fewer[0] < 0.01 and fewer[1] == pytest.approx(0.5, abs=0.01)


def test_direction_is_graded_by_the_angle():
    angle = torch.linspace(0, torch.pi, 37)
    result = verify_all(
        straight(12 * angle.cos(), 12 * angle.sin(), frames=3), ["a shape moving right"] * 37
    )
    score = result["alignment"]
    assert (score.diff() < 1e-4).all() and score[0] > 0.98 and score[-1] < 0.02
    assert -score.diff().min() < 0.45  # five degrees are two pixels at most: no step
    assert result["passed"][:7].all() and not result["passed"][9:].any()  # 30 and 45 degrees


def test_speed_is_graded_by_the_length_of_the_path():
    path = torch.linspace(5, 17, 49)
    clips = straight(path, torch.zeros(49), frames=3)
    slow, quick = (
        verify_all(clips, [f"a red circle moving right {speed}"] * 49) for speed in SPEEDS
    )
    speed = 4 * slow["alignment"] - 3  # one attribute of four
    assert (slow["alignment"][8:].diff() < 1e-3).all() and (quick["alignment"].diff() > -1e-3).all()
    assert slow["alignment"].diff().abs().max() < 0.03
    assert speed[path <= 8].min() > 0.8 and speed[path >= 13].max() < 0.1
    assert (slow["passed"] != (path < 10.5)).sum() <= 1  # the path of 10.5 itself
    assert (slow["passed"] ^ quick["passed"]).all()


def test_standing_still_is_between_the_right_and_the_wrong_direction():
    path = torch.tensor([-6.0, 0.0, 1.0, 6.0])
    result = verify(straight(path, torch.zeros(4)), ["a red circle moving right slowly"] * 4)
    print(
        "backwards, still, a pixel, forwards:",
        [round(value, 3) for value in result["score"].tolist()],
    )
    assert (result["score"].diff() > 0).all()
    assert result["passed"].tolist() == [False, False, False, True]
    assert (result["smooth"] > 0.99).all()


# --- Smoothness ---


def test_shuffled_frames_cost_smoothness_alone(world):
    clips, clean = world[1][:100], {name: world[2][name][:100] for name in PARTS}
    order = [2, 0, 4, 1, 3]
    result = verify_all(clips[:, order], world[0][:100])
    torch.testing.assert_close(result["quality"], clean["quality"], atol=1e-5, rtol=0)
    slow = torch.tensor(["slowly" in caption for caption in world[0][:100]])
    for name, of_kind in (("slowly", slow), ("others", ~slow)):
        print(
            f"{name}: smooth {clean['smooth'][of_kind].mean():.3f} -> "
            f"{result['smooth'][of_kind].mean():.3f}"
        )
    assert result["smooth"].max() < 0.25 and result["smooth"].mean() < 0.05
    assert not result["passed"].any()


def test_a_jittering_path_costs_smoothness_alone():
    generator = torch.Generator().manual_seed(0)
    x, y = 16 + 12 * torch.linspace(-0.5, 0.5, 5).expand(40, 5), torch.full((40, 5), 16.0)
    dx, dy = torch.randn(2, 40, 5, generator=generator)
    results = [
        verify_all(drawn(x + a * dx, y + a * dy), ["a shape moving right"] * 40)
        for a in (0, 0.25, 0.5, 1, 2)
    ]
    quality, smooth = (
        torch.stack([result[name].mean() for result in results]) for name in ("quality", "smooth")
    )
    print("smooth:", [round(value, 3) for value in smooth.tolist()])
    assert (smooth.diff() < -0.05).all() and smooth[0] > 0.99 and smooth[-1] < 0.15
    assert quality.min() > 0.99


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [0, 0, 1, 1, 1]},
        {"colour": [0, 0, 0, 2, 2]},
        {"radius": [4.0, 6.0, 4.0, 6.0, 4.0]},
    ],
    ids=["shape", "colour", "radius"],
)
def test_an_object_that_changes_costs_smoothness(changes):
    path = torch.tensor([-14.0, -6.0, 6.0, 14.0])
    same = smoothness_of(straight(path, torch.zeros(4)))
    other = smoothness_of(
        straight(path, torch.zeros(4), **{k: torch.tensor(v) for k, v in changes.items()})
    )
    assert same.min() > 0.98 and other.max() < 0.5


def test_shape_and_colour_hold_in_every_frame():
    path = torch.full((1,), 14.0)
    for change in (
        {},
        {"colour": torch.tensor([0, 0, 0, 0, 2])},
        {"shape": torch.tensor([0, 0, 0, 0, 1])},
    ):
        _, passed = motion.compare(
            follow(straight(path, 0 * path, **change)), ["a red circle moving right"]
        )
        assert passed.item() == (not change)  # already without a look at smoothness


@pytest.mark.parametrize("missing", range(5))
def test_a_missing_object_costs_its_frame(missing):
    captions = ["a red circle moving left quickly"] * 8
    clips = render(sample_scenes(captions, seed=7))
    clips[:, missing] = PLAIN
    result = verify(clips, captions)
    torch.testing.assert_close(result["quality"], torch.full((8,), 0.8), atol=0.01, rtol=0)
    torch.testing.assert_close(result["smooth"], torch.full((8,), 0.64), atol=0.02, rtol=0)
    assert result["alignment"].max() < 0.85 and not result["passed"].any()


def test_no_object_scores_zero():
    for frame in (PLAIN, torch.ones(3, 1, 1), torch.tensor(COLOURS["red"])[:, None, None]):
        result = verify(frame.expand(12, 3, 3, 32, 32), CAPTIONS[::30])
        assert result["score"].max() < 0.01 and not result["passed"].any()


def test_a_second_object_never_passes():
    x = torch.tensor([[8.0, 10.0, 12.0, 14.0, 16.0]])
    one, two = drawn(x, torch.full_like(x, 7.0)), drawn(x, torch.full_like(x, 24.0), radius=4.1)
    caption = ["a red circle moving right slowly"]
    alone, both = verify(one, caption), verify(torch.minimum(one, two), caption)
    assert alone["passed"].all() and not both["passed"].any()
    assert both["alignment"].item() == pytest.approx(0.5 * alone["alignment"].item(), abs=0.01)
    assert both["smooth"].item() > 0.98  # the larger one moves as before


# --- Batches and rewards ---


def test_batched_equals_one_by_one_in_any_order(world):
    captions, clips = world[0][:40], world[1][:40, ::2]
    clips = (clips + 0.05 * noise_like(clips, 2)).clamp(0, 1)
    captions = captions[:20] + captions[21:] + captions[20:21]  # half of the captions are wrong
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    together = verify(clips, captions)
    alone = [verify(clips[i : i + 1], captions[i : i + 1]) for i in range(40)]
    permuted = verify(clips[order], [captions[i] for i in order])
    assert 0.2 < together["passed"].float().mean() < 0.8
    for name in PARTS:
        torch.testing.assert_close(
            torch.cat([a[name] for a in alone]), together[name], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(permuted[name], together[name][order], atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([a["passed"] for a in alone]), together["passed"])
    assert torch.equal(permuted["passed"], together["passed"][order])


def test_rewards_are_the_parts_and_read_a_batch_once(world, monkeypatch):
    captions, clips, calls = world[0][:12], world[1][:12].clone(), []
    monkeypatch.setattr(motion, "follow", lambda clips: calls.append(len(clips)) or follow(clips))
    rewards = {
        "score": motion.Motion(),
        "quality": motion.MotionQuality(),
        "smooth": motion.MotionSmooth(),
    }
    for part, reward in rewards.items():
        torch.testing.assert_close(
            reward.score(clips, captions), world[2][part][:12], atol=1e-5, rtol=0
        )
        assert reward.range == (0.0, 1.0) and 0 < reward.scale < 1
        reward.check(CAPTIONS)
        with pytest.raises(ValueError, match="a red circle'"):
            reward.check([*CAPTIONS, "a red circle"])
        with pytest.raises(ValueError, match=r"scores clips \[b, F, C, H, W\].*\[12, 3, 32, 32\]"):
            reward.score(clips[:, 0], captions)
    assert calls == [12]


def test_refuses_unequal_numbers_and_too_few_frames():
    with pytest.raises(AssertionError, match="2 clips, 1 captions"):
        verify(torch.zeros(2, 3, 3, 32, 32), ["a circle moving left"])
    with pytest.raises(AssertionError, match="F >= 3"):
        verify(torch.zeros(1, 2, 3, 32, 32), ["a circle moving left"])


# --- Captions ---


def test_parse_and_write_are_inverse():
    assert len(set(CAPTIONS)) == len(CAPTIONS) == len({parse(caption) for caption in CAPTIONS})
    assert list(moving.captions()) == list(TASKS)
    for task, of_task in moving.captions().items():
        for caption in of_task:
            assert write(parse(caption)) == caption
            assert parse(caption).task == task


def test_parse_reads_the_words():
    cross, blue, up, quickly = (
        SHAPES.index("cross"),
        list(COLOURS).index("blue"),
        list(DIRECTIONS).index("up"),
        1,
    )
    assert parse("a blue cross moving up quickly") == motion.Wanted(
        "full", cross, blue, up, quickly
    )
    assert parse("  A cross\tmoving up. ") == motion.Wanted("shape", cross, ANY, up, ANY)
    assert parse("a blue shape moving up") == parse("something blue moving up")
    assert parse("a shape moving up quickly") == motion.Wanted("vague", ANY, ANY, up, quickly)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a red circle",
        "a red circle moving",
        "a red circle moving slowly",
        "a circle moving north",
    ]
    + [
        "two circles moving left",
        "something moving left",
        "a pink circle moving left",
        "a circle moving left slow",
    ]
    + ["a circle moving left slowly quickly", "a circle left of a square", "🙂"],
)
def test_other_captions_are_refused_with_the_grammar(caption):
    with pytest.raises(ValueError) as error:
        parse(caption)
    message = str(error.value)
    assert repr(caption) in message and "\n" not in message
    words = ("a [COLOUR] SHAPE moving DIRECTION [SPEED]", *SHAPES, *COLOURS, *DIRECTIONS, *SPEEDS)
    assert all(word in message for word in words)
    with pytest.raises(ValueError):
        verify(torch.zeros(1, 3, 3, 32, 32), [caption])


def test_corrupt_changes_all_or_nothing_at_the_ends():
    rng = random.Random(0)
    assert [corrupt(caption, 0.0, rng) for caption in CAPTIONS] == CAPTIONS
    for caption in CAPTIONS * 2:
        after = corrupt(caption, 1.0, rng)
        assert after in CAPTIONS and parse(after).task == parse(caption).task
        assert changed(caption, after) == [
            kind for kind in ATTRIBUTES if getattr(parse(caption), kind) != ANY
        ]


@pytest.mark.parametrize("only", [tuple(ATTRIBUTES), ("direction", "speed"), ("colour",), ()])
def test_corrupt_changes_each_attribute_of_only_that_often(only):
    captions, rng, probability = moving.captions()["full"] * 20, random.Random(0), 0.3
    differ = [
        changed(caption, corrupt(caption, probability, rng, only=only)) for caption in captions
    ]
    for kind in ATTRIBUTES:
        share = sum(kind in d for d in differ) / len(captions)
        if kind in only:
            deviation = (probability * (1 - probability) / len(captions)) ** 0.5
            assert share == pytest.approx(probability, abs=4 * deviation), kind
        else:
            assert share == 0, kind


def test_change_one_changes_exactly_one_attribute():
    rng = random.Random(0)
    for caption in CAPTIONS:
        after = change_one(caption, rng)
        assert after in CAPTIONS and len(changed(caption, after)) == 1, (caption, after)


def test_seeds_reproduce():
    for make in (
        lambda seed: sample_captions(50, seed),
        lambda seed: [
            corrupt(caption, 0.5, random.Random(f"{seed} {caption}")) for caption in CAPTIONS
        ],
        lambda seed: [
            change_one(caption, random.Random(f"{seed} {caption}")) for caption in CAPTIONS
        ],
        lambda seed: sample_scenes(CAPTIONS, seed).x.tolist(),
        lambda seed: render(sample_scenes(CAPTIONS[::40], seed)).tolist(),
        split_captions,
    ):
        assert make(1) == make(1) != make(2)
    assert {parse(c).task for c in sample_captions(50, 1, {t: t == "vague" for t in TASKS})} == {
        "vague"
    }


# --- Scenes and prompt files ---


def test_scenes_show_what_the_captions_name():
    scenes = sample_scenes(CAPTIONS * 3, seed=8)
    quick = scenes.path_x.abs() + scenes.path_y.abs() > 10.5
    for row, wanted in enumerate(map(parse, CAPTIONS * 3)):
        assert wanted.shape in (ANY, scenes.shape[row]) and wanted.colour in (
            ANY,
            scenes.colour[row],
        )
        path = torch.stack([scenes.path_x[row], scenes.path_y[row]])
        axis = torch.tensor(list(DIRECTIONS.values())[wanted.direction])
        assert torch.equal(path, path.norm() * axis)  # along the axis, exactly
        assert wanted.speed in (ANY, quick[row])
    length = scenes.path_x.abs() + scenes.path_y.abs()
    assert ((length >= 5) & (length <= 8) | (length >= 13) & (length <= 17)).all()
    assert 0.4 < quick.float().mean() < 0.6
    assert scenes.radius.min() >= 4 and scenes.radius.max() <= 5.5


def test_the_whole_path_is_inside_the_image():
    scenes = sample_scenes(CAPTIONS * 4, seed=9, frames=3)
    wide = replace(scenes, x=scenes.x + 4, y=scenes.y + 4, size=40)
    ink = (render(wide) - PLAIN).abs().sum(2)  # [B, F, 40, 40]
    inside = ink[..., 4:-4, 4:-4].sum((-2, -1))
    assert (ink.sum((-2, -1)) - inside).max() < 1e-3 * inside.min()


def test_split_is_disjoint_and_covers_all_tasks_evenly():
    train, held_out = split_captions()
    assert len(held_out) == len(set(held_out)) == 128
    assert len(train) == len(set(train)) and not set(train) & set(held_out)
    assert set(train) | set(held_out) <= set(CAPTIONS)
    for part in (train, held_out):
        number = [sum(parse(caption).task == task for caption in part) for task in TASKS]
        assert min(number) >= 24 and max(number) <= 2 * min(number), number


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    moving.main(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["motion.txt", "motion_heldout.txt", "motion_i2v.txt", "motion_i2v_heldout.txt"]
)
def test_prompt_files_are_not_stale(written, name):
    lines = (PROMPTS / name).read_text(encoding="utf-8").splitlines()
    assert lines == (written / name).read_text().splitlines(), "run `python -m worlds.moving`"
    train, held_out = split_captions()
    captions = [line.split("\t")[-1] for line in lines]
    assert (
        captions
        == {
            "motion.txt": train,
            "motion_heldout.txt": held_out,
            "motion_i2v.txt": train[:120],
            "motion_i2v_heldout.txt": held_out,
        }[name]
    )


def test_first_frames_are_not_stale_and_show_their_captions(written):
    lines = [
        line.split("\t")
        for name in ("motion_i2v.txt", "motion_i2v_heldout.txt")
        for line in (PROMPTS / name).read_text().splitlines()
    ]
    names = [path for path, _ in lines]
    assert sorted(names) == sorted(
        f"motion_frames/{p.name}" for p in (PROMPTS / "motion_frames").iterdir()
    )
    frames, again = (
        torch.stack([pixels(folder / name) for name in names]) for folder in (PROMPTS, written)
    )
    assert (frames - again).abs().max() < 1.5 / 255, "run `python -m worlds.moving`"
    reading = read(frames)
    assert (reading.count == 1).all() and reading.quality.min() > 0.98
    for row, (_, caption) in enumerate(lines):
        wanted = parse(caption)
        assert wanted.shape in (ANY, reading.shape[row, 0].argmax())
        assert wanted.colour in (ANY, reading.colour[row, 0].argmax())
        dx, dy = list(DIRECTIONS.values())[wanted.direction]
        place = dx * reading.x[row, 0] + dy * reading.y[row, 0]
        room = 32 * max(dx + dy, 0) - place  # ahead of the centroid
        assert room > (13 if wanted.speed == 1 else 5) + 3, caption


def pixels(path):
    """PNG -> [3, H, W] in [0, 1]"""
    with Image.open(path) as image:
        assert image.size == (32, 32) and image.mode == "RGB"
        return torch.tensor(list(image.tobytes())).view(32, 32, 3).movedim(-1, 0) / 255
