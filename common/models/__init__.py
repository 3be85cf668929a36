"""Load a model by name, folder or hub id. The named models are in presets.py.

A model is one class per diffusers pipeline family (common/models/family.py), with
    encode(prompts) -> cond                  {name: [b, ...]}, each distinct prompt encoded once
    noise_shape                              shape of one row's latent
    sigmas(steps, shift) -> [T+1]            the noise levels that sampling visits; shift is a
                                             number or "scheduler"
    velocity(x, sigma, cond) -> [b, ...]     float32, guidance inside; x [b, *noise_shape], sigma a
                                             scalar (or [b])
    decode(x0) -> [b, C, H, W] in [0, 1]     clips: [b, F, C, H, W]
    try_out(prompt) -> [1, ...]              the smoke test: one decoded sample
    blank() -> {name: [...]}                 zeros like the conditioning of one prompt, for counting
                                             memory
    still(prompts) -> [b, F, C, H, W]        image-to-video only: the conditioning image as a still
                                             video
    trainable                                {name: module} of the trained modules
    trained_at(sigma)                        the name of the one that computes the velocity there
    lora_targets, blocks                     regular expression of the layers that a LoRA adapts;
                                             names of the classes to shard
    pipe, source                             the diffusers pipeline and its folder
"""

import difflib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from common import errors, hub
from common.errors import InputError
from common.models import contents
from common.models.family import CURE, Family
from common.models.presets import ASSETS, MODELS

__all__ = ["ASSETS", "MODELS"]  # re-exported from presets.py

# {class of the pipeline: (module, class of the family)}; a module imports diffusers
FAMILIES = {
    "FluxPipeline": ("common.models.flux", "Flux"),
    "FluxKontextPipeline": ("common.models.flux", "FluxKontext"),
    "StableDiffusionPipeline": ("common.models.sd", "StableDiffusion"),
    "StableDiffusion3Pipeline": ("common.models.sd3", "StableDiffusion3"),
    "QwenImagePipeline": ("common.models.qwen", "QwenImage"),
    "QwenImageEditPlusPipeline": ("common.models.qwen_edit", "QwenImageEdit"),
    "Flux2KleinPipeline": ("common.models.flux2", "Flux2Klein"),
    "ZImagePipeline": ("common.models.z_image", "ZImage"),
    "WanPipeline": ("common.models.wan", "Wan"),
    "WanImageToVideoPipeline": ("common.models.wan", "WanImageToVideo"),
    "HunyuanVideoPipeline": ("common.models.hunyuan", "HunyuanVideo"),
    "PointsPipeline": ("worlds.points", "Points"),
}


def settings(name: str) -> dict:
    """Return the settings of a named model, {} for a folder or hub id."""
    return MODELS.get(name, {})


