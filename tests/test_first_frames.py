"""python -m lab.first_frames: images for image to video, from a text-to-image model or from
clips."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

import bpgo
from common import errors, models
from common.args import defaults
from common.errors import InputError
from common.prompts import caption_of, image_of, read_prompts, sets
from evaluation import bias
from lab import first_frames


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Runs the command; the folder is where --prompts first-frames looks."""
    monkeypatch.setattr(sets, "FIRST_FRAMES", tmp_path / "frames/prompts.txt")

    def run(**settings):
        first_frames.main(first_frames.Args(output=str(tmp_path / "frames"), **settings))
        return read_prompts("first-frames")

    return run


def test_a_model_draws_them_and_goes_on_where_it_stopped(made, tmp_path, monkeypatch):
    drawn = dict(
        model="tiny-flux",
        prompts=models.settings("tiny-flux")["prompts"],
        number=3,
        height=32,
        width=32,
    )
    lines = made(**drawn)
    assert len(lines) == 3 and {caption_of(line) for line in lines} <= set(
        read_prompts(drawn["prompts"])
    )
    pictures = [Path(image_of(line)).read_bytes() for line in lines]
    assert Image.open(image_of(lines[0])).size == (32, 32) and len(set(pictures)) == 3
    with pytest.raises(InputError, match="has its first frames already"):
        made(**drawn)
    (tmp_path / "frames/prompts.txt").unlink()  # as if it had been stopped before the end
    Path(image_of(lines[1])).unlink()
    with pytest.raises(InputError, match="other settings"):
        made(**{**drawn, "seed": 1})
    assert (
        made(**drawn) == lines and [Path(image_of(line)).read_bytes() for line in lines] == pictures
    )


def test_what_samples_outside_a_run_computes_as_a_run_does(made, bf16, monkeypatch):
    """Weights in bfloat16 and inputs in float32 meet under autocast alone."""
    seen, honest = [], FluxTransformer2DModel.forward

    def forward(module, *inputs, **named):
        seen.append((module.dtype, torch.is_autocast_enabled("cpu"), module.training))
        return honest(module, *inputs, **named)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)
    small = dict(model="tiny-flux", prompts=models.settings("tiny-flux")["prompts"])
    made(**small, number=1, height=32, width=32, sampling_steps=2)
    drawn = len(seen)
    bias_args = bias.Args("tiny-flux", number=1)
    model, settings = bias.load(bias_args, ["a red circle"])
    cond = model.encode(["a red circle"])
    with torch.no_grad():
        model.velocity(torch.zeros(1, *model.noise_shape), torch.tensor(0.5), cond)
    assert drawn == 2 and set(seen) == {(torch.bfloat16, True, False)}


def test_clips_give_their_first_frame_in_the_right_shape(made, tmp_path):
    clip = np.zeros((5, 96, 64, 3), np.uint8)  # tall
    clip[0, 32:64] = (200, 30, 30)  # its middle, in the first frame alone
    imageio.imwrite(tmp_path / "clip.mp4", clip, fps=5)
    (tmp_path / "clips.txt").write_text(
        "clip.mp4\ta red band\nclip.mp4\tthe same, called otherwise\n"
    )
    lines = made(clips=str(tmp_path / "clips.txt"), number=0, height=32, width=64)
    assert [caption_of(line) for line in lines] == ["a red band", "the same, called otherwise"]
    image = np.asarray(Image.open(image_of(lines[0])), float)
    assert image.shape == (32, 64, 3)
    assert np.abs(image[4:-4].mean((0, 1)) - (200, 30, 30)).max() < 20  # the codec's error


def test_mistakes_are_one_line(made, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no clip" * 100)
    for text, reason in {
        "clip.mp4\tx": "no clip that can be read",
        "x.mp4\tx": "x.mp4",
        "x": "has no clip",
    }.items():
        (tmp_path / "clips.txt").write_text(text)
        with pytest.raises(InputError, match=reason) as error:
            made(clips=str(tmp_path / "clips.txt"), number=0)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="text-to-image"):
        made(model="tiny-wan", prompts=models.settings("tiny-wan")["prompts"], seed=0, clips="")


def test_without_them_image_to_video_says_how_to_make_some(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sets, "FIRST_FRAMES", tmp_path / "frames/prompts.txt")
    with pytest.raises(SystemExit):
        errors.run(bpgo.main, defaults(bpgo.Args, "wan2.2-i2v", output=str(tmp_path / "run")))
    assert "python -m lab.first_frames" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
