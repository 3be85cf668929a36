"""--shift scheduler and numbers: the noise levels of training are those that a plain diffusers
pipeline visits, with the code of the model card. The pipelines are small; the settings of their
schedulers are those of the released models."""

import copy
import json

import editing  # noqa: F401, small areas
import numpy as np
import pipelines
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

import evaluate
import grpo_base
from common import cli, models, sde
from common.errors import InputError
from common.models.flux import Flux, FluxKontext
from common.models.flux2 import Flux2Klein
from common.models.hunyuan import HunyuanVideo
from common.models.qwen import QwenImage
from common.models.qwen_edit import QwenImageEdit
from common.models.sd import StableDiffusion
from common.models.sd3 import StableDiffusion3
from common.models.wan import Wan, WanImageToVideo
from common.models.z_image import ZImage
from common.reporting import card
from common.trainer import run_folder
from evaluation import trained

DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, base_image_seq_len=256)
FLUX = FlowMatchEulerDiscreteScheduler(
    shift=3.0, max_shift=1.15, max_image_seq_len=4096, **DYNAMIC
)  # FLUX.1-dev
SD3 = FlowMatchEulerDiscreteScheduler(shift=3.0)  # Stable Diffusion 3.5 medium
QWEN = FlowMatchEulerDiscreteScheduler(
    shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, **DYNAMIC
)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
WAN = UniPCMultistepScheduler(flow_shift=3.0, **FLOW)  # Wan2.1
TI2V = UniPCMultistepScheduler(flow_shift=5.0, **FLOW)  # Wan2.2 TI2V
HUNYUAN = FlowMatchEulerDiscreteScheduler(shift=7.0)  # HunyuanVideo
Z_IMAGE = FlowMatchEulerDiscreteScheduler(shift=6.0)  # Z-Image; Turbo 3
KLEIN = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # FLUX.2 klein
PICTURE = Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8))
# {name: (pipeline, family, released scheduler, sizes)}
FAMILIES = {
    "flux": (pipelines.flux, Flux, FLUX, [(32, 32), (256, 512), (720, 720)]),
    "sd3": (pipelines.sd3, StableDiffusion3, SD3, [(32, 32), (48, 64)]),
    "sd3, dynamic": (pipelines.sd3, StableDiffusion3, FLUX, [(32, 32), (48, 64)]),
    "qwen": (pipelines.qwen, QwenImage, QWEN, [(32, 32), (128, 192)]),
    "flux2": (pipelines.flux2, Flux2Klein, KLEIN, [(32, 32), (128, 192)]),
    "z-image": (pipelines.z_image, ZImage, Z_IMAGE, [(32, 32), (48, 64)]),
    "z-image, dynamic": (pipelines.z_image, ZImage, FLUX, [(48, 64)]),
    "wan": (pipelines.wan, Wan, WAN, [(32, 32), (48, 64)]),
    "wan, Euler": (pipelines.wan, Wan, SD3, [(32, 32)]),
    "ti2v": (pipelines.ti2v, Wan, TI2V, [(32, 32), (48, 64)]),
    "i2v": (lambda: pipelines.wan(images=True), WanImageToVideo, WAN, [(32, 32)]),
    "hunyuan": (pipelines.hunyuan, HunyuanVideo, HUNYUAN, [(32, 32), (48, 64)]),
    "kontext": (pipelines.kontext, FluxKontext, FLUX, [(32, 32), (64, 128)]),
    "qwen-edit": (pipelines.qwen_edit, QwenImageEdit, QWEN, [(32, 64)]),
    "sd": (pipelines.sd, StableDiffusion, None, [(32, 32)]),
}


def build(family, height, width):
    make, cls, scheduler, _ = FAMILIES[family]
    pipe = make()
    pipe.scheduler = copy.deepcopy(scheduler or pipe.scheduler)
    size = dict(height=height, width=width, **({"frames": 5} if cls.video else {}))
    return cls(pipe, **size)


@torch.no_grad()
def visited(model, steps, **settings):
    """The sigmas [T+1] of the scheduler after a call of the real pipeline, None for one that has
    none, and the timesteps [T] that its network saw."""
    pipe, seen = model.pipe, []
    pipe.set_progress_bar_config(disable=True)

    def see(module, args, inputs):
        timestep = inputs["timestep"] if "timestep" in inputs else args[1]  # a U-Net's second
        timestep = 1 - timestep if isinstance(model, ZImage) else timestep
        seen.append(torch.as_tensor(timestep).flatten()[0].float())

    hook = getattr(pipe, model.trained[0]).register_forward_pre_hook(see, with_kwargs=True)
    settings |= dict(height=model.height, width=model.width, output_type="latent")
    settings |= {"true_cfg_scale" if isinstance(model, QwenImage) else "guidance_scale": 1.0}
    if model.video:
        settings |= dict(num_frames=model.frames)
    if isinstance(model, Flux | StableDiffusion3 | Wan):
        settings |= dict(max_sequence_length=12)
    if model.images:
        settings |= dict(image=PICTURE.resize((model.width, model.height)))
    if isinstance(model, FluxKontext):
        settings |= dict(max_area=model.height * model.width, _auto_resize=False)
    pipe(prompt="a square", num_inference_steps=steps, **settings)
    hook.remove()
    return getattr(pipe.scheduler, "sigmas", None), torch.stack(seen)


