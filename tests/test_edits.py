"""The edit world: its instructions, and its verifier against the renderer."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from common.args import Args
from common.errors import InputError
from common.prompts import caption_of, image_of, pictures, read_prompts
from common.rewards import Rewards
from worlds import edits
from worlds.scene import ANY, COLOURS, SHAPES
from worlds.shapes import Scenes, render

NUMBER = 48


@pytest.fixture(scope="module")
def made():
    """(edits, instructions, sources, results), and the scenes of both."""
    wanted, _, before, after = edits.sample(NUMBER, seed=5)
    texts = [edits.write(edit) for edit in wanted]
    return wanted, texts, render(before), render(after), before, after


def test_instructions_are_read_as_they_are_written(made):
    wanted, texts, *_ = made
    assert [edits.parse(text) for text in texts] == wanted
    assert {edit.task for edit in wanted} == set(edits.TASKS)
    assert edits.parse("Make the red circle  blue.") == edits.parse("make the red circle blue")
    for text in ("make it red", "a red circle", "remove a circle", "add a circle above it"):
        with pytest.raises(ValueError, match="the edit world has no instruction"):
            edits.parse(text)


def test_what_was_asked_scores_one_and_a_copy_or_another_scene_nothing(made):
    _, texts, before, after, *_ = made
    right = edits.verify(after, texts, before)
    assert right["passed"].all() and right["score"].min() > 0.95
    copied = edits.verify(before, texts, before)
    assert not copied["passed"].any() and copied["score"].max() < 0.05
    other = edits.verify(after.roll(1, 0), texts, before)
    assert not other["passed"].any() and other["score"].max() < 0.1


def change(scenes, row, place, **values):
    """The scenes with other values of one object."""
    fields = {name: value.clone() for name, value in vars(scenes).items()}
    for name, value in values.items():
        fields[name][row, place] = value
    return Scenes(**fields)


def test_any_other_change_of_the_rest_fails(made):
    """An object that the instruction does not name gets another colour, shape, size or place, or
    disappears; or a new one appears."""
    wanted, texts, before, _, _, after = made
    rng = random.Random(0)
    kinds = ["colour", "shape", "radius", "x", "gone"]
    scenes, rows = after, []
    for row, edit in enumerate(wanted):
        there = (after.shape[row] != ANY).nonzero().flatten().tolist()
        places = [place for place in there if place > (1 if edit.task == "add" else 0)]
        if edit.task == "add":
            places = [place for place in there if place > 0]
        if not places:
            continue
        place, kind = rng.choice(places), kinds[len(rows) % len(kinds)]
        value = {
            "colour": (int(after.colour[row, place]) + 1) % len(COLOURS),
            "shape": (int(after.shape[row, place]) + 1) % len(SHAPES),
            "radius": float(after.radius[row, place]) * 0.6,
            "x": 64.0,  # out of the picture
            "gone": ANY,
        }[kind]
        scenes = change(scenes, row, place, **{"shape" if kind == "gone" else kind: value})
        rows.append(row)
    assert len(rows) > 25
    found = edits.verify(render(scenes)[rows], [texts[row] for row in rows], before[rows])
    right = edits.verify(render(after)[rows], [texts[row] for row in rows], before[rows])
    assert not found["passed"].any()
    assert (found["rest"] < 0.7 * right["rest"]).all()


def test_another_change_than_the_asked_one_fails(made):
    wanted, texts, before, after, *_ = made
    others = []
    for edit in wanted:
        if edit.task == "remove":
            others.append(replace(edit, task="colour", new_colour=0))
        elif edit.new_colour != ANY:
            others.append(replace(edit, new_colour=(edit.new_colour + 1) % len(COLOURS)))
        else:
            others.append(replace(edit, task="remove", new_shape=ANY))
    found = edits.verify(after, [edits.write(edit) for edit in others], before)
    assert not found["passed"].any() and found["asked"].max() < 0.1


def test_an_object_one_pixel_away_still_counts_and_noise_lowers_the_quality(made):
    _, texts, before, after, _, scenes = made
    moved = replace(scenes, x=scenes.x + 0.7)
    assert edits.verify(render(moved), texts, before)["passed"].all()
    noise = 0.15 * torch.randn(after.shape, generator=torch.Generator().manual_seed(0))
    noisy = edits.verify((after + noise).clamp(0, 1), texts, before)
    assert noisy["quality"].mean() < 0.8


def test_an_instruction_must_name_one_object_of_its_source(made):
    _, texts, before, *_ = made
    bare = before[:1] * 0 + before[0, :, :1, :1]
    with pytest.raises(ValueError, match="names 0 objects of its source"):
        edits.verify(bare, ["remove the circle"], bare)


def test_a_wrong_instruction_stays_in_the_grammar_and_names_an_object_of_the_source():
    wanted, shapes, *_ = edits.sample(200, seed=1)
    rng = random.Random(0)
    wrong = [edits.corrupt(*row, 0.5, rng) for row in zip(wanted, shapes)]
    assert sum(map(edits.Edit.__ne__, wanted, wrong)) > 80
    for edit, names in zip(wrong, shapes):
        assert edits.parse(edits.write(edit)) == edit
        assert edit.shape == ANY or edit.shape in names
    same = [edits.corrupt(*row, 0.0, rng) for row in zip(wanted, shapes)]
    assert same == wanted


def test_the_prompt_files_are_those_of_the_generator():
    lines = [
        line
        for name in ("edits.txt", "edits_heldout.txt")
        for line in read_prompts(ROOT / "assets/prompts" / name)
    ]
    wanted, _, before, _ = edits.sample(edits.TRAINED + edits.HELD_OUT, seed=0)
    assert [caption_of(line) for line in lines] == [edits.write(edit) for edit in wanted]
    assert len(set(map(image_of, lines))) == len(lines)
    drawn = (render(Scenes(*(value[::16] for value in vars(before).values()))) * 255).round().byte()
    stored = (pictures.sources(lines[::16], 32, 32)[:, 0] * 255).round().byte()
    assert torch.equal(drawn, stored)
    folder = ROOT / "assets/prompts/edit_sources"
    assert {path.name for path in folder.iterdir()} == {
        image_of(line).rpartition("/")[2] for line in lines
    }
    assert all(Image.open(path).size == (32, 32) for path in list(folder.iterdir())[:3])


def test_the_rewards_are_the_verifiers_parts(made, tmp_path):
    _, texts, before, after, *_ = made
    names = ("edit", "edit:quality", "edit:rest", "edit:passed")
    prompts = []
    for row in range(4):
        pixels = (before[row] * 255).round().byte().movedim(0, -1).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
        prompts.append(f"{tmp_path}/{row}.png\t{texts[row]}")
    rewards = Rewards(Args(reward=names), prompts)
    found = rewards.score(after[:4], prompts)
    expected = edits.verify(after[:4], texts[:4], before[:4])
    for name, part in zip(names, ("score", "quality", "rest", "passed")):
        assert (found[name] - expected[part].float()).abs().max() < 0.02, name  # 8 bits a channel
    with pytest.raises(InputError, match="reward edit: the edit world has no instruction"):
        Rewards(Args(reward=("edit",)), [f"{tmp_path}/0.png\ta fox"])
