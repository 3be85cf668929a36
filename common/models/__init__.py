"""Models: the table of names with the settings that their papers print, and loading by name, folder
or hub id.

A model is one class per diffusers pipeline family (common/models/family.py), with
    encode(prompts) -> cond                  {name: [b, ...]}, once for each distinct prompt
    noise_shape                              shape of one row's latent
    sigmas(steps, shift) -> [T+1]            the noise levels that sampling visits
    velocity(x, sigma, cond) -> [b, ...]     float32, guidance inside; x [b, *noise_shape], sigma a scalar (or [b])
    decode(x0) -> [b, C, H, W] in [0, 1]     clips: [b, F, C, H, W]
    blank() -> {name: [...]}                 zeros like the conditioning of one prompt, to count memory with
    still(prompts) -> [b, F, C, H, W]        image-to-video alone: the conditioning image as a still video
    trainable                                {name: module}, what is trained
    trained_at(sigma)                        the name of the one that computes the velocity there
    lora_targets, blocks                     regular expression of the layers that LoRA adapts; classes to shard
    pipe, source                             the diffusers pipeline itself, and its folder
"""

import difflib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError, text

if TYPE_CHECKING:  # --help need not wait for them
    import torch

    from common.models.family import Family

ASSETS = Path(__file__).resolve().parents[2] / "assets"

FAMILIES = {
    "FluxPipeline": ("common.models.flux", "Flux"),
    "StableDiffusionPipeline": ("common.models.sd", "StableDiffusion"),
    "StableDiffusion3Pipeline": ("common.models.sd3", "StableDiffusion3"),
    "QwenImagePipeline": ("common.models.qwen", "QwenImage"),
    "WanPipeline": ("common.models.wan", "Wan"),
    "WanImageToVideoPipeline": ("common.models.wan", "WanImageToVideo"),
    "HunyuanVideoPipeline": ("common.models.hunyuan", "HunyuanVideo"),
}

# What the embedded models share: a step that two cores take in seconds. The rate of a LoRA was
# tried on tiny-sd alone.
_TINY = dict(
    height=32, width=32, steps=40, prompts_per_step=8, group_size=12, sampling_steps=8, sde="flow", noise_level=0.7,
    shift=1.0, timestep_fraction=1.0, same_noise=False, clip_range=1e-3, learning_rate=2e-4, lora_learning_rate=3e-3,
    micro_batch=96,
)  # fmt: skip
_SHAPES = dict(
    prompts=str(ASSETS / "prompts/shapes.txt"), eval_prompts=str(ASSETS / "prompts/shapes_heldout.txt"),
    reward=("verifier",),
)  # fmt: skip
_MOTION = dict(
    prompts=str(ASSETS / "prompts/motion.txt"), eval_prompts=str(ASSETS / "prompts/motion_heldout.txt"),
    reward=("motion",), frames=5, fps=5.0,
)  # fmt: skip
# DanceGRPO (2505.07818), which the three papers follow.
_PAPERS = dict(
    prompts_per_step=8, group_size=12, sampling_steps=16, sde="dance", timestep_fraction=0.6, same_noise=True,
    clip_range=1e-4, learning_rate=1e-5, lora_learning_rate=3e-4, micro_batch="auto", prompts="dancegrpo:images",
    reward=("hpsv2.1",), gradient_checkpointing=True,
    keep_checkpoints=2,  # with optimizer a checkpoint of FLUX has 133 GiB
)  # fmt: skip
# 2511.19356, appendix A: best 4 and worst 4 of 16, an update for every 4. The reward is that of its baseline.
_VIDEO = dict(
    _PAPERS, group_size=16, best_of=8, minibatches=2, shift=5.0, noise_level=0.5, learning_rate=5e-6,
    lora_learning_rate=1e-4, frames=53, fps=15.0, prompts="dancegrpo:videos", reward=("videoalign",),
    reward_batch=4,  # clips of 480x832x53: one GiB
)  # fmt: skip

