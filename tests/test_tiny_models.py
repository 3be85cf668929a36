"""The other embedded models: where they start, and where the methods take them."""

import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, metrics
from safetensors import safe_open

from common import models, sde
from lab import gains
from worlds import build_tiny_sd, build_tiny_wan, shapes

GAIN = 0.10
JOBS = [  # each from its defaults
    ("grpo_base.py", "tiny-wan", ""),
    ("bpgo.py", "tiny-wan", ""),
    ("slas.py", "tiny-wan", ""),
    ("self_paced.py", "tiny-wan", ""),
    ("bpgo.py", "tiny-wan", "--prior sft"),
    ("bpgo.py", "tiny-wan-i2v", "--prior first-frame"),
    ("slas.py", "tiny-sd", ""),
]

embedded = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not (models.ASSETS / name).is_dir(), reason="not built yet"),
        )
        for name in ("tiny-sd", "tiny-wan", "tiny-wan-i2v")
    ],
)


@pytest.mark.long
@embedded
def test_base_model_chooses_badly_with_a_wide_spread(name):
    folder = str(models.ASSETS / name)
    if name == "tiny-sd":
        score = build_tiny_sd.evaluate(folder, shapes.split_captions()[1][::4], group=8, seed=0)[
            "score"
        ]
    else:
        score = build_tiny_wan.evaluate(name, folder, group=8, seed=0, every=8)["score"]
    assert 0.25 <= score.mean() <= 0.55
    assert score.std(1, unbiased=False).mean() >= 0.09


@embedded
def test_asset_is_small_and_stored_in_half_precision(name):
    files = [file for file in (models.ASSETS / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {
                    torch.float16
                }, file


def test_the_readmes_gains_are_those_that_were_measured():
    readme = (ROOT / "README.md").read_text()
    assert gains.with_table(readme) == readme, "run python -m lab.gains --seeds"


@pytest.mark.slow
@pytest.mark.parametrize("script, model, flags", JOBS)
def test_a_method_lifts_the_held_out_reward_within_ten_minutes(script, model, flags, tmp_path):
    words = [
        sys.executable,
        str(ROOT / script),
        "--model",
        model,
        *flags.split(),
        "--output",
        str(tmp_path / "run"),
    ]
    started = time.time()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.time() - started <= 600
    evaluations = [row["eval_reward"] for row in metrics(tmp_path / "run") if "eval_reward" in row]
    assert evaluations[-1] - evaluations[0] >= GAIN


def test_ddim_in_few_steps_weighs_its_last_noisy_step_most():
    """By how many standard deviations a unit of predicted noise moves each mean; why tiny-sd trains
    with `flow`."""
    sigmas, zero = models.load("tiny-sd", torch.float32).sigmas(8, 1.0), torch.zeros(1, 1, 1, 1)

    def moved(kind, eta):
        found = []
        for at in list(zip(sigmas, sigmas[1:], sde.diffusion_coefficients(sigmas, eta, kind)))[:-1]:
            still, more = (
                sde.TRANSITIONS[kind](zero + v, zero, *at, x_next=zero)[2].item()
                for v in (0.0, 1.0)
            )
            found.append(abs(more - still) / (1 - at[0].item()) / sde.transition_std(*at).item())
        return found

    assert (
        moved("ddim", 1.0)[-1] == pytest.approx(9.7, abs=0.05)
        and 1.1 < max(moved("ddim", 1.0)[:-1]) < 1.5
    )
    assert 1.1 < min(moved("flow", 0.7)) and max(moved("flow", 0.7)) < 2.0
