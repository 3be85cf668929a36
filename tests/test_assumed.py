"""Folders that mean something else than a family computes: refused by name before any weight is
loaded, never run on the defaults of a class."""

import json
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from common import models
from common.errors import InputError
from common.models import folder
from common.models.sd import StableDiffusion

MADE = {"sd3": pipelines.sd3, "qwen": pipelines.qwen, "hunyuan": pipelines.hunyuan}
MADE |= {"z-image": pipelines.z_image, "flux2": pipelines.flux2}
TINY = {"flux": "tiny-flux", "sd": "tiny-sd", "wan": "tiny-wan", "i2v": "tiny-wan-i2v"}
BETAS = dict(beta_start=0.001, beta_end=0.01, beta_schedule="linear")
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(family) -> the folder of a small pipeline; it is not changed."""
    made = {}

    def of(family):
        if family in TINY:
            return models.ASSETS / TINY[family]
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            MADE[family]().save_pretrained(made[family])
        return made[family]

    return of


@pytest.fixture
def copy(saved, tmp_path):
    """copy(family) -> a copy of its folder with links to the weights"""

    def made(family):
        place = tmp_path / "model"
        for path in saved(family).rglob("*"):
            to = place / path.relative_to(saved(family))
            to.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                shutil.copy(path, to)
            elif path.is_file():
                to.symlink_to(path)
        return place

    return made


def change(file, **values):
    """Set names of a configuration; ... removes one."""
    config = {**json.loads(file.read_text()), **values}
    config = {name: value for name, value in config.items() if value is not ...}
    file.write_text(json.dumps(config))


def put_scheduler(model, scheduler):
    shutil.rmtree(model / "scheduler")
    scheduler.save_pretrained(model / "scheduler")
    change(model / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])


def check(model):
    folder.check(models.family_of(str(model)), model)


# family, part, {name: value; ... for none}, words of the error
OTHER = [
    ("sd", "scheduler", {"beta_start": ...}, "no beta_start. Supported is a number"),
    ("sd", "scheduler", {"beta_schedule": ...}, "no beta_schedule. Supported is linear or scaled"),
    ("sd", "scheduler", {"num_train_timesteps": ...}, "no num_train_timesteps"),
    ("sd", "scheduler", {"prediction_type": "v_prediction"}, "Supported is none or epsilon"),
    ("sd", "scheduler", {"prediction_type": "sample"}, "'sample'"),
    ("sd", "scheduler", {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
    ("sd", "scheduler", {"thresholding": True}, "thresholding True"),
    ("sd", "unet", {"in_channels": 9}, "in_channels 9. Supported is 8"),
    ("sd", "unet", {"out_channels": 16}, "out_channels 16"),
    ("sd", "unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256. Supported is none"),
    ("sd", "unet", {"sample_size": [64, 96]}, r"sample_size \[64, 96\]. Supported is an integer"),
    ("flux", "transformer", {"in_channels": 96}, "in_channels 96. Supported is 32"),
    ("flux", "transformer", {"guidance_embeds": ...}, "no guidance_embeds. Supported is True or"),
    ("flux", "vae", {"shift_factor": None}, "shift_factor None. Supported is a number"),
    ("flux", "vae", {"scaling_factor": ...}, "no scaling_factor"),
    ("flux", "scheduler", {"num_train_timesteps": 500}, "timesteps 500. Supported is 1000"),
    ("flux", "scheduler", {"invert_sigmas": True}, "invert_sigmas True"),
    ("sd3", "transformer", {"in_channels": 33}, "in_channels 33. Supported is 4"),
    ("sd3", "transformer", {"patch_size": [2, 2]}, r"patch_size \[2, 2\]"),
    ("sd3", "vae", {"shift_factor": ...}, "no shift_factor"),
    ("qwen", "transformer", {"guidance_embeds": True}, "guidance_embeds True"),
    ("qwen", "transformer", {"zero_cond_t": True}, "zero_cond_t True. Supported is none or False"),
    ("qwen", "transformer", {"patch_size": 1}, "patch_size 1. Supported is 2"),
    ("qwen", "vae", {"latents_std": ...}, "no latents_std. Supported is a list"),
    ("z-image", "transformer", {"in_channels": 16}, "in_channels 16. Supported is 4"),
    ("z-image", "transformer", {"siglip_feat_dim": 8}, "siglip_feat_dim 8. Supported is none"),
    ("z-image", "transformer", {"all_patch_size": [2, 4]}, r"all_patch_size \[2, 4\]"),
    ("flux2", "transformer", {"in_channels": 32}, "in_channels 32. Supported is 16"),
    ("flux2", "transformer", {"guidance_embeds": ...}, "no guidance_embeds. Supported is False"),
    ("flux2", "vae", {"batch_norm_eps": None}, "batch_norm_eps None. Supported is a number"),
    ("wan", "transformer", {"in_channels": 36}, "in_channels 36. Supported is 8"),
    ("wan", "vae", {"latents_mean": None}, "latents_mean None"),
    ("i2v", "transformer_2", {"in_channels": 8}, "transformer_2/.* in_channels 8. Supported is 18"),
    ("i2v", "transformer", {"pos_embed_seq_len": 514}, "pos_embed_seq_len 514. Supported is none"),
    ("hunyuan", "transformer", {"image_condition_type": "latent_concat"}, "image_condition_type"),
    ("hunyuan", "transformer", {"in_channels": 9}, "in_channels 9. Supported is 4"),
    ("hunyuan", "scheduler", {"shift": ...}, "no shift. Supported is a number"),
]  # fmt: skip


@pytest.mark.parametrize("family, part, values, words", OTHER)
def test_another_value_than_a_family_assumes_is_refused_by_name(family, part, values, words, copy):
    model = copy(family)
    check(model)
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    change(model / part / file, **values)
    with pytest.raises(InputError, match=words) as error:
        check(model)
    line = str(error.value)
    assert line.startswith(f"model: {model / part / file} has ") and "\n" not in line
    assert line.endswith("Give another --model.")


@pytest.mark.parametrize(
    "family, scheduler",
    [
        ("sd", FlowMatchEulerDiscreteScheduler(shift=2.0)),
        ("sd", EDMEulerScheduler()),
        ("sd", UniPCMultistepScheduler(**BETAS, **FLOW)),
        ("sd", EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction")),
        ("flux", DDIMScheduler()),
        ("sd3", EDMEulerScheduler()),
        ("qwen", PNDMScheduler()),
        ("z-image", DDIMScheduler()),
        ("wan", UniPCMultistepScheduler(flow_shift=5.0)),
        ("hunyuan", DDPMScheduler()),
    ],
)
def test_a_scheduler_of_another_kind_of_model_is_refused(family, scheduler, copy):
    model = copy(family)
    put_scheduler(model, scheduler)
    with pytest.raises(InputError, match="scheduler_config.json has .*Supported is"):
        check(model)


@pytest.mark.parametrize(
    "family, scheduler",
    [
        ("sd", PNDMScheduler(**BETAS, skip_prk_steps=True)),
        ("sd", EulerDiscreteScheduler(**BETAS)),
        ("sd", DDIMScheduler(trained_betas=[0.001] * 1000)),
        ("flux", FlowMatchHeunDiscreteScheduler(shift=3.0)),
        ("wan", UniPCMultistepScheduler(flow_shift=5.0, **FLOW)),
    ],
)
def test_schedulers_of_the_same_kind_pass(family, scheduler, copy):
    model = copy(family)
    put_scheduler(model, scheduler)
    check(model)


def test_settings_of_a_scheduler_that_the_indexs_class_does_not_know_are_refused(copy):
    """The class would take its defaults."""
    model = copy("flux")
    shift = UniPCMultistepScheduler(flow_shift=3.0, **FLOW)
    shift.save_pretrained(model / "scheduler")
    with pytest.raises(InputError, match="is of UniPCMultistepScheduler, not FlowMatchEuler"):
        check(model)


def test_settings_of_a_compatible_scheduler_are_read_as_diffusers_reads_them(copy):
    model = copy("sd")
    PNDMScheduler(**BETAS).save_pretrained(model / "scheduler")
    check(model)


# --- Released configurations, as far as something is assumed of them ---

FLOWMATCH = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000)
VAE_16 = dict(latent_channels=16, sample_size=1024)
NUMBERS = [0.0] * 16
UNIPC = dict(_class_name="UniPCMultistepScheduler", num_train_timesteps=1000, **FLOW)
RELEASED = {
    "FluxPipeline": dict(
        scheduler=dict(FLOWMATCH, shift=3.0),
        transformer=dict(in_channels=64, patch_size=1, guidance_embeds=True),
        vae=dict(VAE_16, scaling_factor=0.3611, shift_factor=0.1159),
    ),
    "FluxKontextPipeline": dict(
        scheduler=dict(FLOWMATCH, shift=3.0),
        transformer=dict(in_channels=64, patch_size=1, guidance_embeds=True),
        vae=dict(VAE_16, scaling_factor=0.3611, shift_factor=0.1159),
    ),
    # CompVis/stable-diffusion-v1-4: neither prediction_type nor scaling_factor
    "StableDiffusionPipeline": dict(
        scheduler=dict(
            _class_name="PNDMScheduler", beta_start=0.00085, beta_end=0.012,
            beta_schedule="scaled_linear", num_train_timesteps=1000, trained_betas=None,
        ),
        unet=dict(in_channels=4, out_channels=4, sample_size=64),
        vae=dict(latent_channels=4, sample_size=512),
    ),
    "StableDiffusion3Pipeline": dict(
        scheduler=dict(FLOWMATCH, shift=3.0),
        transformer=dict(in_channels=16, out_channels=16, patch_size=2, sample_size=128),
        vae=dict(VAE_16, scaling_factor=1.5305, shift_factor=0.0609),
    ),
    "QwenImagePipeline": dict(
        scheduler=dict(FLOWMATCH, shift=1.0, invert_sigmas=False),
        transformer=dict(
            in_channels=64, out_channels=16, patch_size=2, num_layers=60, guidance_embeds=False
        ),
        vae=dict(z_dim=16, latents_mean=NUMBERS, latents_std=NUMBERS),
    ),
    "QwenImageEditPlusPipeline, 2511": dict(
        scheduler=dict(FLOWMATCH, shift=1.0, invert_sigmas=False),
        transformer=dict(
            in_channels=64, out_channels=16, patch_size=2, num_layers=60, guidance_embeds=False,
            zero_cond_t=True,
        ),
        vae=dict(z_dim=16, latents_mean=NUMBERS, latents_std=NUMBERS),
    ),
    "QwenImageEditPlusPipeline": dict(
        scheduler=dict(FLOWMATCH, shift=1.0, invert_sigmas=False),
        transformer=dict(
            in_channels=64, out_channels=16, patch_size=2, num_layers=60, guidance_embeds=False
        ),
        vae=dict(z_dim=16, latents_mean=NUMBERS, latents_std=NUMBERS),
    ),
    "Flux2KleinPipeline": dict(
        scheduler=dict(FLOWMATCH, shift=3.0, use_dynamic_shifting=True),
        transformer=dict(
            in_channels=128, out_channels=None, patch_size=1, joint_attention_dim=7680,
            guidance_embeds=False,
        ),
        vae=dict(latent_channels=32, patch_size=[2, 2], batch_norm_eps=0.0001),
    ),
    "ZImagePipeline": dict(
        scheduler=dict(FLOWMATCH, shift=6.0, use_dynamic_shifting=False),
        transformer=dict(
            in_channels=16, all_patch_size=[2], all_f_patch_size=[1], cap_feat_dim=2560
        ),
        vae=dict(VAE_16, scaling_factor=0.3611, shift_factor=0.1159),
    ),
    "WanPipeline": dict(
        scheduler=UNIPC,
        transformer=dict(in_channels=16, out_channels=16, patch_size=[1, 2, 2]),
        vae=dict(z_dim=16, latents_mean=NUMBERS, latents_std=NUMBERS),
    ),
    "WanPipeline, TI2V": dict(
        scheduler=UNIPC,
        transformer=dict(in_channels=48, out_channels=48, patch_size=[1, 2, 2]),
        vae=dict(z_dim=48, latents_mean=3 * NUMBERS, latents_std=3 * NUMBERS),
    ),
    "WanImageToVideoPipeline": dict(
        scheduler=UNIPC,
        transformer=dict(in_channels=36, out_channels=16, patch_size=[1, 2, 2]),
        transformer_2=dict(in_channels=36, out_channels=16, patch_size=[1, 2, 2]),
        vae=dict(z_dim=16, latents_mean=NUMBERS, latents_std=NUMBERS),
    ),
    "HunyuanVideoPipeline": dict(
        scheduler=dict(FLOWMATCH, shift=7.0),
        transformer=dict(in_channels=16, out_channels=16, patch_size=2, guidance_embeds=True),
        vae=dict(latent_channels=16, scaling_factor=0.476986),
    ),
}  # fmt: skip


def test_every_family_has_a_released_model():
    """All but that of the points, which are embedded."""
    released = {name.partition(",")[0] for name in RELEASED}
    assert released == set(models.FAMILIES) - {"PointsPipeline"}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_have_what_their_family_assumes(name):
    configs = RELEASED[name]
    assumed = models._family(name.partition(",")[0]).assumed(configs)
    assert assumed.keys() == configs.keys()
    for part, values in assumed.items():
        for name, allowed in values.items():
            folder.require(Path(part), configs[part], name, allowed)


def test_a_distilled_model_takes_no_guidance(copy):
    model = copy("flux2")
    change(model / "model_index.json", is_distilled=True)
    size = dict(height=32, width=32)
    with pytest.raises(InputError, match="--guidance 4: this model is distilled and takes no"):
        models.load(str(model), torch.float32, guidance=4.0, **size)
    assert models.load(str(model), torch.float32, guidance=1.0, **size).guidance == 1


def test_ti2v_is_text_to_video_alone(copy):
    model = copy("i2v")
    change(model / "model_index.json", expand_timesteps=True)
    with pytest.raises(InputError, match="TI2V with a first frame is not supported"):
        models.load(str(model), torch.float32, height=32, width=32, frames=5)


# --- Two experts, and the first step of Stable Diffusion ---


def test_two_experts_need_the_boundary_between_them(copy):
    """Without it the second one would be trained, and never used."""
    model = copy("i2v")
    change(model / "model_index.json", boundary_ratio=None)
    with pytest.raises(InputError, match="transformer_2 and no boundary_ratio"):
        models.load(str(model), torch.float32, height=32, width=32, frames=5)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize(
    "zero", [dict(rescale_betas_zero_snr=True), dict(trained_betas=[*[0.005] * 999, 1.0])]
)
def test_a_first_step_of_pure_noise_is_refused_with_its_names(spacing, zero, copy):
    """A prediction of the noise says nothing about the image there: diffusers' own pipeline makes
    images that are not finite."""
    model = copy("sd")
    file = model / "scheduler/scheduler_config.json"
    change(file, timestep_spacing=spacing, **zero)
    with pytest.raises(InputError, match=f"timestep_spacing {spacing}, rescale_betas_zero_snr"):
        models.load(str(model), torch.float32)
    change(file, timestep_spacing="leading")
    sigmas = models.load(str(model), torch.float32).sigmas(8, 1.0)
    assert sigmas[0] < 1 and (sigmas.diff() < 0).all()


def test_trailing_steps_that_begin_below_pure_noise_are_supported():
    pipe = pipelines.sd()
    pipe.scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    model = StableDiffusion(pipe, height=32, width=32)
    assert model.sigmas(8, 1.0)[0] == model.table[999].float() < 1