# lora_learning_rate is what a LoRA takes where no --learning-rate is given. 3e-4: FLUX, Qwen-Image and Stable Diffusion
# 3.5 in Flow-GRPO's code (ranks 64, 64, 32; alpha is twice the rank), Stable Diffusion 1 in DDPO's (ddpo-pytorch).
# 1e-4: Wan2.1 in Flow-GRPO's (1.3B; 14B stands beside it); for Wan2.2, HunyuanVideo and folders we take Wan's.
LORA_LEARNING_RATE = 1e-4

# Settings by name; --model NAME makes them the defaults of the command line. A --source has to be
# of the same pipeline. Where the papers are silent (prompts a step on other numbers of GPUs,
# guidance), it is the model's own default.
MODELS = {
    # three minibatches gain in 30 steps what one gains in 45 to 60: two scripts, one seed each. tiny-sd: 0.577 against
    # 0.523 after 40 steps (one script, one seed); nothing is gained with tiny-wan (three) and tiny-wan-i2v (two)
    "tiny-flux": dict(
        _TINY, **_SHAPES, pipeline="FluxPipeline", source=str(ASSETS / "tiny-flux"), guidance=3.5, minibatches=3,
    ),
    "tiny-sd": dict(
        # a LoRA: the U-Net's full weights lose more than they learn. Not DDIM's noise: of 8 steps
        # the last noisy one would weigh sixty times as much as any other
        _TINY, **_SHAPES, pipeline="StableDiffusionPipeline", source=str(ASSETS / "tiny-sd"), guidance=1.0,
        minibatches=3, lora_rank=16,
    ),
    "tiny-wan": dict(
        _TINY, **_MOTION, pipeline="WanPipeline", source=str(ASSETS / "tiny-wan"), guidance=1.0, shift=3.0,
    ),
    "tiny-wan-i2v": {
        **_TINY, **_MOTION,
        # noise in the first expert's three steps alone: the second, which has little say in what
        # moves where, learns from noise in its own steps to make worse clips. And many first frames
        # a step, each in a small group
        **dict(sde_steps=3, prompts_per_step=24, group_size=4, learning_rate=3e-4, steps=50),
        **dict(source=str(ASSETS / "tiny-wan-i2v"), guidance=1.0, shift=3.0, pipeline="WanImageToVideoPipeline"),
        "prompts": str(ASSETS / "prompts/motion_i2v.txt"),
        "eval_prompts": str(ASSETS / "prompts/motion_i2v_heldout.txt"),
    },
    "flux": dict(
        _PAPERS, pipeline="FluxPipeline", source="black-forest-labs/FLUX.1-dev", height=720, width=720, guidance=3.5,
        steps=200, shift=3.0, noise_level=0.3, minibatches=3,
    ),
    "sd1.4": dict(
        _PAPERS, pipeline="StableDiffusionPipeline", source="CompVis/stable-diffusion-v1-4",
        height=512, width=512, guidance=5.0, steps=300,
        sampling_steps=50, sde="ddim", shift=1.0, noise_level=1.0, group_size=16, timestep_fraction=1.0,
    ),
    # Flow-GRPO (2505.05470 and its code's config/grpo.py): a LoRA, two updates a rollout, all noisy
    # steps; the shift of the model's own scheduler. Its KL and its number of prompts stand in
    # papers.py; it names no number of steps
    "sd3.5-medium": dict(
        _PAPERS, pipeline="StableDiffusion3Pipeline", source="stabilityai/stable-diffusion-3.5-medium",
        height=512, width=512, guidance=4.5, steps=200,
        sampling_steps=10, sde="flow", shift=3.0, noise_level=0.7, group_size=24, minibatches=2, timestep_fraction=1.0,
        same_noise=False, lora_rank=32,
    ),
    # the same, with noise in two of the first five steps; the scheduler's shift at this size
    "qwen-image": dict(
        _PAPERS, pipeline="QwenImagePipeline", source="Qwen/Qwen-Image", height=512, width=512, guidance=4.0,
        steps=200, sampling_steps=10, sde="flow", shift=1.71, noise_level=1.2, sde_steps=5, sde_window=2,
        group_size=16, minibatches=2,
        timestep_fraction=1.0, same_noise=False, lora_rank=64,
    ),
    "wan2.1-1.3b": dict(
        _VIDEO, pipeline="WanPipeline", source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", height=480, width=832,
        guidance=5.0, steps=150,
    ),
    "wan2.1-14b": dict(
        _VIDEO, pipeline="WanPipeline", source="Wan-AI/Wan2.1-T2V-14B-Diffusers", height=240, width=416,
        guidance=5.0, steps=220, prompts_per_step=16,
    ),
    "wan2.2-i2v": dict(  # 2511.18919: 8 samples a group, 16 prompts on 16 GPUs
        _VIDEO, pipeline="WanImageToVideoPipeline", source="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        height=480, width=832, guidance=3.5, steps=200, prompts_per_step=16, group_size=8, best_of=0,
        learning_rate=1e-5, prompts="first-frames", reward=("videoclip-xl",),
    ),
    "hunyuan": dict(
        _VIDEO, pipeline="HunyuanVideoPipeline", source="hunyuanvideo-community/HunyuanVideo",
        height=480, width=480, guidance=6.0, steps=100, noise_level=0.25, group_size=24, learning_rate=1e-5,
    ),
}  # fmt: skip


