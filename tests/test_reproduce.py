"""docs/reproduce.md: every command parses, names files that there are, and has the settings that
its paper prints.

The numbers below were read in the papers, not in this code. What stands in none of them is not
compared."""

import re
import shlex

import printed
import pytest
import yaml
from conftest import ROOT

from common.prompts import sets

# 2511.18919, section 4.1 (group sizes, rewards, priors), table 3 (alpha), appendix B.1 (batch,
# GPUs, steps, prompts)
T2V = dict(
    gpus=32, prompts_per_step=32, group_size=8, steps=200, reward=("videoclip-xl",), best_of=0
)
I2V = dict(
    gpus=16, prompts_per_step=16, group_size=8, steps=200, reward=("videoclip-xl",), best_of=0
)
T2I = dict(
    gpus=8,
    prompts_per_step=8,
    group_size=12,
    steps=200,
    reward=("hpsv2",),
    prompts="dancegrpo:images",
)
SFT, FRAME, MEAN = dict(prior="sft"), dict(prior="first-frame"), dict(prior="running-mean")
BPGO = {
    "BPGO, table 1, text to video, GRPO": T2V,
    "BPGO, table 1, text to video, ours": {**T2V, **SFT, "alpha": 0.5},
    "BPGO, table 1, image to video, GRPO": I2V,
    "BPGO, table 1, image to video, ours": {**I2V, **FRAME, "alpha": 0.5},
    "BPGO, table 1, text to image, GRPO": {**T2I, "eval_prompts": "hpsv2:all"},
    "BPGO, table 1, text to image, ours": {
        **T2I,
        **MEAN,
        "alpha": 0.5,
        "eval_prompts": "hpsv2:all",
    },
    **{
        f"BPGO, table 3, alpha {alpha}": {**T2V, **SFT, "alpha": alpha}
        for alpha in (0.1, 0.5, 0.7, 0.9)
    },
}
for task, settings in {"text to video": {**T2V, **SFT}, "image to video": {**I2V, **FRAME}}.items():
    BPGO[f"BPGO, table 2, {task}, RAS"] = {**settings, "beta": 0, "alpha": 0.5}
    BPGO[f"BPGO, table 2, {task}, CRT"] = {**settings, "alpha": 0}
    BPGO[f"BPGO, table 2, {task}, CRT alone"] = {**settings, "crt_alone": True}
BPGO["BPGO, table 2, text to image, RAS"] = {**T2I, **MEAN, "beta": 0, "alpha": 0.5}
BPGO["BPGO, table 2, text to image, CRT"] = {**T2I, **MEAN, "alpha": 0}
BPGO["BPGO, table 2, text to image, CRT alone"] = {**T2I, **MEAN, "crt_alone": True}

# 2605.10937, section 6.1: two nodes of eight GPUs for FLUX, one for SD1.4; HPS-v2.1 and CLIP with
# weights 1:1 and 0.7:1.4; HPD-v2. For several rewards DanceGRPO's code adds up the advantages.
MIXED = dict(prompts="hpdv2", aggregate="advantages")
SD = dict(MIXED, gpus=8, reward=("hpsv2.1", "clip-h"))
FLUX = dict(MIXED, gpus=16, reward=("hpsv2.1=0.7", "clip-h=1.4"))
SLAS = {
    f"SLAS, table 1, {model}, {method}": settings
    for model, settings in {"Stable Diffusion": SD, "FLUX": FLUX}.items()
    for method in ("DanceGRPO", "SLAS")
}