CASES = [(name, *size) for name, (_, _, _, sizes) in FAMILIES.items() for size in sizes]


@pytest.mark.parametrize("steps", [2, 10, 16])
@pytest.mark.parametrize("family, height, width", [case for case in CASES if case[0] != "sd"])
def test_the_schedulers_sigmas_are_those_that_the_plain_pipeline_visits(
    family, height, width, steps
):
    model = build(family, height, width)
    before = copy.deepcopy(model.pipe.scheduler.__dict__)
    ours = model.sigmas(steps, "scheduler")
    after = model.pipe.scheduler.__dict__
    assert before.keys() == after.keys() and torch.equal(before["sigmas"], after["sigmas"]), (
        "the pipeline itself is as it was"
    )
    theirs, timesteps = visited(model, steps)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    unit = 1 if isinstance(model, Flux | Flux2Klein | QwenImage | ZImage) else 1000
    apart = (timesteps - ours[:-1] * unit).abs().max()
    assert apart < (1 if model.pipe.scheduler.__class__ is UniPCMultistepScheduler else 1e-3), (
        "UniPC passes whole timesteps"
    )


@pytest.mark.parametrize("family, height, width", CASES)
def test_the_code_on_the_card_makes_a_plain_pipeline_visit_the_sigmas_of_training(
    family, height, width
):
    """For a number, 3.5; Stable Diffusion has one schedule."""
    model, steps = build(family, height, width), 10
    shift = 1.0 if family == "sd" else 3.5
    base = card.Base("owner/name", "text-to-image", model.pipeline.__name__)
    args = cli.defaults(cli.Args, sampling_steps=steps, shift=shift)
    code = card.noise_levels(base, args)
    names = {"pipe": model.pipe}
    exec(code, names)
    # the settings of the call are in the comment above the code
    settings = dict(sigmas=np.linspace(1, 1 / steps, steps)) if "sd3" in family else {}
    assert ("sigmas=numpy.linspace(1, 1 / 10, 10)" in code) == bool(settings)
    ours = model.sigmas(steps, shift)
    if family == "sd":
        _, timesteps = visited(model, steps)
        assert torch.equal(model.table[timesteps.long()].float(), ours[:-1])
        return
    theirs, _ = visited(model, steps, **settings)
    near = 0.001 * shift if isinstance(model, Wan) else 1e-6
    assert len(theirs) == steps + 1 and (ours - theirs).abs().max() <= near
    # without the code it visits others: that of FLUX shifts by its size, Wan's by 3, and so on
    plain, _ = visited(build(family, height, width), steps)
    assert (plain - ours).abs().max() > 0.01


def test_the_schedulers_own_noise_levels_need_no_code_but_stable_diffusions():
    args = cli.defaults(cli.Args, sampling_steps=10, shift="scheduler")
    for family, (_, cls, _, _) in FAMILIES.items():
        code = card.noise_levels(card.Base("a/b", "text-to-image", cls.pipeline.__name__), args)
        assert ("scheduler =" in code) == (family == "sd") and "num_inference_steps=10" in code


def test_the_last_sigmas_are_those_of_flow_grpo():
    """Float64, written out: Stable Diffusion 3.5's scheduler shifts its lowest training sigma and
    then every sigma; Qwen-Image's shifts by size and stretches to .02."""
    u = np.linspace(1, 3 * 0.001 / 1.002, 10)
    expected = [*(3 * u / (1 + 2 * u)), 0]
    found = build("sd3", 32, 32).sigmas(10, "scheduler")
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-7)
    assert found[-2].item() == pytest.approx(0.0089, abs=5e-5)
    assert sde.shifted_sigmas(10, 3.0)[-2].item() == pytest.approx(0.25)
    u = np.linspace(1, 0.1, 10)
    mu = 0.5 + (0.9 - 0.5) / (8192 - 256) * (1024 - 256)  # 512x512: 1024 tokens
    shifted = np.exp(mu) / (np.exp(mu) + 1 / u - 1)
    stretched = 1 - (1 - shifted) / ((1 - shifted[-1]) / 0.98)
    small = build("qwen", 128, 128)  # whose tokens have 4x4 pixels
    assert small.noise_shape[0] == 1024
    found = small.sigmas(10, "scheduler")
    np.testing.assert_allclose(found.numpy(), [*stretched, 0], atol=2e-7)
    assert found[-2].item() == pytest.approx(0.02)