def settings(name: str) -> dict:
    """The table's settings of a named model; none for a folder or hub id."""
    return MODELS.get(name, {})


def take(cond: "dict[str, torch.Tensor]", rows: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """The given rows of a conditioning {name: [b, ...]}."""
    return {name: value[rows] for name, value in cond.items()}


def source_of(name: str, source: str = "") -> str:
    """The folder or hub id with the weights of a model: `source`, of a named one alone, its own, or
    its name."""
    if source and name not in MODELS:
        raise InputError(
            f"--source {source}: --model {name} is no named model; give --model {source} instead"
        )
    if source in MODELS and not Path(source).is_dir():
        raise InputError(
            f"--source {source}: it takes a folder or hub id; give --model {source} alone"
        )
    return source or settings(name).get("source", name)


def family_of(name: str, source: str = "") -> "type[Family]":
    """A named model, a folder or a hub id -> the class of its family, read from the pipeline's
    model_index.json; loads no weights. Raises InputError that says what to do."""
    named, name = name, source_of(name, source)
    index = _index_file(name)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    pipeline = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(pipeline, str):
        raise InputError(
            f"model: {index} is broken, it names no class of a pipeline; download {name} again"
        )
    if pipeline not in FAMILIES:
        raise InputError(f"model: {name} is a {pipeline:.60}; supported are {', '.join(FAMILIES)}")
    if source and pipeline != settings(named)["pipeline"]:
        raise InputError(
            f"--source {name}: a {pipeline}, and --model {named} is another; give --model {name} "
            "alone"
        )
    module, attribute = FAMILIES[pipeline]
    return getattr(importlib.import_module(module), attribute)


def load(
    name: str,
    dtype: "torch.dtype",
    prompts: Sequence[str] = (),
    trust_remote_code: bool = False,
    source: str = "",
    **settings,
) -> "Family":
    """The model on the CPU, weights in `dtype`, having looked at the prompts that it will be given;
    source: as source_of takes it; settings: those of Family, for a named model over the table's.
    Raises InputError."""
    from common.models import (
        folder,
    )  # and with it diffusers: seconds, which --help need not wait for

    source, cls = source_of(name, source), family_of(name, source)
    cls.check(prompts)
    path = _whole(source, cls, trust_remote_code)
    pipe = folder.load(cls, path, dtype, trust_remote_code)
    try:
        model = cls(pipe, **{**_own(name), **settings})
    except InputError:
        raise
    except Exception as error:  # a configuration with a word for a number, or the like
        raise folder.wrong(
            path, f"has configurations that do not fit together ({text(error):.300})"
        ) from None
    model.source = path
    return model


def outline(
    name: str,
    dtype: "torch.dtype",
    large: int,
    trust_remote_code: bool = False,
    source: str = "",
    **settings,
) -> "Family | None":
    """What `load` would give, with weights that have no contents, to count them. None for a model
    whose files have together less than `large` bytes, and where only `load` can say what is wrong.
    Raises InputError."""
    source, cls = source_of(name, source), family_of(name, source)
    path = Path(source) if Path(source).is_dir() else _whole(source, cls, trust_remote_code)
    if sum(file.stat().st_size for file in path.glob("*/*") if file.is_file()) < large:
        return None
    from common.models import folder

    pipe = folder.outline(cls, path, dtype, trust_remote_code)
    model = pipe and cls(pipe, **{**_own(name), **settings})
    if model:
        model.source = path
    return model


def _own(name: str) -> dict:
    """What a family takes of a named model's settings."""
    return {
        key: value
        for key, value in settings(name).items()
        if key in ("height", "width", "frames", "guidance")
    }


def _whole(source: str, cls: "type[Family]", trusted: bool) -> Path:
    """The folder of a model, with all its files: it is one, or is in the cache of the hub, or is
    downloaded into it."""
    from common import hub
    from common.models import folder

    path = _index_file(source).parent
    try:
        folder.check(cls, path, trusted)
    except InputError as reason:
        if Path(source).is_dir() or "--trust-remote-code" in str(reason):
            raise
        hub.settle()
        try:
            return Path(cls.pipeline.download(source, trust_remote_code=trusted))
        except Exception as error:  # the hub's, the network's, the disk's
            raise InputError(
                f"model: {source} is not wholly in the Hugging Face cache, and the hub does not "
                "give the rest: "
                f"{text(error)}; run `hf download {source}` where there is a network, or give "
                "--model PATH"
            ) from None
    return path


def table(pairs: dict[str, dict]) -> str:
    """The named models and a script's settings for them, {name: settings}, as text for
    --list-models."""
    columns = (
        "paper",
        "height",
        "width",
        "frames",
        "fps",
        "sampling_steps",
        "shift",
        "noise_level",
        "sde",
        "guidance",
    )
    columns += (
        "prompts_per_step",
        "group_size",
        "best_of",
        "minibatches",
        "lora_rank",
        "learning_rate",
    )
    columns += ("lora_learning_rate", "steps", "reward", "prompts", "source")
    rows = [("name", *columns)]
    for name, values in pairs.items():
        cells = {column: values.get(column, "-") for column in columns} | {
            "reward": " ".join(values["reward"])
        }
        rows.append(
            (name, *(str(cell).replace(f"{ASSETS.parent}/", "") for cell in cells.values()))
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    lines += [
        "",
        "paper: the one (arXiv) that trains this model so; -: none does, script and model "
        "suggest the rest",
    ]
    lines += ["lora_learning_rate: with --lora-rank above 0, where no --learning-rate is given"]
    for pipeline, (module, attribute) in FAMILIES.items():
        cls = getattr(importlib.import_module(module), attribute)
        lines += [
            "",
            f"{pipeline}: {cls.task()}",
            f"  LoRA: {cls.lora_targets}",
            f"  blocks: {', '.join(cls.blocks)}",
        ]
    return "\n".join(lines)


def _index_file(source: str) -> Path:
    if Path(source).is_dir():
        index = Path(source) / "model_index.json"
        if not index.is_file():
            raise InputError(
                f"model: {source} has no model_index.json; --model takes the folder of a whole "
                "diffusers pipeline"
            )
        return index
    if Path(source).parent == ASSETS:
        raise InputError(
            f"model: {source} is not there; a script in lab/ builds it (assets/README.md)"
        )
    if "/" not in source:
        near = difflib.get_close_matches(source, MODELS, n=2, cutoff=0.4)
        raise InputError(
            "model: there is no folder "
            f"{source}{' (did you mean ' + ' or '.join(near) + '?)' if near else ''}; give a "
            f"folder, a hub id OWNER/NAME, or one of {', '.join(MODELS)}"
        )
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    from common import hub

    try:
        return hub.find(source, "model_index.json")
    except GatedRepoError:
        raise InputError(
            f"model: {source} is gated: accept its licence on huggingface.co, run `hf auth "
            "login`, then start again"
        ) from None
    except HFValidationError:
        raise InputError(
            f"model: there is no folder {source} and it is no hub id OWNER/NAME"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise InputError(
            f"model: {source} is no folder here, not in the Hugging Face cache, and the hub does "
            "not give it; check "
            "the spelling and the network, run `hf auth login` for a gated model, or give "
            "--model PATH"
        ) from None