# 2511.19356v1, section 5.2 (size, rate, thresholds, group, steps, GPUs) and appendix A (the rest).
# It prints two thresholds; the third is ours.
PACED = dict(
    sampling_steps=16,
    noise_level=0.5,
    shift=5.0,
    group_size=16,
    best_of=8,
    timestep_fraction=0.6,
    same_noise=True,
    clip_range=1e-4,
    adv_clip_max=5.0,
    weight_decay=1e-4,
    max_grad_norm=1.0,
    frames=53,
    fps=15.0,
    prompts="dancegrpo:videos",
    gradient_checkpointing=True,
    batched_guidance=False,
    minibatches=2,  # of the 8 samples that are kept, the gradients of 4 are accumulated
)
SMALL = dict(
    PACED, height=480, width=832, learning_rate=5e-6, steps=150, gpus=8, prompts_per_step=8
)
LARGE = dict(
    PACED, height=240, width=416, learning_rate=5e-6, steps=220, gpus=16, prompts_per_step=16
)
HUNYUAN = dict(PACED, height=240, width=416, learning_rate=2e-6, steps=100, gpus=16)
THREE = dict(reward=("judge:quality", "judge:smoothness", "judge:alignment"))
J7, J72 = (dict(judge_model=f"Qwen/Qwen2.5-VL-{size}B-Instruct") for size in (7, 72))
SELF_PACED = {
    "Self-Paced, table 1, 1.3B, DanceGRPO": dict(SMALL, reward=("videoalign",)),
    "Self-Paced, table 1, 1.3B, 7B judge": {
        **SMALL,
        **THREE,
        **J7,
        "thresholds": (0.75, 0.75, 0.75),
    },
    "Self-Paced, table 1, 1.3B, 72B judge": {
        **SMALL,
        **THREE,
        **J72,
        "thresholds": (0.75, 0.75, 0.75),
    },
    "Self-Paced, table 1, 14B, 72B judge": {
        **LARGE,
        **THREE,
        **J72,
        "thresholds": (0.75, 0.73, 0.73),
    },
    "Self-Paced, table 2, HunyuanVideo": {
        **HUNYUAN,
        **THREE,
        **J72,
        "thresholds": (0.70, 0.68, 0.68),
    },
    "Self-Paced, table 3, joint": {**SMALL, **THREE, "alpha": 0},
    "Self-Paced, table 3, one stage": {**SMALL, **THREE, "only_stage": 1},
    "Self-Paced, table 3, two stages": {**SMALL, **THREE, "only_stage": 2},
    "Self-Paced, table 3, ours": {
        **SMALL,
        **THREE,
        "only_stage": 0,
        "thresholds": (0.75, 0.75, 0.75),
    },
    "Self-Paced, appendix A, thresholds": {**SMALL, **THREE, "calibrate": True},
    "Self-Paced, figure 7": {**SMALL, **THREE, "steps": 1, "prompts_per_step": 64},
}
# What version 4 of it prints instead (section 5 and its tables)
V4 = dict(variant="v4", alpha=1.0)
SMALL_4 = {**SMALL, **V4, "frames": 81, "fps": 16.0, "steps": 220, "gpus": 16}
SMALL_4["prompts_per_step"] = 16
LARGE_4 = {**LARGE, **V4, "fps": 16.0, "gpus": 32, "prompts_per_step": 32}
HUNYUAN_4 = {**HUNYUAN, **V4, "gpus": 32}
RATED = dict(reward=("videoalign:vq", "videoalign:mq", "videoalign:ta"))
SELF_PACED_4 = {
    "Self-Paced v4, 1.3B, 7B judge": {**SMALL_4, **THREE, **J7},
    "Self-Paced v4, 1.3B, 72B judge": {**SMALL_4, **THREE, **J72},
    "Self-Paced v4, 1.3B, VideoAlign": {**SMALL_4, **RATED},
    "Self-Paced v4, 14B, 72B judge": {**LARGE_4, **THREE, **J72},
    "Self-Paced v4, HunyuanVideo, 72B judge": {**HUNYUAN_4, **THREE, **J72},
}
RELEASED = dict(variant="released", alpha=1.0, crt_slope=50, crt_temperature=5, prior_variance=1)
RELEASED["trust_range"] = (0.5, 1.5)
BPGO["BPGO, released, text to video"] = {**T2V, **SFT, **RELEASED}
BPGO["BPGO, released, image to video"] = {**I2V, **FRAME, **RELEASED}
BPGO["BPGO, released, text to image"] = {**T2I, **MEAN, **RELEASED}
# config/grpo.py and config/base.py of Flow-GRPO's code: general_ocr_sd3 and geneval_sd3. Its KL is
# -dt times ours, and dt is a tenth on average of 10 steps.
FLOW = dict(
    gpus=32,
    prompts_per_step=48,
    group_size=24,
    sampling_steps=10,
    eval_steps=40,
    eval_every=60,
    guidance=4.5,
    height=512,
    width=512,
    noise_level=0.7,
    same_noise=False,
    minibatches=2,
    lora_rank=32,
    learning_rate=3e-4,
    clip_range=1e-4,
    adv_clip_max=5.0,
    max_grad_norm=1.0,
    weight_decay=1e-4,
    kl_coef=0.04 / 10,
)
FLOW_GRPO = {
    "Flow-GRPO, text rendering": dict(FLOW, reward=("ocr",)),
    "Flow-GRPO, GenEval": dict(FLOW, reward=("geneval",)),
}
PRINTED = {**FLOW_GRPO, **BPGO, **SLAS, **SELF_PACED, **SELF_PACED_4}


