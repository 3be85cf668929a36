"""Every family of models against the diffusers pipeline that it wraps, on small random weights in
the real classes."""

import json
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import editing  # noqa: F401, small areas
import numpy as np
import pipelines
import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from peft import get_peft_model_state_dict
from PIL import Image
from torch.nn.parallel import DistributedDataParallel as DDP

import grpo_base
from benchmarks.memory import KLEIN_4B, SD3, TI2V
from common import cli, models, sde
from common.args import defaults
from common.errors import InputError
from common.models import lora
from common.models.flux import Flux, FluxKontext
from common.models.flux2 import Flux2Klein
from common.models.hunyuan import HunyuanVideo
from common.models.qwen import QwenImage
from common.models.qwen_edit import QwenImageEdit
from common.models.sd import StableDiffusion
from common.models.sd3 import StableDiffusion3
from common.models.wan import Wan, WanImageToVideo
from common.models.z_image import ZImage
from common.trainer import Policy

CAPTIONS = ["a square", "four yellow triangles", "a black cross and a blue circle"]
CLIP = dict(height=32, width=32, frames=5)
FAMILIES = {
    "sd": (pipelines.sd, StableDiffusion, dict(height=32, width=32)),
    "sd3": (pipelines.sd3, StableDiffusion3, dict(height=32, width=32)),
    "sd3 without T5": (
        partial(pipelines.sd3, t5=False),
        StableDiffusion3,
        dict(height=32, width=32),
    ),
    "qwen": (pipelines.qwen, QwenImage, dict(height=32, width=32)),
    "flux2": (pipelines.flux2, Flux2Klein, dict(height=32, width=32)),
    "z-image": (pipelines.z_image, ZImage, dict(height=32, width=32)),
    "wan": (pipelines.wan, Wan, CLIP),
    "wan, two experts": (partial(pipelines.wan, experts=2), Wan, CLIP),
    "ti2v": (pipelines.ti2v, Wan, CLIP),
    "i2v": (partial(pipelines.wan, images=True), WanImageToVideo, CLIP),
    "i2v, two experts": (partial(pipelines.wan, experts=2, images=True), WanImageToVideo, CLIP),
    "hunyuan": (pipelines.hunyuan, HunyuanVideo, CLIP),
    "kontext": (pipelines.kontext, FluxKontext, dict(height=32, width=32)),
    "qwen-edit": (pipelines.qwen_edit, QwenImageEdit, dict(height=32, width=32)),
}
EDITING = ("kontext", "qwen-edit")  # tests/test_editing.py compares their samples
# of pipelines that are given no sigmas
SHIFTS = {StableDiffusion3: 3.0, Flux2Klein: "scheduler", ZImage: 6.0}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def build(family, picture, **settings):
    """(the model, its prompts, its captions)"""
    make, cls, size = FAMILIES[family]
    prompts = [f"{picture}\t{caption}" for caption in CAPTIONS] if cls.images else CAPTIONS
    return cls(make(), **{**size, **settings}), prompts


