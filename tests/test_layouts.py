"""Folders of the public benchmarks: their own tools' names, counts and metadata, written,
interrupted, and checked."""

import json
import os
import re
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common import cli, errors
from common.errors import InputError
from common.prompts import sets
from evaluation import layouts, sampler

GENEVAL = [
    {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a photo of a bench",
    },
    {
        "tag": "colors",
        "include": [{"class": "cow", "count": 1, "color": "red"}],
        "prompt": "a photo of a red cow",
    },
]
VBENCH = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "A person's dance: 50% off?",
        "dimension": ["human_action"],
        "auxiliary_info": {},
    },
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["color"]},
    {
        "prompt_en": "The bund Shanghai, oil painting",
        "dimension": ["appearance_style"],
    },  # two are there twice
]
UNIGENBENCH = (
    'index,prompt_en,sub_dims_en\n0,"In ink, two\npandas.","{""Subjects"": ""Animal""}"\n'
    "7,Another.,{}\n"
)
HPSV2 = {"anime": ["a girl", "a boy"], "photo": ["a street"]}


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Small files in the formats of the benchmarks, by layout."""
    (tmp_path / "geneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    (tmp_path / "vbench.json").write_text(json.dumps(VBENCH))
    (tmp_path / "unigenbench.csv").write_text(UNIGENBENCH)
    monkeypatch.setattr(sets, "HPSV2", tuple(HPSV2))
    monkeypatch.setattr(sets, "_hpsv2", HPSV2.get)
    files = {
        name: str(next(tmp_path.glob(f"{name}.*"))) for name in ("geneval", "vbench", "unigenbench")
    }
    return {**files, "hpsv2": "hpsv2:all"}


@pytest.fixture
def write(official, tmp_path, monkeypatch):
    """evaluate.py --layout of a tiny model, here: the model's own folder."""

    def run(layout, *flags, model="tiny-flux"):
        words = [
            "--model",
            model,
            "--layout",
            layout,
            "--prompts",
            official[layout],
            "--sampling-steps",
            "2",
        ]
        words += [
            "--micro-batch",
            "3",
            "--reward-batch",
            "3",
            f"--output={tmp_path / 'look'}",
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        evaluate.main(cli.parse(evaluate.Args, evaluate.__doc__, evaluate.defaults))
        return layouts.plan(layout, official[layout]).root(tmp_path / "look", "base")

    return run


# --- As the official tools look for them ---


def test_geneval_finds_each_prompts_metadata_and_images(write, capsys):
    folder, found = write("geneval"), []
    for name in os.listdir(folder):
        assert name.isdigit()
        metadata = json.loads((folder / name / "metadata.jsonl").read_text())
        images = sorted(os.listdir(folder / name / "samples"))
        assert all(re.match(r"\d+\.png", image) for image in images)
        assert metadata == GENEVAL[int(name)] and images == [
            f"{number:05d}.png" for number in range(4)
        ]
        found += [np.array(Image.open(folder / name / "samples" / image)) for image in images]
    assert (
        all(image.shape == (32, 32, 3) and image.std() > 1 for image in found) and len(found) == 8
    )
    assert len({image.tobytes() for image in found}) == 8, "each from noise of its own"
    assert f"python evaluation/evaluate_images.py {folder}" in capsys.readouterr().out


def test_vbench_finds_five_clips_of_each_prompt_and_25_for_flickering(write, capsys):
    folder = write("vbench", "--fps", "8", model="tiny-wan")
    names = set(os.listdir(folder))
    for row in VBENCH:
        number = 25 if "temporal_flickering" in row["dimension"] else 5
        assert all(f"{row['prompt_en']}-{i}.mp4" in names for i in range(number))
    assert len(names) == 25 + 5 + 5
    frames = imageio.imread(folder / f"{VBENCH[1]['prompt_en']}-4.mp4")
    assert frames.shape == (5, 32, 32, 3) and frames.std() > 1
    assert imageio.immeta(folder / f"{VBENCH[1]['prompt_en']}-4.mp4")["fps"] == 8
    assert f"vbench evaluate --videos_path {folder} --dimension $d" in capsys.readouterr().out


def test_unigenbench_finds_four_images_of_each_index(write, capsys):
    folder = write("unigenbench")
    assert folder.parts[-4:] == ("unigenbench", "eval_data", "en", "base")
    assert sorted(os.listdir(folder)) == sorted(
        f"{index}_{j}.png" for index in (0, 7) for j in range(4)
    )
    assert (
        layouts.plan("unigenbench", str(folder.parents[4] / "unigenbench.csv")).prompts[0]
        == "In ink, two pandas."
    )
    assert f"eval/qwenvl_72b_en_eval.py --data_path {folder} " in capsys.readouterr().out


def test_hpsv2_finds_a_jpeg_of_each_prompt_below_its_style(write, capsys):
    folder = write("hpsv2", "--reward", "jpeg")
    assert {style: sorted(os.listdir(folder / style)) for style in os.listdir(folder)} == {
        "anime": ["00000.jpg", "00001.jpg"],
        "photo": ["00000.jpg"],
    }
    image = Image.open(folder / "anime/00001.jpg")
    assert image.format == "JPEG" and image.size == (32, 32)
    said = capsys.readouterr().out
    assert f'hpsv2.evaluate(sys.argv[1])" {folder}' in said and "jpeg\nbase" in re.sub(
        " +", "", said
    )


def test_the_long_and_the_chinese_prompts_of_unigenbench_have_folders_of_their_own(tmp_path):
    for name, column in {
        "test_prompts_en_long": "prompt_en",
        "test_prompts_zh": "prompt_zh",
    }.items():
        (tmp_path / f"{name}.csv").write_text(f"index,{column}\n0,a\n")
        layout = layouts.plan("unigenbench", str(tmp_path / f"{name}.csv"))
        assert layout.place == f"eval_data/{name.removeprefix('test_prompts_')}"
        assert any(f"data/{name}.csv" in command for command in layout.commands(tmp_path, "m"))


def test_pixels_are_those_of_the_sample(tmp_path):
    sample = torch.linspace(-0.1, 1.1, 3 * 32 * 32).view(3, 32, 32)
    layouts.write(tmp_path / "a.png", sample, 8)
    expected = (sample.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    assert (np.array(Image.open(tmp_path / "a.png")) == expected).all()
    layouts.write(tmp_path / "a.jpg", sample, 8)
    assert np.abs(np.array(Image.open(tmp_path / "a.jpg")).astype(int) - expected).mean() < 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.png"]


# --- Interrupted, and what is wrong ---


def test_an_interrupted_layout_goes_on_with_what_is_missing(write, monkeypatch, tmp_path):
    true, honest, made, left = sampler.sample, layouts.write, [], [4]

    def interrupted(path, *words):
        left[0] -= 1
        if left[0] < 0:
            path.with_name(f".tmp-{path.name}").write_text("half")
            raise KeyboardInterrupt
        honest(path, *words)

    monkeypatch.setattr(layouts, "write", interrupted)
    with pytest.raises(errors.Stopped):
        write("geneval")
    monkeypatch.setattr(layouts, "write", honest)

    def counted(model, prompts, **settings):
        made.append(len(prompts))
        return true(model, prompts, **settings)

    monkeypatch.setattr(sampler, "sample", counted)
    folder = write("geneval")
    assert sum(made) == 5, "of 8 three, a part, were finished"
    assert len(list(folder.rglob("*"))) == 2 * (1 + 1 + 1 + 4)
    before = (folder / "00001/samples/00000.png").read_bytes()
    (folder / "00001/samples/00000.png").unlink()
    made.clear()
    write("geneval")
    assert made == [3] and (folder / "00001/samples/00000.png").read_bytes() == before


def test_files_too_much_and_missing_ones_are_one_line(write, official):
    folder = write("geneval")
    (folder / "00000/samples/00004.png").write_bytes(b"")
    with pytest.raises(
        InputError,
        match="geneval has 10 files, 1 others are there, '00000/samples/00004.png' among them",
    ):
        write("geneval")
    (folder / "00000/samples/00004.png").unlink()
    (folder / "00001/metadata.jsonl").unlink()
    layout = layouts.plan("geneval", official["geneval"])
    with pytest.raises(
        InputError,
        match="1 are missing, '00001/metadata.jsonl' among them. Run the same command",
    ):
        layout.check(folder.parents[1], "base")


WRONG = {
    ("geneval", "--samples", "2"): "sets the number of samples",
    ("geneval", "--model", "tiny-wan"): "takes images",
    ("vbench",): "takes clips",
    ("geneval", "--prompts", "missing.jsonl"): "is not a readable file of the benchmark",
    (
        "geneval",
        "--prompts",
        "{unigenbench}",
    ): "row 1 of .* has no 'prompt': it is not the benchmark's file",
    ("unigenbench", "--prompts", "{vbench}"): "row 1 of .* has no 'index'",
    ("hpsv2", "--prompts", "{geneval}"): "takes --prompts hpsv2:STYLE, not ",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_no_layout_is_one_line(words, write, official):
    with pytest.raises(InputError, match=WRONG[words]):
        write(words[0], *(word.format(**official) for word in words[1:]))


ROWS = [  # a layout, a row of its file that is none, and what is said of it
    (
        "geneval",
        {"prompt": 5, "tag": "a"},
        "row 2 of .* has '5' as 'prompt': it is not the benchmark's file",
    ),
    ("geneval", {"prompt": " ", "tag": "a"}, "has ' ' as 'prompt'"),
    ("vbench", {"prompt_en": None, "dimension": []}, "has 'None' as 'prompt_en'"),
    (
        "vbench",
        {"prompt_en": "a", "dimension": "temporal_flickering"},
        "has 'temporal_flickering' as 'dimension'",
    ),
    ("unigenbench", {"index": "x", "prompt_en": "a"}, "has 'x' as 'index'"),
    ("unigenbench", {"index": "1"}, r"row 2 of .* \(line 3\): the number of cells is 1"),
    ("unigenbench", {"index": "00", "prompt_en": "a"}, "has an index twice"),
]


@pytest.mark.parametrize("name, row, said", ROWS)
def test_a_row_that_is_none_of_the_benchmarks_is_one_line(name, row, said, tmp_path):
    first = {
        "geneval": GENEVAL,
        "vbench": VBENCH,
        "unigenbench": [{"index": "0", "prompt_en": "b"}],
    }[name][0]
    path = tmp_path / f"{name}{'.csv' if name == 'unigenbench' else '.json'}"
    lines = (
        [",".join(values) for values in (first, first.values(), row.values())]
        if path.suffix == ".csv"
        else ()
    )
    path.write_text("\n".join(lines) if lines else json.dumps([first, row]))
    with pytest.raises(InputError, match=said):
        layouts.plan(name, str(path))


def test_a_tab_in_a_prompt_makes_no_image_of_what_stands_before_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a\tcow", "tag": "a"}]))
    assert layouts.plan("geneval", str(tmp_path / "a.json")).prompts == ["a cow"]


def test_a_prompt_that_no_file_can_be_called_is_one_line(tmp_path):
    for prompt in ("this and/or that", "x" * 300):
        (tmp_path / "vbench.json").write_text(json.dumps([{"prompt_en": prompt, "dimension": []}]))
        with pytest.raises(InputError, match="no file can be called"):
            layouts.plan("vbench", str(tmp_path / "vbench.json"))


def test_published_sets_are_read_from_their_own_files(official, monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "path_of", lambda name: Path(official[name.partition(":")[0]]))
    assert len(layouts.plan("geneval").files) == 8
    assert layouts.plan("unigenbench", "unigenbench:long").place == "eval_data/en_long"
    assert len(layouts.plan("hpsv2", "hpsv2:photo").files) == 1