def commands():
    """{what stands above it: command} of docs/reproduce.md."""
    text = (ROOT / "docs/reproduce.md").read_text().replace("\\\n", " ")
    found = [
        line
        for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    titles, lines = found[::2], found[1::2]
    assert all(title.startswith("# ") for title in titles) and not any(
        line.startswith("#") for line in lines
    )
    return dict(zip((title[2:] for title in titles), lines, strict=True))


COMMANDS = commands()


def parsed(command, monkeypatch):
    """(the script's name, its arguments, GPUs) of a command, every file that it names being
    there."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    launcher, script = words[:at], words[at]
    if launcher[0] == "sbatch":
        assert launcher[-1] == "configs/slurm.sh" and (ROOT / launcher[-1]).is_file()
        lines = (ROOT / launcher[-1]).read_text()
        nodes = (
            int(launcher[2])
            if launcher[1] == "--nodes"
            else int(re.search(r"#SBATCH --nodes=(\d+)", lines)[1])
        )
        gpus = nodes * int(re.search(r"#SBATCH --gpus-per-node=(\d+)", lines)[1])
        sharded = "fsdp" in lines
    else:
        assert launcher[:3] == ["accelerate", "launch", "--config_file"] and len(launcher) == 4
        config = yaml.safe_load((ROOT / launcher[3]).read_text())
        gpus, sharded = config["num_processes"], config["distributed_type"] == "FSDP"
    args = printed.parsed(words[at:], monkeypatch)
    assert sharded or not args.exchange_often
    # slurm.sh resumes, and what has no name yet cannot be resumed
    assert launcher[0] != "sbatch" or args.output
    return script.removesuffix(".py"), args, gpus


TERMS = ("RAS", "CRT", "CRT alone")


def test_every_command_has_its_paper_and_every_table_its_command():
    assert COMMANDS.keys() == PRINTED.keys()


@pytest.mark.parametrize("title", COMMANDS)
def test_the_settings_are_the_printed_ones(title, monkeypatch):
    script, args, gpus = parsed(COMMANDS[title], monkeypatch)
    for setting, value in PRINTED[title].items():
        found = gpus if setting == "gpus" else getattr(args, setting)
        assert found == value, f"{setting} is {found}, the paper has {value}"
    assert args.prompts_per_step * args.group_size % gpus == 0
    for spec in filter(None, (args.prompts, args.eval_prompts)):
        assert sets.is_name(spec) or spec.startswith("flow_grpo/dataset/")


@pytest.mark.parametrize(
    "title, other",
    [
        *(
            (f"BPGO, table 2, text to video, {term}", "BPGO, table 1, text to video, ours")
            for term in TERMS
        ),
        *(
            (f"BPGO, table 2, image to video, {term}", "BPGO, table 1, image to video, ours")
            for term in TERMS
        ),
        *(
            (f"BPGO, table 2, text to image, {term}", "BPGO, table 1, text to image, ours")
            for term in TERMS
        ),
        *(
            (f"BPGO, table 3, alpha {alpha}", "BPGO, table 1, text to video, ours")
            for alpha in (0.1, 0.5, 0.7, 0.9)
        ),
        *(
            (f"Self-Paced, table 3, {kind}", "Self-Paced, table 3, ours")
            for kind in ("joint", "one stage", "two stages")
        ),
        ("Self-Paced, table 1, 1.3B, 7B judge", "Self-Paced, table 1, 1.3B, 72B judge"),
    ],
)
def test_an_ablation_differs_from_its_method_in_nothing_else(title, other, monkeypatch):
    ours, theirs = (vars(parsed(COMMANDS[name], monkeypatch)[1]) for name in (title, other))
    differing = {name for name in ours if ours[name] != theirs[name]}
    method = {"alpha", "beta", "crt_alone", "only_stage", "judge_model", "judge_url"}
    evaluation = {"watch", "eval_prompts", "eval_every", "output"}
    assert differing & method and differing <= method | evaluation


@pytest.mark.parametrize(
    "method, baseline",
    [
        ("BPGO, table 1, text to video, ours", "BPGO, table 1, text to video, GRPO"),
        ("BPGO, table 1, image to video, ours", "BPGO, table 1, image to video, GRPO"),
        ("BPGO, table 1, text to image, ours", "BPGO, table 1, text to image, GRPO"),
        ("SLAS, table 1, Stable Diffusion, SLAS", "SLAS, table 1, Stable Diffusion, DanceGRPO"),
        ("SLAS, table 1, FLUX, SLAS", "SLAS, table 1, FLUX, DanceGRPO"),
        ("Self-Paced, table 1, 1.3B, 7B judge", "Self-Paced, table 1, 1.3B, DanceGRPO"),
    ],
)
def test_a_method_and_its_baseline_share_every_shared_setting(method, baseline, monkeypatch):
    ours, theirs = (vars(parsed(COMMANDS[name], monkeypatch)[1]) for name in (method, baseline))
    assert {name for name in theirs if ours[name] != theirs[name]} - {"output"} <= (
        {"reward"} if "Self" in method else set()
    )
