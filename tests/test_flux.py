"""common/models/flux.py against diffusers' own FluxPipeline, on the embedded tiny-flux."""

from functools import partial

import pytest
import torch
from peft import LoraConfig

from common import models, sde
from common.errors import InputError
from common.models import family
from common.prompts import prompts_ahead, prompts_of_step

PROMPTS = ["a square", "four yellow triangles", "a black cross and a blue circle"]


@pytest.fixture(scope="module")
def flux():
    return models.load("tiny-flux", torch.float32, height=32, width=32)


@pytest.mark.parametrize(
    "guidance, shift, steps, width", [(1.0, 1.0, 8, 32), (3.5, 3.0, 5, 32), (3.5, 1.0, 2, 48)]
)
@torch.no_grad()
def test_ode_sampler_gives_the_pipelines_own_images(guidance, shift, steps, width):
    flux = models.load("tiny-flux", torch.float32, height=32, width=width, guidance=guidance)
    noise = sde.RowNoise(0, 0, range(3))(flux.noise_shape)
    sigmas = sde.shifted_sigmas(steps, shift)
    velocity = partial(flux.velocity, cond=flux.encode(PROMPTS))
    latents, log_probs = sde.rollout(velocity, noise, sigmas, torch.zeros(steps), None)
    ours = flux.decode(latents[:, -1])

    flux.pipe.set_progress_bar_config(disable=True)
    official = flux.pipe(
        PROMPTS,
        height=32,
        width=width,
        num_inference_steps=steps,
        sigmas=sigmas[:-1].tolist(),
        guidance_scale=guidance,
        latents=noise,
        output_type="pt",
        max_sequence_length=flux.pipe.tokenizer_2.model_max_length,
    ).images
    assert ours.shape == official.shape == (3, 3, 32, width)
    assert ours.std() > 0.05, "the images must not be flat for the comparison to mean anything"
    assert (ours - official).abs().max() <= 1e-5
    assert (log_probs == 0).all()


@torch.no_grad()
def test_guidance_reaches_the_transformer(flux):
    noise, cond = sde.RowNoise(0, 0, range(3))(flux.noise_shape), flux.encode(PROMPTS)
    velocities = []
    for flux.guidance in (1.0, 3.5):
        velocities.append(flux.velocity(noise, 0.5, cond))
    assert (velocities[0] - velocities[1]).abs().max() > 1e-3


@torch.no_grad()
def test_each_distinct_prompt_is_encoded_once_and_alone(flux):
    flux.embedded.clear()
    many = flux.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert list(flux.embedded) == PROMPTS[:2]
    text, pooled, _ = flux.pipe.encode_prompt(PROMPTS[0], None, max_sequence_length=10)
    for row in (0, 2):
        assert torch.equal(many["encoder_hidden_states"][row], text[0])
        assert torch.equal(many["pooled_projections"][row], pooled[0])


@torch.no_grad()
def test_of_fifty_thousand_prompts_few_embeddings_are_kept(flux, monkeypatch):
    """Those of FLUX have 4 MB each."""
    every = flux.encode(PROMPTS)
    monkeypatch.setattr(family, "KEPT", 2 * sum(value[0].nbytes for value in every.values()))
    flux.encode(PROMPTS[:1])
    for i in range(40):
        some = [PROMPTS[(i + j) % len(PROMPTS)] for j in range(1 + i % 3)]
        some.append(f"a red circle {'big ' * i}")
        assert torch.equal(
            flux.encode(some)["pooled_projections"][0],
            every["pooled_projections"][i % len(PROMPTS)],
        )
        assert list(flux.embedded)[-len(set(some)) :] == list(dict.fromkeys(some))
        assert len(flux.embedded) <= max(2, len(some))


@torch.no_grad()
def test_encoders_that_wait_on_the_cpu_come_once_for_several_steps(flux, monkeypatch):
    """And the embeddings are those that each step would have made; without --offload-encoders
    nothing is made ahead."""
    prompts, visits, embed = [f"{i} red circles" for i in range(40)], [], flux._embed
    rows = torch.arange(4) + 4  # of the second process: group 1 of 2
    monkeypatch.setattr(flux, "_embed", lambda *args: visits.append(step) or embed(*args))
    found = []
    for offload, ahead, expected in (
        (True, True, [0, 8]),
        (True, False, [*range(12)]),
        (False, True, [*range(12)]),
    ):
        monkeypatch.setattr(flux, "embedded", {})
        monkeypatch.setattr(flux, "offload_encoders", offload)
        visits.clear()
        for step in range(12):
            captions = [prompts_of_step(prompts, step, 2, seed=0)[row // 4] for row in rows]
            cond = flux.encode(
                captions, prompts_ahead(prompts, step, 2, 0, rows // 4) if ahead else ()
            )
            found.append(cond["pooled_projections"])
        assert visits == expected
    alone, apart, here = torch.stack(found).split(12)
    assert torch.equal(alone, apart) and torch.equal(alone, here)

    monkeypatch.setattr(flux, "offload_encoders", True)
    monkeypatch.setattr(family, "KEPT", 3 * sum(value[0].nbytes for value in cond.values()))
    flux.embedded.clear()
    flux.encode(prompts[:1], prompts[1:])
    assert list(flux.embedded) == [*prompts[1:3], prompts[0]], "no more than there is room for"


@torch.no_grad()
def test_embeddings_wait_on_the_cpu_whatever_the_model_is_on(flux, monkeypatch):
    text = flux.text(PROMPTS[0])
    flux.embedded.clear()
    monkeypatch.setattr(type(flux), "device", torch.device("meta"))
    monkeypatch.setattr(type(flux), "text", lambda model, caption: text)
    cond = flux.encode(PROMPTS)
    assert all(
        value.device.type == "meta" and len(value) == len(PROMPTS) for value in cond.values()
    )
    kept = [value for embedding in flux.embedded.values() for value in embedding.values()]
    assert len(kept) == 2 * len(PROMPTS) and all(value.device.type == "cpu" for value in kept)
    flux.embedded.clear()


@torch.no_grad()
def test_velocity_takes_a_sigma_for_all_rows_or_one_for_each(flux):
    x, cond = sde.RowNoise(0, 0, range(3))(flux.noise_shape), flux.encode(PROMPTS)
    sigmas = torch.tensor([0.9, 0.5, 0.2])
    together = flux.velocity(x, sigmas, cond)
    for row, sigma in enumerate(sigmas):
        alone = flux.velocity(x[row : row + 1], sigma, models.take(cond, slice(row, row + 1)))
        assert (together[row] - alone[0]).abs().max() <= 1e-5


def test_lora_targets_are_every_linear_layer_of_the_blocks():
    transformer = models.load("tiny-flux", torch.float32).pipe.transformer
    linear = {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks" in name and ".norm" not in name
    }
    transformer.add_adapter(
        LoraConfig(r=2, target_modules=models.load("tiny-flux", torch.float32).lora_targets)
    )
    adapted = {
        name.removesuffix(".lora_A.default")
        for name, _ in transformer.named_modules()
        if name.endswith("lora_A.default")
    }
    assert adapted == linear and len(adapted) == 2 * 12 + 4 * 5


@pytest.mark.parametrize("size", [(30, 32), (32, 100)])
def test_a_size_that_the_latents_cannot_have_is_one_clear_line(size):
    with pytest.raises(InputError, match="multiples of 8"):
        models.load("tiny-flux", torch.float32, height=size[0], width=size[1])


def test_asset_is_small_and_stored_in_half_precision():
    from safetensors import safe_open

    files = [file for file in (models.ASSETS / "tiny-flux").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {
                    torch.float16
                }, file
