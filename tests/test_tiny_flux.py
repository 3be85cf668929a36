"""The embedded tiny-flux: where it starts, and where the main job takes it."""

import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, metrics
from diffusers import FluxPipeline

from worlds.build_tiny_flux import evaluate, what_is_where
from worlds.scene import COLOURS, SHAPES
from worlds.shapes import Scenes, split_captions


def test_base_model_chooses_badly_with_a_wide_spread():
    pipe = FluxPipeline.from_pretrained(ROOT / "assets/tiny-flux", dtype=torch.float32)
    score = evaluate(pipe, split_captions()[1][::4], group=8, seed=0)["score"]
    assert score.shape == (32, 8)
    assert 0.40 <= score.mean() <= 0.60
    assert score.std(1, unbiased=False).mean() >= 0.15


def test_what_is_where_names_the_shape_and_colour_at_each_place():
    one = {
        name: torch.tensor([[value, value_2]])
        for name, value, value_2 in (("x", 10.0, 22.0), ("y", 10.0, 26.0))
    }
    shape, colour = (
        torch.tensor([[names.index(first), -1]])
        for names, first in ((SHAPES, "cross"), (list(COLOURS), "blue"))
    )
    kinds, colours = what_is_where(
        Scenes(shape, colour.abs(), **one, radius=torch.tensor([[5.0, 5.0]])), side=8
    )
    assert kinds.shape == colours.shape == (1, 8, 8)
    assert (
        kinds[0, 2, 2] == SHAPES.index("cross") + 1
        and colours[0, 2, 2] == list(COLOURS).index("blue") + 1
    )
    inside = (torch.arange(8) * 4 + 2 - 10.0).square()
    expected = (
        inside[:, None] + inside < 36
    )  # a place belongs to an object up to one pixel around it
    assert torch.equal(kinds[0] > 0, expected) and torch.equal(
        colours[0] > 0, expected
    )  # the second is no object


def test_the_readme_of_the_assets_says_how_to_sample(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", (ROOT / "assets/README.md").read_text(), re.S)[1]
    names = {}
    exec(code.replace('image.resize((256, 256)).save("sample.png")', ""), names)
    assert names["image"].size == (32, 32)


@pytest.mark.slow
def test_main_job_lifts_the_held_out_reward_within_five_minutes(tmp_path):
    started = time.time()
    done = subprocess.run(
        [sys.executable, str(ROOT / "grpo_base.py"), "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert time.time() - started <= 300
    evaluations = [row["eval_reward"] for row in metrics(tmp_path / "run") if "eval_reward" in row]
    assert evaluations[-1] - evaluations[0] >= 0.15
    assert f"held-out reward {evaluations[0]:.3f} -> {evaluations[-1]:.3f}" in done.stdout
