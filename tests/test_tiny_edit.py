"""The embedded tiny-edit: where it starts, and that the plain pipeline makes the same edits."""

import pytest
import torch
from conftest import ROOT
from diffusers import FluxKontextPipeline
from PIL import Image

from common import models, sde
from common.prompts import caption_of, image_of, read_prompts
from common.trainer.evaluator import NOISE, sample
from worlds.build_tiny_edit import evaluate

FOLDER = ROOT / "assets/tiny-edit"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not built yet")


def test_base_model_edits_badly_with_a_wide_spread():
    scores = evaluate(FOLDER, group=8, seed=0, every=8)
    score = scores["score"]
    assert score.shape == (16, 8)
    assert 0.15 <= score.mean() <= 0.65
    assert score.std(1, unbiased=False).mean() >= 0.1
    assert scores["rest"].mean() > score.mean()
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    assert size <= 8e6


def test_the_plain_pipeline_makes_the_same_edits():
    prompts = read_prompts(ROOT / "assets/prompts/edits_heldout.txt")[:2]
    model = models.load(str(FOLDER), torch.float32, prompts, height=32, width=32, guidance=3.5)
    sigmas = model.sigmas(8, 1.0)
    ours = sample(model, prompts, torch.arange(2), sigmas=sigmas, micro_batch=2)
    pipe = FluxKontextPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for row, prompt in enumerate(prompts):
        theirs = pipe(
            image=Image.open(image_of(prompt)), prompt=caption_of(prompt), height=32, width=32,
            max_area=32 * 32, _auto_resize=False, guidance_scale=3.5, max_sequence_length=12,
            latents=sde.RowNoise(0, NOISE, [row])(model.noise_shape), num_inference_steps=8,
            sigmas=sigmas[:-1].tolist(), output_type="pt",
        ).images  # fmt: skip
        assert (theirs - ours[row : row + 1]).abs().max() <= 1e-5