def official(model, sigmas, noise, picture, **settings):
    """The pipeline's own samples on the same latents and sigmas: [b, (F,) 3, H, W]"""
    pipe, steps = model.pipe, len(sigmas) - 1
    pipe.set_progress_bar_config(disable=True)
    settings |= dict(
        height=32, width=32, num_inference_steps=steps, latents=noise, output_type="pt"
    )
    if isinstance(model, StableDiffusion):
        return pipe(prompt=CAPTIONS, eta=0.0, **settings).images
    if isinstance(model, StableDiffusion3):  # its scheduler shifts by 3
        unshifted = torch.linspace(1, 0, steps + 1)[:-1].tolist()
        settings |= dict(max_sequence_length=24) if pipe.tokenizer_3 else {}
        return pipe(prompt=CAPTIONS, sigmas=unshifted, **settings).images
    if isinstance(model, ZImage):  # its scheduler shifts by 6, its guidance begins at 0
        settings["guidance_scale"] -= 1
        return pipe(prompt=list(CAPTIONS), **settings).images
    if isinstance(model, Flux2Klein):  # it packs the latents itself
        settings["latents"] = noise.mT.unflatten(2, model.grid)
        return pipe(prompt=CAPTIONS, **settings).images
    if isinstance(model, QwenImage):
        settings |= dict(true_cfg_scale=settings.pop("guidance_scale"), negative_prompt=[" "] * 3)
        return pipe(prompt=CAPTIONS, sigmas=sigmas[:-1].tolist(), **settings).images
    settings["num_frames"] = model.frames
    if isinstance(model, HunyuanVideo):
        return pipe(prompt=CAPTIONS, sigmas=sigmas[:-1].tolist(), **settings).frames
    pipe.scheduler.register_to_config(shift=3.0)
    settings["max_sequence_length"] = 12
    if isinstance(model, WanImageToVideo):
        settings["image"] = Image.open(picture)
    return pipe(prompt=CAPTIONS, **settings).frames


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in EDITING])
@torch.no_grad()
def test_ode_sampler_gives_the_pipelines_own_samples(family, guidance, picture):
    # the pipeline turns guidance off for both experts if the first has none; here each has its own
    second = 2.0 if "two" in family and guidance > 1 else 0.0
    model, prompts = build(family, picture, guidance=guidance, guidance_2=second)
    if "two" in family:
        model.pipe.register_to_config(boundary_ratio=0.7)  # both experts sample
    steps = 6
    if isinstance(model, Wan):  # WanPipeline takes no sigmas: read its scheduler's
        model.pipe.scheduler.set_timesteps(steps)
        sigmas = model.pipe.scheduler.sigmas
    else:
        sigmas = model.sigmas(steps, SHIFTS.get(type(model), 1.0))
    noise = sde.RowNoise(0, 0, range(3))(model.noise_shape)
    velocity = partial(model.velocity, cond=model.encode(prompts))
    latents, _ = sde.rollout(velocity, noise, sigmas, torch.zeros(steps), None)
    ours = model.decode(latents[:, -1])
    settings = dict(guidance_scale=guidance, **({"guidance_scale_2": second} if second else {}))
    theirs = official(model, sigmas, noise, picture, **settings)
    assert ours.shape == theirs.shape == (3, *([5] if model.video else []), 3, 32, 32)
    assert ours.std() > 0.05 and (ours[0] - ours[1]).abs().max() > 1e-3, (
        "flat or equal samples would compare nothing"
    )
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "family",
    ["sd", "sd3", "qwen", "flux2", "z-image", "wan", "i2v, two experts", "hunyuan", *EDITING],
)
@torch.no_grad()
def test_guidance_reaches_the_samples(family, picture):
    model, prompts = build(family, picture)
    noise, cond = sde.RowNoise(0, 0, range(3))(model.noise_shape), model.encode(prompts)
    velocities = []
    for model.guidance in (1.0, 4.0):
        velocities.append(model.velocity(noise, 0.95, cond))
    assert (velocities[0] - velocities[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["sd", "sd3", "qwen", "flux2", "z-image", "wan", "i2v"])
@torch.no_grad()
def test_batched_guidance_equals_sequential(family, picture):
    results = []
    for batched in (False, True):
        model, prompts = build(family, picture, guidance=4.0, batched_guidance=batched)
        noise = sde.RowNoise(0, 0, range(3))(model.noise_shape)
        results.append(model.velocity(noise, 0.8, model.encode(prompts)))
    assert (results[0] - results[1]).abs().max() <= 1e-5 * results[0].abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_slices_and_waiting_encoders_change_no_number(family, picture):
    results = []
    for settings in ({}, dict(decode_batch=2, offload_encoders=True)):
        model, prompts = build(family, picture, **settings)
        cond = model.encode(prompts)
        x = sde.RowNoise(0, 0, range(3))(model.noise_shape)
        results.append((cond, model.decode(x)))
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name])
    assert (results[0][1] - results[1][1]).abs().max() <= 1e-5  # another batch shape


