"""The named models: where their weights are, and the settings that their papers print."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"

# --lora-rank above 0 without --learning-rate takes lora_learning_rate. 3e-4 is the rate of
# Flow-GRPO's code for FLUX, Qwen-Image and Stable Diffusion 3.5 (ranks 64, 64, 32; alpha is twice
# the rank), and of DDPO's (ddpo-pytorch) for Stable Diffusion 1. 1e-4 is Flow-GRPO's for Wan2.1
# (1.3B and 14B); Wan2.2, HunyuanVideo and folders take it over (args.LORA_LEARNING_RATE).

# fmt: off

# --- What several models share ---

# A step takes two cores a few seconds. lora_learning_rate was tried on tiny-sd only.
_TINY = dict(
    height=32, width=32, steps=40, prompts_per_step=8, group_size=12, sampling_steps=8,
    sde="flow", noise_level=0.7, shift=1.0, same_noise=False, timestep_fraction=1.0,
    clip_range=1e-3, learning_rate=2e-4, lora_learning_rate=3e-3, micro_batch=96,
)
_SHAPES = dict(
    prompts=str(ASSETS / "prompts/shapes.txt"),
    eval_prompts=str(ASSETS / "prompts/shapes_heldout.txt"),
    reward=("verifier",),
)
_MOTION = dict(
    prompts=str(ASSETS / "prompts/motion.txt"),
    eval_prompts=str(ASSETS / "prompts/motion_heldout.txt"),
    reward=("motion",), frames=5, fps=5.0,
)
_MOTION_I2V = dict(
    _MOTION,
    prompts=str(ASSETS / "prompts/motion_i2v.txt"),
    eval_prompts=str(ASSETS / "prompts/motion_i2v_heldout.txt"),
)

_LETTERS = dict(
    prompts=str(ASSETS / "prompts/letters.txt"),
    eval_prompts=str(ASSETS / "prompts/letters_heldout.txt"),
    reward=("ocr",), watch=("letters",), height=32, width=80,
)

# DanceGRPO (2505.07818), whose settings the three methods' papers take over.
_PAPERS = dict(
    prompts_per_step=8, group_size=12, sampling_steps=16, sde="dance", same_noise=True,
    timestep_fraction=0.6, clip_range=1e-4, learning_rate=1e-5, lora_learning_rate=3e-4,
    micro_batch="auto", prompts="dancegrpo:images", reward=("hpsv2.1",),
    gradient_checkpointing=True,
    keep_checkpoints=2,  # one of FLUX has 133 GiB with its optimizer
)

_EDITING = dict(
    _PAPERS, height=512, width=512, guidance=4.0, steps=200, sampling_steps=12, sde="flow",
    shift="scheduler", noise_level=0.7, sde_steps=6, sde_window=3, prompts_per_step=32,
    group_size=16, minibatches=2, timestep_fraction=1.0, same_noise=False, lora_rank=64,
    prompts=str(ASSETS / "prompts/edits.txt"), reward=("judge:edit",),
)

# 2511.19356, appendix A: train on the best 4 and worst 4 of 16, in two minibatches. The reward is
# that of its baseline.
_VIDEO = dict(
    _PAPERS, group_size=16, best_of=8, minibatches=2, shift=5.0, noise_level=0.5,
    learning_rate=5e-6, lora_learning_rate=1e-4, frames=53, fps=15.0,
    prompts="dancegrpo:videos", reward=("videoalign",),
    reward_batch=4,  # clips of 480x832x53 have one GiB
)

# --- The models ---

# --model NAME makes these settings the defaults of the command line. A --source must be a pipeline
# of the same class. Where the papers are silent (prompts per step on other numbers of GPUs,
# guidance), the values are the defaults of the model's pipeline.
MODELS = {
    # Three minibatches gain in 30 steps what one gains in 45 to 60 (two scripts, one seed each).
    "tiny-flux": dict(
        _TINY, **_SHAPES, pipeline="FluxPipeline", source=str(ASSETS / "tiny-flux"),
        guidance=3.5, minibatches=3,
    ),
    # A real reader of text is the reward, the world's exact reader is watched.
    "tiny-letters": dict(
        {**_TINY, **_LETTERS}, pipeline="FluxPipeline", source=str(ASSETS / "tiny-letters"),
        guidance=1.0, group_size=8, micro_batch=64, minibatches=2, steps=30,
    ),
    # It trains a LoRA: the full weights of the U-Net lose more than they learn. Its noise is not
    # DDIM's: the last noisy one of 8 steps would weigh sixty times as much as any other. After 40
    # steps three minibatches reach 0.577, one reaches 0.523 (one script, one seed).
    "tiny-sd": dict(
        _TINY, **_SHAPES, pipeline="StableDiffusionPipeline", source=str(ASSETS / "tiny-sd"),
        guidance=1.0, minibatches=3, lora_rank=16,
    ),
    # Three minibatches gain nothing here, two nothing on tiny-wan-i2v.
    "tiny-wan": dict(
        _TINY, **_MOTION, pipeline="WanPipeline", source=str(ASSETS / "tiny-wan"),
        guidance=1.0, shift=3.0,
    ),
    # Noise is added in the three steps of the first expert only. The second one hardly decides what
    # moves where; with noise in its own steps it learns to make worse clips. There are many first
    # frames per step, each in a small group.
    "tiny-wan-i2v": dict(
        {**_TINY, **_MOTION_I2V}, pipeline="WanImageToVideoPipeline",
        source=str(ASSETS / "tiny-wan-i2v"), guidance=1.0, shift=3.0, sde_steps=3,
        prompts_per_step=24, group_size=4, learning_rate=3e-4, steps=50,
    ),
    # Points in 8 dimensions instead of images: 80 steps take seconds.
    "points": dict(
        pipeline="PointsPipeline", source=str(ASSETS / "points"), height=8, width=8, guidance=1.0,
        prompts=str(ASSETS / "prompts/points.txt"),
        eval_prompts=str(ASSETS / "prompts/points_heldout.txt"), reward=("points",), steps=80,
        prompts_per_step=8, group_size=8, sampling_steps=6, sde="flow", noise_level=0.7, shift=1.0,
        same_noise=False, timestep_fraction=0.6, minibatches=2, clip_range=0.05, sample_every=40,
        learning_rate=0.006, lora_learning_rate=0.006, micro_batch=64,
    ),
    "flux": dict(
        _PAPERS, pipeline="FluxPipeline", source="black-forest-labs/FLUX.1-dev",
        height=720, width=720, guidance=3.5, steps=200, shift=3.0, noise_level=0.3, minibatches=3,
    ),
    "sd1.4": dict(
        _PAPERS, pipeline="StableDiffusionPipeline", source="CompVis/stable-diffusion-v1-4",
        height=512, width=512, guidance=5.0, steps=300, sampling_steps=50, sde="ddim", shift=1.0,
        noise_level=1.0, group_size=16, timestep_fraction=1.0,
        gradient_checkpointing=False,  # a row's activations take 2 GiB; turned on if they don't fit
    ),
    # Flow-GRPO (2505.05470 and config/grpo.py of its code): a LoRA, two updates per rollout, all
    # noisy steps, at the pipeline's own noise levels. The KL coefficient and the number of prompts
    # are in papers.py. The paper prints no number of steps.
    "sd3.5-medium": dict(
        _PAPERS, pipeline="StableDiffusion3Pipeline",
        source="stabilityai/stable-diffusion-3.5-medium", height=512, width=512, guidance=4.5,
        steps=200, sampling_steps=10, sde="flow", shift="scheduler", noise_level=0.7, group_size=24,
        minibatches=2, timestep_fraction=1.0, same_noise=False, lora_rank=32,
    ),
    # Flow-GRPO too, with noise in two of the first five steps.
    "qwen-image": dict(
        _PAPERS, pipeline="QwenImagePipeline", source="Qwen/Qwen-Image", height=512, width=512,
        guidance=4.0, steps=200, sampling_steps=10, sde="flow", shift="scheduler", noise_level=1.2,
        sde_steps=5, sde_window=2, group_size=16, minibatches=2, timestep_fraction=1.0,
        same_noise=False, lora_rank=64,
    ),
    # No paper trains these two with GRPO. The recipes are those of Flow-Factory's code (X-GenGroup,
    # examples/grpo/lora). It draws the one step with noise from steps two to four, these settings
    # from the first four. Its guidance_scale of 4 for Z-Image is 5 here.
    "z-image": dict(
        _PAPERS, pipeline="ZImagePipeline", source="Tongyi-MAI/Z-Image", height=512, width=512,
        guidance=5.0, steps=200, sampling_steps=10, sde="flow", shift="scheduler", noise_level=0.7,
        sde_steps=4, sde_window=1, group_size=16, minibatches=2, timestep_fraction=1.0,
        same_noise=False, lora_rank=64,
    ),
    "flux2-klein-4b": dict(
        _PAPERS, pipeline="Flux2KleinPipeline", source="black-forest-labs/FLUX.2-klein-base-4B",
        height=384, width=384, guidance=4.0, steps=200, sampling_steps=8, sde="flow",
        shift="scheduler", noise_level=0.7, sde_steps=4, sde_window=1, group_size=16,
        minibatches=2, timestep_fraction=1.0, same_noise=False, lora_rank=64,
    ),
    # No paper prints settings for these two. They are like the recipes of public trainers for
    # editing: Flow-Factory's has 10 steps at 384x384, noise of .9 to 1 and 48 prompts. Kontext's
    # guidance is embedded, and its pipeline's default is 2.5. The prompts are those of the edit
    # world, so that a run can start; give your own.
    "flux-kontext": dict(
        _EDITING, pipeline="FluxKontextPipeline", source="black-forest-labs/FLUX.1-Kontext-dev",
    ),
    "qwen-image-edit": dict(
        _EDITING, pipeline="QwenImageEditPlusPipeline", source="Qwen/Qwen-Image-Edit-2509",
    ),
    "wan2.1-1.3b": dict(
        _VIDEO, pipeline="WanPipeline", source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        height=480, width=832, guidance=5.0, steps=150,
    ),
    "wan2.1-14b": dict(
        _VIDEO, pipeline="WanPipeline", source="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        height=240, width=416, guidance=5.0, steps=220, prompts_per_step=16,
    ),
    # No paper trains it with GRPO. Steps, guidance, noise, window, groups and rate are those of
    # verl-omni's code (verl-project, examples/dancegrpo_trainer/wan22), which trains with HPSv3 on
    # clips of 8 frames. Size, length and reward are those of Wan2.1 here, at the model's 24 fps.
    "wan2.2-ti2v-5b": dict(
        _VIDEO, pipeline="WanPipeline", source="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        height=480, width=832, fps=24.0, guidance=5.0, steps=120, sampling_steps=10,
        noise_level=1.2, sde_steps=5, sde_window=2, timestep_fraction=1.0, same_noise=False,
        group_size=8, best_of=0, minibatches=4, learning_rate=1e-5,
    ),
    # 2511.18919: 8 samples per group, 16 prompts on 16 GPUs.
    "wan2.2-i2v": dict(
        _VIDEO, pipeline="WanImageToVideoPipeline", source="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        height=480, width=832, guidance=3.5, steps=200, prompts_per_step=16, group_size=8,
        best_of=0, learning_rate=1e-5, prompts="first-frames", reward=("videoclip-xl",),
    ),
    "hunyuan": dict(
        _VIDEO, pipeline="HunyuanVideoPipeline", source="hunyuanvideo-community/HunyuanVideo",
        height=480, width=480, guidance=6.0, steps=100, noise_level=0.25, group_size=24,
        learning_rate=1e-5,
    ),
}
# fmt: on
