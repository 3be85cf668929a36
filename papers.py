"""Set the defaults of each script for each named model, {model: {flag: value}}.

The table in common/models has the settings of a model for any script, and those of DanceGRPO, on
which all three papers build. This file replaces them by the settings that a script's paper prints.
A pair of script and model with `paper` is from that paper. For the other pairs the script and the
model suggest the values. docs/reproduce.md lists the versions of the papers and has the commands
for their tables. tests/test_reproduce.py compares those with the printed settings.
"""

from common import models

# arXiv ids. The settings are those of v1 of BPGO, SLAS and Self-Paced GRPO. BPGO_RELEASED and
# SELF_PACED_V4 have those that the released code and v4 change.
_DANCE = "2505.07818"
_FLOW = "2505.05470"
_BPGO = "2511.18919"
_SLAS = "2605.10937"
_PACED = "2511.19356"  # v1 (November 2025)
_PACED_V4 = "2511.19356v4"  # July 2026


def over_the_models(own: dict[str, dict]) -> dict[str, dict]:
    """Return {model: settings} of every named model, with the settings in `own` replaced."""
    return {name: {**settings, **own.get(name, {})} for name, settings in models.MODELS.items()}


# DanceGRPO's published code: FLUX on 16 GPUs with one prompt each, Stable Diffusion on 8 with four
# and two updates, HunyuanVideo on 32 with one, by visual quality alone. Flow-GRPO's, for PickScore:
# 48 prompts, and a weight of .01 of a KL that is -dt times ours, a tenth on average of 10 steps.
# Its code divides by the standard deviation of all samples, its paper and this script by the
# group's. No paper trains Z-Image, FLUX.2 klein or Wan2.2 TI2V. Prompts per step and reward of the
# first two are Flow-Factory's, the prompts per step of the last verl-omni's. FLUX Kontext and
# Qwen-Image-Edit are in no paper's recipe either (common/models/presets.py).
GRPO = over_the_models(
    {
        "flux": dict(paper=_DANCE, prompts_per_step=16),
        "sd1.4": dict(paper=_DANCE, prompts_per_step=32, minibatches=2),
        "sd3.5-medium": dict(paper=_FLOW, prompts_per_step=48, kl_coef=1e-3, reward=("pickscore",)),
        "qwen-image": dict(paper=_FLOW, prompts_per_step=32, reward=("pickscore",)),
        "z-image": dict(prompts_per_step=48, reward=("pickscore",)),
        "flux2-klein-4b": dict(prompts_per_step=48, reward=("pickscore",)),
        "wan2.2-ti2v-5b": dict(prompts_per_step=64),
        "hunyuan": dict(paper=_DANCE, prompts_per_step=32, steps=200, reward=("videoalign:vq",)),
    }
)

# Section 4.1 and appendix B. The videos' captions are not public; --prompts has DanceGRPO's
# instead.
_T2V = dict(prior="sft", reward=("videoclip-xl",), group_size=8, best_of=0)
BPGO = over_the_models(
    {
        "flux": dict(paper=_BPGO, reward=("hpsv2",)),
        "sd1.4": dict(reward=("hpsv2",)),
        "sd3.5-medium": dict(reward=("hpsv2",)),
        "qwen-image": dict(reward=("hpsv2",)),
        "z-image": dict(reward=("hpsv2",)),
        "flux2-klein-4b": dict(reward=("hpsv2",)),
        "wan2.1-1.3b": dict(_T2V, paper=_BPGO, prompts_per_step=32, steps=200),
        "wan2.1-14b": _T2V,
        "wan2.2-ti2v-5b": _T2V,
        "wan2.2-i2v": dict(_T2V, paper=_BPGO, prior="first-frame"),
        "hunyuan": _T2V,
    }
)

# --variant released: TeleBoost (commit d4279ac), the code of BPGO's authors.
BPGO_RELEASED = {"": dict(alpha=1.0)}

# Section 6.1: two nodes of 8 GPUs for FLUX, one for Stable Diffusion, otherwise as DanceGRPO, whose
# code adds up advantages.
_MIXED = dict(paper=_SLAS, prompts="hpdv2", aggregate="advantages")
SLAS = over_the_models(
    {
        "flux": dict(GRPO["flux"], **_MIXED, reward=("hpsv2.1=0.7", "clip-h=1.4")),
        "sd1.4": dict(GRPO["sd1.4"], **_MIXED, reward=("hpsv2.1", "clip-h")),
    }
)

# 2511.19356v1, section 5.2 and appendix A. It prints two thresholds for three stages, so the last
# one is used twice. Images have no smoothness to judge, so they have two stages instead of three.
_JUDGED = dict(
    reward=("judge:quality", "judge:smoothness", "judge:alignment"), thresholds=(0.75, 0.75, 0.75)
)
_JUDGED_IMAGES = dict(reward=("judge:quality", "judge:alignment"), thresholds=(0.75, 0.75))
_JUDGED_EDITS = dict(reward=("judge:preserve", "judge:edit"), thresholds=(0.75, 0.75))
_SHAPES = dict(reward=("verifier:quality", "verifier:layout", "verifier"))
_MOTION = dict(reward=("motion:quality", "motion:smooth", "motion"))
SELF_PACED = over_the_models({
    "flux": _JUDGED_IMAGES,
    "sd1.4": _JUDGED_IMAGES,
    "sd3.5-medium": _JUDGED_IMAGES,
    "qwen-image": _JUDGED_IMAGES,
    "z-image": _JUDGED_IMAGES,
    "flux2-klein-4b": _JUDGED_IMAGES,
    "flux-kontext": _JUDGED_EDITS,
    "qwen-image-edit": _JUDGED_EDITS,
    "wan2.1-1.3b": dict(_JUDGED, paper=_PACED),
    "wan2.1-14b": dict(_JUDGED, paper=_PACED, thresholds=(0.75, 0.73, 0.73)),
    "wan2.2-ti2v-5b": _JUDGED,
    "wan2.2-i2v": _JUDGED,
    "hunyuan": dict(
        _JUDGED, paper=_PACED, thresholds=(0.7, 0.68, 0.68), height=240, width=416, group_size=16,
        noise_level=0.5, learning_rate=2e-6, prompts_per_step=16,
    ),
    "points": dict(
        reward=("points:quality", "points:layout", "points"), thresholds=(0.686, 0.678, 0.596),
    ),
    "tiny-flux": _SHAPES,  # the script's own thresholds, from --calibrate as those below
    "tiny-sd": dict(_SHAPES, thresholds=(0.963, 0.859, 0.587)),
    "tiny-wan": dict(_MOTION, thresholds=(0.875, 0.441, 0.370)),
    "tiny-wan-i2v": dict(_MOTION, thresholds=(0.922, 0.637, 0.587)),
    "tiny-letters": dict(reward=("letters:quality", "ocr"), thresholds=(0.9, 0.8)),
})  # fmt: skip

# --variant v4: what v4 of the paper prints instead. Its softmax has no alpha. It does not print the
# prompts of a step: here one for each GPU.
SELF_PACED_V4 = {
    "": dict(alpha=1.0),
    "wan2.1-1.3b": dict(paper=_PACED_V4, frames=81, fps=16.0, steps=220, prompts_per_step=16),
    "wan2.1-14b": dict(paper=_PACED_V4, fps=16.0, steps=220, prompts_per_step=32),
    "hunyuan": dict(paper=_PACED_V4, prompts_per_step=32),
}