@pytest.mark.parametrize("scheduler, said", [
    (UniPCMultistepScheduler(), "the sigmas of UniPCMultistepScheduler are not 11 falling from 1"),
    (DDIMScheduler(), "DDIMScheduler"),
])  # fmt: skip
def test_a_scheduler_of_another_kind_is_refused_in_one_line(scheduler, said):
    model = build("wan", 32, 32)
    model.pipe.scheduler = scheduler
    with pytest.raises(InputError, match=f"model scheduler.*{said}.*give --shift a number"):
        model.sigmas(10, "scheduler")
    assert torch.equal(model.sigmas(10, 2.0), sde.shifted_sigmas(10, 2.0))


def test_stable_diffusion_has_one_schedule():
    model = build("sd", 32, 32)
    assert torch.equal(model.sigmas(10, "scheduler"), model.sigmas(10, 1.0))


def test_which_models_sample_at_their_schedulers_sigmas():
    of = {name: settings["shift"] for name, settings in models.MODELS.items()}
    own = [name for name, shift in of.items() if shift == "scheduler"]
    assert own == [
        "sd3.5-medium", "qwen-image", "z-image", "flux2-klein-4b", "flux-kontext", "qwen-image-edit"
    ], "those of Flow-GRPO and of public trainers; the others are DanceGRPO's"  # fmt: skip
    assert {of[name] for name in of if name.startswith("wan") or name == "hunyuan"} == {5.0}
    assert of["flux"] == 3.0


def test_a_run_its_resume_and_its_evaluation_keep_the_setting(train, monkeypatch):
    folder, _ = train(steps=1, shift="scheduler")
    config = json.loads((folder / "config.json").read_text())
    assert config["shift"] == trained.find(folder).settings().shift == "scheduler"
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(folder)])
    assert cli.parse(evaluate.Args, "", evaluate.defaults).shift == "scheduler"
    monkeypatch.setattr("sys.argv", ["grpo_base.py"])
    args = run_folder.taken_over(cli.defaults(grpo_base.Args), config)
    args.output, args.resume = str(folder), "latest"
    assert not run_folder.check(folder, args)
    args.shift = 1.0
    with pytest.raises(InputError, match="was started with shift 'scheduler', now it is 1.0"):
        run_folder.check(folder, args)


def test_a_run_from_before_the_setting_keeps_its_number(tmp_path, monkeypatch):
    """0.2.0 trained sd3.5-medium at shift 3 and Qwen-Image at 1.71; --resume continues so."""
    monkeypatch.setattr("sys.argv", ["grpo_base.py"])
    for model, shift in (("sd3.5-medium", 3.0), ("qwen-image", 1.71)):
        args = cli.defaults(grpo_base.Args, model)
        assert args.shift == "scheduler"
        config = {**run_folder.settings(args), "shift": shift}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = run_folder.inherit(args, resume="latest", output=str(tmp_path))
        assert found.shift == shift
        found.resume = "latest"
        assert not run_folder.check(tmp_path, found)


# --- Arithmetic near the last sigma ---


@pytest.mark.parametrize("schedule, eta", [("flow", 0.7), ("flow", 1.2), ("dance", 0.3)])
@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("family", ["sd3", "qwen", "wan"])
def test_float32_transitions_hold_against_float64_at_the_schedulers_sigmas(
    family, steps, schedule, eta
):
    """Log-probability, mean and std of each noisy step, and the change of the log-probability for a
    small change of the velocity."""
    sigmas = build(family, 32, 32).sigmas(steps, "scheduler")
    s = sde.diffusion_coefficients(sigmas, eta, schedule)
    rng = np.random.default_rng(0)
    x, v, z, dv = rng.standard_normal((4, 3, 4096))
    for t in range(steps - 1):
        sigma, after, eps = (float(value) for value in (sigmas[t], sigmas[t + 1], s[t]))
        mean = x + (v + eps**2 / (2 * sigma) * (x + (1 - sigma) * v)) * (after - sigma)
        std = eps * (sigma - after) ** 0.5
        drawn = torch.tensor(mean + std * z, dtype=torch.float32)  # what a rollout stores
        moved = v + 1e-3 * dv
        found = []
        for velocity in (v, moved):
            exact = x + (velocity + eps**2 / (2 * sigma) * (x + (1 - sigma) * velocity)) * (
                after - sigma
            )
            log_prob = -((drawn.double().numpy() - exact) ** 2) / (2 * std**2) - np.log(std)
            log_prob = (log_prob - 0.5 * np.log(2 * np.pi)).mean(1)
            as_float32 = [torch.tensor(value, dtype=torch.float32) for value in (velocity, x)]
            at = (sigmas[t], sigmas[t + 1], s[t])
            _, ours, ours_mean = sde.sde_step(*as_float32, *at, x_next=drawn)
            np.testing.assert_allclose(ours_mean.numpy(), exact, atol=1e-5)
            np.testing.assert_allclose(ours.numpy(), log_prob, atol=1e-5)
            found.append((ours.double().numpy(), log_prob))
        change = np.stack([found[1][i] - found[0][i] for i in (0, 1)])
        assert np.abs(change[0] - change[1]).max() <= 1e-5 and np.isfinite(change).all()