def take(cond: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the given rows of a conditioning {name: [b, ...]}."""
    return {name: value[rows] for name, value in cond.items()}


def source_of(name: str, source: str = "") -> str:
    """Return the folder or hub id with the weights of --model NAME --source SOURCE.

    Raises InputError for a source without a named model, or one that is a named model itself.
    """
    if source and name not in MODELS:
        raise InputError(
            f"--source {source}: --model {name} is not a named model. Give --model {source} "
            "instead."
        )
    if source in MODELS and not Path(source).is_dir():
        raise InputError(
            f"--source {source}: it must be a folder or hub id. Give --model {source} alone."
        )
    return source or settings(name).get("source", name)


def family_of(name: str, source: str = "") -> type[Family]:
    """Return the family of a named model, folder or hub id, by the pipeline's model_index.json.

    Loads no weights. Raises InputError.
    """
    place = source_of(name, source)
    path = _index_file(place)
    with errors.loading("model", path, do=CURE):
        pipeline = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
        known = pipeline in FAMILIES
    if not known:
        raise InputError(
            f"model: {place} is a {pipeline!s:.60}. Supported are {', '.join(FAMILIES)}."
        )
    if source and pipeline != settings(name)["pipeline"]:
        raise InputError(
            f"--source {source}: it is a {pipeline}, --model {name} is not. Give --model {source} "
            "alone."
        )
    return _family(pipeline)


def load(
    name: str,
    dtype: torch.dtype,
    prompts: Sequence[str] = (),
    source: str = "",
    trust_remote_code: bool = False,
    **settings,
) -> Family:
    """Load a model on the CPU, its weights in `dtype`.

    prompts: those that it will encode; they are checked first. source: as in source_of. settings:
    those of Family; the defaults are the named model's. Raises InputError.
    """
    from common.models import folder  # it imports diffusers and transformers

    cls = family_of(name, source)
    cls.check(prompts)
    path = _folder(source_of(name, source), cls, trust_remote_code)
    pipe = folder.load(cls, path, dtype, trust_remote_code)
    return _model(cls, pipe, path, {**_own(name), **settings})


def outline(
    name: str,
    dtype: torch.dtype,
    large: int,
    source: str = "",
    trust_remote_code: bool = False,
    **settings,
) -> Family | None:
    """Return the model that `load` would return, its weights on the meta device.

    Return None for a model whose files have fewer than `large` bytes, and if only `load` can report
    what is wrong. Raises InputError.
    """
    from common.models import folder

    cls = family_of(name, source)
    path = _folder(source_of(name, source), cls, trust_remote_code)
    if sum(file.stat().st_size for file in path.glob("*/*") if file.is_file()) < large:
        return None
    pipe = folder.outline(cls, path, dtype, trust_remote_code)
    return _model(cls, pipe, path, {**_own(name), **settings}) if pipe else None


def files(name: str, source: str = "", trust_remote_code: bool = False) -> dict[str, Path]:
    """Return the files that `load` reads, as far as they are on this machine: {PART/NAME: path}.

    Weights of other precisions (NAME.fp16.safetensors) are left out. Raises InputError.
    """
    from common.models import folder

    index = _index_file(source_of(name, source))
    found = {index.name: index}
    for part in folder.classes(family_of(name, source), index.parent, trust_remote_code):
        paths = [path for path in (index.parent / part).glob("*") if path.is_file()]
        safe = any(path.suffix == ".safetensors" for path in paths)
        endings = {".json", ".txt", ".model", ".py", ".safetensors" if safe else ".bin"}
        for path in paths:
            if path.suffix in endings and path.name.count(".") == 1:
                found[f"{part}/{path.name}"] = path
    return found


def place(model: Family, device: torch.device, offload_encoders: bool) -> None:
    """Move the frozen components to the device.

    With offload_encoders the encoders stay on the CPU.
    """
    for name, module in model.pipe.components.items():
        if isinstance(module, torch.nn.Module) and name not in model.trainable:
            waits = offload_encoders and name in model.encoders
            module.requires_grad_(False).eval().to("cpu" if waits else device)


def blocks() -> set[str]:
    """Return the names of the blocks of all families, as configs/fsdp2.yaml lists them."""
    return {block for pipeline in FAMILIES for block in _family(pipeline).blocks}


def _model(cls: type[Family], pipe: object, path: Path, settings: dict) -> Family:
    with errors.loading("model", path, do=CURE):  # configurations that do not fit together
        model = cls(pipe, **settings)
    model.source = path
    return model


def _own(name: str) -> dict:
    """Return the settings of a named model that its family takes."""
    names = ("height", "width", "frames", "guidance")
    return {key: value for key, value in settings(name).items() if key in names}


def _family(pipeline: str) -> type[Family]:
    module, attribute = FAMILIES[pipeline]
    return getattr(importlib.import_module(module), attribute)


# --- Where a model is ---


def _folder(source: str, cls: type[Family], trusted: bool) -> Path:
    """Return the folder of a model, after a download if the cache lacks files of a hub id."""
    from common.models import folder

    path = _index_file(source).parent
    if Path(source).is_dir() or not folder.missing(path, folder.classes(cls, path, trusted)):
        return path
    do = f"run `hf download {source}` where there is a network, or give --model PATH"
    with errors.loading("model", source, do=do):
        hub.settle()
        return Path(cls.pipeline.download(source, trust_remote_code=trusted))


def _index_file(source: str) -> Path:
    """Return the model_index.json of a folder or hub id. Raises InputError."""
    if Path(source).is_dir():
        index = Path(source) / "model_index.json"
        if not index.is_file():
            with errors.loading("model", source, do=CURE):
                what = contents.of_folder(Path(source))
            raise InputError(f"model: {source} has no model_index.json: {what}.")
        return index
    if Path(source).is_file():
        with errors.loading("model", source, do=CURE):
            what = contents.of_file(Path(source))
        raise InputError(f"model: {source} {what}.")
    if source.count("/") != 1:
        near = difflib.get_close_matches(source, MODELS, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise InputError(
            f"model: there is no folder {source}.{hint} Give a folder, a hub id OWNER/NAME, or one "
            f"of {', '.join(MODELS)}."
        )
    do = (
        "check the spelling and the network; for a gated model accept its licence on "
        "huggingface.co and run `hf auth login`; or give --model PATH"
    )
    with errors.loading("model", source, do=do):
        try:
            return hub.find(source, "model_index.json")
        except hub.NoSuchFile as error:
            raise InputError(
                f"model: {source} has no model_index.json on the hub: it is a LoRA, a part or a "
                f"single file of weights. {contents.WHOLE}."
            ) from error


# --- --list-models ---

COLUMNS = (
    "paper", "height", "width", "frames", "fps", "sampling_steps", "shift", "noise_level", "sde",
    "guidance", "prompts_per_step", "group_size", "best_of", "minibatches", "lora_rank",
    "learning_rate", "lora_learning_rate", "steps", "reward", "prompts", "source",
)  # fmt: skip


def table(pairs: dict[str, dict]) -> str:
    """Return the settings of a script for the named models, {name: settings}, as lines of text."""
    rows = [("name", *COLUMNS)]
    for name, values in pairs.items():
        values = {**values, "reward": " ".join(values["reward"])}
        cells = [str(values.get(column, "-")) for column in COLUMNS]
        rows.append((name, *(cell.replace(f"{ASSETS.parent}/", "") for cell in cells)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    lines += [
        "",
        "paper: the arXiv id of the paper that trains this model with this method; -: none does, "
        "and the defaults follow script and model",
        "lora_learning_rate: with --lora-rank above 0 and without --learning-rate",
    ]
    for pipeline in FAMILIES:
        cls = _family(pipeline)
        lines += [
            "",
            f"{pipeline}: {cls.task()}",
            f"  LoRA: {cls.lora_targets}",
            f"  blocks: {', '.join(cls.blocks)}",
        ]
    return "\n".join(lines)