@pytest.mark.parametrize("family", [*FAMILIES, "flux"])
def test_a_blank_conditioning_has_the_shapes_of_a_real_one(family, picture):
    if family == "flux":
        model, prompts = Flux(pipelines.flux()), CAPTIONS
    else:
        model, prompts = build(family, picture)
    real, blank = model.encode(prompts[:1]), model.blank()
    assert real.keys() == blank.keys()
    assert all(value.shape == real[name].shape[1:] for name, value in blank.items()), family


@pytest.mark.parametrize("name", ["tiny-wan", "tiny-wan-i2v"])
@torch.no_grad()
def test_wans_clips_are_decoded_in_float32_whatever_the_passes_are_in(name):
    half, single = (models.load(name, dtype) for dtype in (torch.bfloat16, torch.float32))
    x = sde.RowNoise(0, 0, range(2))(half.noise_shape)
    with torch.autocast("cpu", torch.bfloat16):  # as the initial weights sample
        clips = half.decode(x)
    assert torch.equal(clips, single.decode(x))
    kinds = {name: weight.dtype for name, weight in half.pipe.transformer.named_parameters()}
    assert (
        kinds["scale_shift_table"] == torch.float32 and kinds["proj_out.weight"] == torch.bfloat16
    )


def test_in_bf16_loras_do_not_cast_what_autocast_casts_back():
    """Bit for bit the same velocity and gradients."""
    results = []
    for casting in (True, False):
        model = models.load("tiny-flux", torch.bfloat16)
        module, seen = model.pipe.transformer.requires_grad_(False), []
        lora.adapt(
            module,
            model.lora_targets,
            rank=4,
            alpha=4,
            seed=0,
            learns=model.learns,
            autocast=True,
        )
        layers = [part for part in module.modules() if hasattr(part, "cast_input_dtype_enabled")]
        assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = casting
            torch.nn.init.ones_(layer.lora_B["default"].weight)
            layer.lora_A["default"].register_forward_pre_hook(
                lambda _, values, seen=seen: seen.append(values[0].dtype)
            )
        x = sde.RowNoise(0, 0, range(2))(model.noise_shape)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model.velocity(x, 0.5, model.encode(CAPTIONS[:2]))
        velocity.square().sum().backward()
        assert (torch.bfloat16 in seen) != casting
        results.append(
            [velocity.detach(), *(w.grad for w in module.parameters() if w.requires_grad)]
        )
    assert all(torch.equal(*pair) for pair in zip(*results))


# --- Stable Diffusion's change of variables ---


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("step", [0, 4, 9])
@torch.no_grad()
def test_ddim_step_is_that_of_diffusers_and_its_log_prob_that_of_ddpo(eta, step):
    model = StableDiffusion(pipelines.sd(), height=32, width=32)
    ddim, sigmas = model.ddim, model.sigmas(10, 1.0).double()
    generator = torch.Generator().manual_seed(0)
    z, eps, noise = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    t = ddim.timesteps[step]

    theirs = ddim.step(eps, t, z, eta=eta, variance_noise=noise).prev_sample
    std = eta * ddim._get_variance(t, t - 100).double().sqrt()
    mean = theirs - std * noise
    ddpo = (-((theirs - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * np.log(2 * np.pi)).mean(
        (1, 2, 3)
    )

    sigma, sigma_next = sigmas[step], sigmas[step + 1]
    h, h_next = torch.hypot(1 - sigma, sigma), torch.hypot(1 - sigma_next, sigma_next)
    longer = torch.cat([sigmas, sigmas[-1:] / 2])  # so that none is the last
    s = sde.diffusion_coefficients(longer, eta, "ddim")[step]
    x, velocity = h * z, (eps - h * z) / (1 - sigma)
    x_next, log_prob, _ = sde.ddim_step(velocity, x, sigma, sigma_next, s, noise=noise)
    # the scheduler holds its alphas in float32
    assert (x_next / h_next - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    # the log-probability of z, not of x = h z: their constant difference is in no ratio
    assert (log_prob + h_next.log() - ddpo).abs().max() <= 1e-5
    again = sde.ddim_step(velocity, x, sigma, sigma_next, s, x_next=x_next)[1]
    assert torch.equal(again, log_prob)


def test_sd_visits_ddims_timesteps_from_noise_of_the_right_size():
    model = StableDiffusion(pipelines.sd(), height=32, width=32)
    sigmas = model.sigmas(50, 1.0)
    assert model.ddim.timesteps[:3].tolist() == [981, 961, 941] and model.ddim.timesteps[-1] == 1
    signal = model.ddim.alphas_cumprod[[981, 1, 0]].double()
    expected = (1 - signal).sqrt() / (signal.sqrt() + (1 - signal).sqrt())
    assert torch.allclose(sigmas[[0, -2, -1]].double(), expected, atol=1e-7)
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("schedule", ["flow", "dance", "ddim", "cps"])
def test_every_schedule_works_on_sd(schedule):
    model = StableDiffusion(pipelines.sd(), height=32, width=32)
    sigmas = model.sigmas(8, 1.0)
    s = sde.diffusion_coefficients(sigmas, 0.5, schedule)
    assert (s[:-1] > 0).all() and s[-1] == 0 and torch.isfinite(s).all()


# --- Two experts ---


@pytest.mark.parametrize(
    "shift, boundary, high", [(3, 0.9, 5), (12, 0.9, 10), (3, 0.875, 5), (12, 0.875, 11)]
)
def test_the_shift_decides_how_many_of_16_steps_the_high_noise_expert_takes(shift, boundary, high):
    model = Wan(pipelines.wan(experts=2), **CLIP)
    model.pipe.register_to_config(boundary_ratio=boundary)
    experts = [model.trained_at(sigma) for sigma in model.sigmas(16, shift)[:-1]]
    assert experts == ["transformer"] * high + ["transformer_2"] * (16 - high)


def test_each_expert_learns_from_its_own_steps_alone(picture):
    model, prompts = build("i2v, two experts", picture, guidance=2.0)
    cond, x = model.encode(prompts), sde.RowNoise(0, 0, range(3))(model.noise_shape)
    for sigma, learns, rests in (
        (0.95, "transformer", "transformer_2"),
        (0.5, "transformer_2", "transformer"),
    ):
        model.pipe.transformer.zero_grad()
        model.pipe.transformer_2.zero_grad()
        model.velocity(x, sigma, cond).square().sum().backward()
        assert all(weight.grad is None for weight in getattr(model.pipe, rests).parameters())
        assert (
            sum(weight.grad.abs().sum() for weight in getattr(model.pipe, learns).parameters()) > 0
        )


# --- Training, from folders ---


TRAINED = [
    "sd",
    "sd3",
    "qwen",
    "flux2",
    "z-image",
    "wan",
    "wan, two experts",
    "ti2v",
    "i2v, two experts",
    "hunyuan",
    *EDITING,
]
GUIDED = dict(sd=3.0, hunyuan=6.0)


def folder_of(family, tmp_path, picture):
    """(a saved pipeline, a prompt file, the settings of a small run)"""
    make, cls, size = FAMILIES[family]
    pipe = make()
    if "two" in family:
        pipe.register_to_config(boundary_ratio=0.7)
    pipe.save_pretrained(tmp_path / "model")
    lines = CAPTIONS
    if cls.video:
        lines = ["a red circle moving left", "a blue square moving up quickly"]
        lines.append("something green moving down")
    if cls.images:
        lines = [f"{picture.name}\t{line}" for line in lines]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    return dict(
        model=str(tmp_path / "model"),
        prompts=str(tmp_path / "prompts.txt"),
        **size,
        sampling_steps=5,
        reward=("jpeg",),
        guidance=GUIDED.get(family, 2.0),
        sde="ddim" if family == "sd" else "flow",
        noise_level=0.8,
        shift=1.0,
        learning_rate=1e-3,
        clip_range=1e-2,
    )


@pytest.mark.parametrize("family", TRAINED)
def test_gradients_reach_what_is_trained_and_nothing_else(family, picture):
    """DDP waits for each."""
    model, prompts = build(family, picture, guidance=GUIDED.get(family, 2.0))
    cond, x = model.encode(prompts), sde.RowNoise(0, 0, range(3))(model.noise_shape)
    for sigma in (0.95, 0.5):
        model.velocity(x, sigma, cond).square().sum().backward()
    for module in model.trainable.values():
        reached = {name for name, weight in module.named_parameters() if weight.grad is not None}
        assert reached == {name for name, _ in module.named_parameters() if model.learns(name)}
        adapted = [
            name for name, _ in module.named_modules() if re.fullmatch(model.lora_targets, name)
        ]
        assert adapted and {f"{name}.weight" for name in adapted} <= reached


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", TRAINED)
def test_first_ratio_is_one_and_both_ways_of_training_move_every_trained_module(
    family, lora_rank, train, tmp_path, picture
):
    settings = folder_of(family, tmp_path, picture)
    folder, rows = train(**settings, lora_rank=lora_rank, kl_coef=0.1, steps=3, micro_batch=3)
    assert len(rows) == 3
    for row in rows:
        assert row["ratio_error"] <= 1e-5
        assert row["grad_norm"] > 0 and row["reward_std"] > 0
    assert rows[-1]["ratio_divergence"] >= 0 and 0 <= rows[0]["kl"] < rows[-1]["kl"]
    make, cls, _ = FAMILIES[family]
    trained = [name for name in cls.trained if getattr(make(), name, None) is not None]
    assert len(trained) == (2 if "two" in family else 1)
    for name in trained:
        saved = torch.load(folder / "checkpoints/step_000003" / f"{name}.pt", weights_only=True)
        if lora_rank:
            # zero at first, as stays the text's query in the last block, whose output is not used
            last = family in ("sd3", "qwen", "qwen-edit")
            unused = "transformer_blocks.1.attn.add_q_proj" if last else "none"
            moved = [value for key, value in saved.items() if "lora_B" in key and unused not in key]
            assert moved and all(value.abs().max() > 0 for value in moved), name
        else:
            before = getattr(cls.pipeline.from_pretrained(settings["model"]), name).state_dict()
            assert any((saved[key] != before[key]).any() for key in saved), name


@pytest.mark.parametrize("family", TRAINED)
def test_exported_lora_loads_into_the_plain_pipeline(family, train, tmp_path, picture):
    settings = folder_of(family, tmp_path, picture)
    folder, _ = train(**settings, lora_rank=2, steps=2)
    cls = FAMILIES[family][1]
    pipe = cls.pipeline.from_pretrained(settings["model"])
    pipe.load_lora_weights(folder / "export")
    if "two" in family:
        pipe.load_lora_weights(folder / "export/transformer_2", load_into_transformer_2=True)
    for name in cls.trained:
        module = getattr(pipe, name, None)
        if module is None:
            continue
        saved = torch.load(folder / "checkpoints/step_000002" / f"{name}.pt", weights_only=True)
        loaded = get_peft_model_state_dict(module, adapter_name=next(iter(module.peft_config)))
        expected = {key.replace(".default.", "."): value for key, value in saved.items()}
        for key in expected:
            if "lora_B" in key:
                expected[key] = 2 * expected[key]  # alpha is twice the rank
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in loaded)


@pytest.mark.parametrize(
    "family", ["wan, two experts", "sd", "sd3", "qwen", "flux2", "z-image", "hunyuan", *EDITING]
)
def test_exported_weights_load_into_the_plain_pipeline(family, train, tmp_path, picture):
    settings = folder_of(family, tmp_path, picture)
    folder, _ = train(**settings, steps=2)
    cls = FAMILIES[family][1]
    pipe = cls.pipeline.from_pretrained(folder / "export")
    for name in cls.trained:
        saved = torch.load(folder / "checkpoints/step_000002" / f"{name}.pt", weights_only=True)
        loaded = getattr(pipe, name).state_dict()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_gradient_checkpointing_changes_no_number(train, tmp_path, picture):
    settings = folder_of("wan, two experts", tmp_path, picture)
    _, plain = train(**settings)
    _, again = train(**settings, gradient_checkpointing=True, output="checkpointed")
    for row, other in zip(plain, again):
        assert row.keys() == other.keys()
        assert all(row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7) for name in row)


def test_processes_exchange_gradients_when_told_and_not_before(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        network, exchanged = DDP(torch.nn.Linear(3, 1)), []

        def hook(_, bucket):
            exchanged.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        network.register_comm_hook(None, hook)
        policy = SimpleNamespace(
            model=SimpleNamespace(trainable={"network": network}),
            # Accelerate's no_sync is the module's own where there are several processes
            processes=SimpleNamespace(accelerator=SimpleNamespace(no_sync=DDP.no_sync)),
            fsdp=None,
        )
        for number, now in enumerate((False, False, True), start=1):
            with Policy.sync_gradients(policy, now):
                network(torch.ones(2, 3)).sum().backward()
            assert len(exchanged) == now
            assert network.module.bias.grad.item() == 2 * number
    finally:
        torch.distributed.destroy_process_group()


# --- Bad input ---


@pytest.mark.parametrize(
    "family, settings, line",
    [
        ("sd", dict(frames=5), "--frames 5: a .* makes images"),
        ("sd", dict(guidance_2=2.0), "--guidance-2 2: it is for the second expert"),
        (
            "sd",
            dict(guidance=0.5),
            "--guidance 0.5: below 1 samples follow the prompt less than without guidance",
        ),
        ("sd", dict(height=30), "multiples of 8"),
        ("sd3", dict(width=36), "multiples of 8"),
        ("qwen", dict(width=34), "multiples of 4"),
        ("flux2", dict(width=36), "multiples of 8"),
        ("z-image", dict(width=36), "multiples of 8"),
        ("sd3", dict(frames=5), "--frames 5: a .* makes images"),
        ("wan", dict(guidance_2=2.0), "--guidance-2 2: it is for the second expert"),
        ("wan", dict(guidance=0.0), "--guidance 0: below 1"),
        ("i2v, two experts", dict(guidance=2.0, guidance_2=0.9), "--guidance-2 0.9: below 1"),
        ("wan", dict(frames=4), "one more than a multiple of 2"),
        ("wan", dict(width=36), "multiples of 8"),
        ("ti2v", dict(width=40), "multiples of 16"),
        ("hunyuan", dict(frames=6), "one more than a multiple of 4"),
        (
            "hunyuan",
            dict(batched_guidance=True),
            "--batched-guidance: a .* takes its guidance as an input",
        ),
    ],
)
def test_settings_that_a_family_cannot_take_are_one_clear_line(
    family, settings, line, tmp_path, picture
):
    folder = folder_of(family, tmp_path, picture)["model"]
    with pytest.raises(InputError, match=line):
        models.load(folder, torch.float32, **{**FAMILIES[family][2], **settings})


def test_prompts_that_a_family_cannot_take_are_one_clear_line(tmp_path, picture):
    i2v = folder_of("i2v", tmp_path, picture)["model"]
    for prompts, line in (
        (["a red circle moving left"], "has no image. Write lines IMAGE <tab> CAPTION"),
        (
            [f"{tmp_path}/none.png\ta red circle moving left"],
            "there is no image .*none.png. Paths count from",
        ),
    ):
        with pytest.raises(InputError, match=line):
            models.load(i2v, torch.float32, prompts, **CLIP)
    models.load(i2v, torch.float32, [f"{picture}\ta red circle moving left"], **CLIP)
    with pytest.raises(InputError, match="has an image, which this model does not take"):
        models.load("tiny-flux", torch.float32, [f"{picture}\ta square"])


def test_a_file_that_is_no_picture_is_one_clear_line(tmp_path, picture):
    i2v = folder_of("i2v", tmp_path, picture)["model"]
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(InputError, match="image .*words.png does not load"):
        models.load(i2v, torch.float32, [f"{tmp_path}/words.png\ta red circle moving left"], **CLIP)


def test_of_many_images_the_first_are_read_and_the_rest_are_there(tmp_path, picture):
    many = [tmp_path / f"{i}.png" for i in range(5000)]
    for path in many:
        os.link(picture, path)
    prompts = [f"{path}\ta red circle moving left" for path in many for _ in range(2)]
    started = time.process_time()
    WanImageToVideo.check(prompts)
    # 0.3 on a slow core; all of them to their end would be 10 times that
    assert time.process_time() - started < 2
    many[100].unlink()
    many[100].write_text("no picture")
    with pytest.raises(InputError, match="image .*100.png does not load"):
        WanImageToVideo.check(prompts)
    many[4000].unlink()
    many[4000].write_text("no picture")  # found when its turn comes
    model = WanImageToVideo(pipelines.wan(images=True), **CLIP)
    with pytest.raises(InputError, match="image .*4000.png does not load"):
        model.encode([f"{many[4000]}\ta red circle moving left"])
    many[4500].unlink()
    with pytest.raises(InputError, match="there is no image .*4500.png"):
        WanImageToVideo.check(prompts[2 * 101 :])


def test_sds_schedule_takes_no_shift_and_ddim_no_eta_above_one():
    with pytest.raises(InputError, match="--shift 3: this model has its own schedule"):
        StableDiffusion(pipelines.sd(), height=32, width=32).sigmas(8, 3.0)
    args = defaults(cli.Args, sde="ddim", noise_level=1.5)
    with pytest.raises(InputError, match="--noise-level 1.5: must be at most 1 with --sde ddim"):
        cli.check(args)


@pytest.mark.parametrize("targets", ["no_such_layer", "(("])
def test_lora_targets_that_name_no_layer_leave_no_folder_behind(train, tmp_path, targets):
    with pytest.raises(InputError, match="--lora-targets"):
        train(lora_rank=2, lora_targets=targets)
    assert not (tmp_path / "run/config.json").exists()


def test_a_folder_may_lack_sd3s_t5(tmp_path, picture):
    """Many leave it out, as diffusers' documentation shows; no other part."""
    folder = Path(folder_of("sd3 without T5", tmp_path, picture)["model"])
    assert models.load(str(folder), torch.float32).try_out("a red circle").isfinite().all()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    with pytest.raises(InputError, match="model .*/model does not load .*text_encoder_2"):
        models.load(str(folder), torch.float32)


@pytest.mark.parametrize("layer", [r"attn\.to_add_out", r"txt_mlp\.net\.2"])
def test_lora_targets_whose_output_is_not_used_are_refused(train, tmp_path, picture, layer):
    """Data parallelism would wait for their gradients for ever."""
    settings = folder_of("qwen", tmp_path, picture)
    with pytest.raises(InputError, match="transformer_blocks.1.*, whose output is not used"):
        train(**settings, lora_rank=2, lora_targets=r"transformer_blocks\.\d+\." + layer)
    folder, _ = train(
        **settings, lora_rank=2, lora_targets=r"transformer_blocks\.0\." + layer, steps=1
    )
    assert (folder / "export").is_dir()


def test_lora_targets_choose_the_layers(train):
    folder, _ = train(lora_rank=2, lora_targets=r".*attn\.to_q", steps=1)
    saved = torch.load(folder / "checkpoints/step_000001/transformer.pt", weights_only=True)
    assert saved and all(".attn.to_q." in name for name in saved)


def test_pipelines_of_other_classes_are_one_clear_line(tmp_path, picture):
    folder = Path(folder_of("sd", tmp_path, picture)["model"])
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"})
    )
    with pytest.raises(
        InputError,
        match="StableDiffusionXLPipeline. Supported are FluxPipeline, FluxKontextPipeline, Sta",
    ):
        models.load(str(folder), torch.float32)


def test_the_table_of_models_names_sizes_lora_layers_and_blocks():
    text = models.table(models.MODELS)
    for name, values in models.MODELS.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
        assert str(values["sampling_steps"]) in line and str(values["learning_rate"]) in line
        assert values["reward"][0] in line and Path(values["prompts"]).name in line
    for cls in (
        Flux,
        FluxKontext,
        StableDiffusion,
        StableDiffusion3,
        QwenImage,
        QwenImageEdit,
        Flux2Klein,
        ZImage,
        Wan,
        WanImageToVideo,
        HunyuanVideo,
    ):
        assert cls.lora_targets in text and ", ".join(cls.blocks) in text
    assert "image-to-video" in text and str(models.ASSETS) not in text


def test_a_named_model_keeps_its_settings_with_weights_from_elsewhere(train, tmp_path, monkeypatch):
    from evaluation import trained

    shutil.copytree(models.settings("tiny-flux")["source"], tmp_path / "mine")
    _, expected = train(steps=1)
    folder, rows = train(steps=1, source=str(tmp_path / "mine"), output="local")
    assert rows == expected and defaults(grpo_base.Args, source="mine").steps == 40
    monkeypatch.setattr("sys.argv", ["grpo_base.py", "--output", str(folder), "--resume"])
    assert (
        cli.parse(grpo_base.Args, "").source
        == trained.find(folder).settings().source
        == str(tmp_path / "mine")
    )
    shutil.rmtree(tmp_path / "mine/vae")
    with pytest.raises(InputError, match=r"other contents of --model \(vae/config.json\)"):
        train(steps=2, source=str(tmp_path / "mine"), output="local", resume="latest")
    with pytest.raises(InputError, match="mine has no vae; download the whole model again"):
        train(
            steps=2,
            source=str(tmp_path / "mine"),
            output="local",
            resume="latest",
            resume_anyway=True,
        )


# --- Full sizes ---

# the configurations of the released checkpoints, where they differ from the classes' defaults
FULL = {
    "flux": (FluxTransformer2DModel, dict(guidance_embeds=True), Flux, 11.90e9),
    "sd1.4": (
        UNet2DConditionModel,
        dict(sample_size=64, cross_attention_dim=768),
        StableDiffusion,
        0.8595e9,
    ),
    "sd3.5-medium": (SD3Transformer2DModel, SD3, StableDiffusion3, 2.24e9),
    "qwen-image": (QwenImageTransformer2DModel, dict(), QwenImage, 20.43e9),
    "flux2-klein-4b": (Flux2Transformer2DModel, KLEIN_4B, Flux2Klein, 3.88e9),
    "z-image": (ZImageTransformer2DModel, dict(), ZImage, 6.15e9),
    "flux-kontext": (
        FluxTransformer2DModel,
        dict(guidance_embeds=True),
        FluxKontext,
        11.90e9,
    ),
    "qwen-image-edit": (QwenImageTransformer2DModel, dict(), QwenImageEdit, 20.43e9),
    "wan2.1-1.3b": (
        WanTransformer3DModel,
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        Wan,
        1.42e9,
    ),
    "wan2.1-14b": (WanTransformer3DModel, dict(), Wan, 14.29e9),
    "wan2.2-ti2v-5b": (WanTransformer3DModel, TI2V, Wan, 5.0e9),
    "wan2.2-i2v": (WanTransformer3DModel, dict(in_channels=36), WanImageToVideo, 14.29e9),
    "hunyuan": (HunyuanVideoTransformer3DModel, dict(guidance_embeds=True), HunyuanVideo, 12.82e9),
}


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_have_the_parameters_blocks_and_lora_layers_that_they_should(name):
    transformer, config, family, parameters = FULL[name]
    with torch.device("meta"):
        module = transformer(**config)
    assert sum(weight.numel() for weight in module.parameters()) == pytest.approx(
        parameters, rel=0.02
    )
    assert set(family.blocks) <= {type(part).__name__ for part in module.modules()}
    targets = {
        key for key, part in module.named_modules() if re.fullmatch(family.lora_targets, key)
    }
    assert all(isinstance(module.get_submodule(key), torch.nn.Linear) for key in targets)
    inside = sum(module.get_submodule(key).weight.numel() for key in targets)
    if family is not StableDiffusion:  # its weights are convolutions for the most part
        # all of the blocks' own linear layers but those that make modulations
        assert inside > 0.6 * parameters
    assert len(targets) >= 100
    assert name in models.MODELS and models.MODELS[name]["sampling_steps"] in (8, 10, 12, 16, 50)
