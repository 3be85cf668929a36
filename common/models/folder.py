"""Load the folder of a diffusers pipeline part by part.

diffusers and transformers raise errors for most broken folders, and `errors.loading` turns each
into one line. This file checks only what would pass silently (weights that start at random, a
tokenizer without its words), hang (a billion layers) or run code from the folder.
"""

import contextlib
import importlib
import inspect
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import diffusers
import torch
import transformers

from common import errors
from common.errors import InputError
from common.models import contents
from common.models.assumed import require
from common.models.family import CURE, Family

LAYERS = 1000  # the most layers or blocks of a part: building more, even without weights, hangs
TIMESTEPS = 10**6  # the most training timesteps of a scheduler, which keeps a number for each


def load(
    cls: type[Family], folder: Path, dtype: torch.dtype, trusted: bool
) -> diffusers.DiffusionPipeline:
    """Load the pipeline of a family on the CPU, every weight from the folder and in `dtype`.

    trusted: whether Python code from the folder may run. Raises InputError.
    """
    classes = check(cls, folder, trusted)
    with quiet_libraries(), errors.loading("model", folder, do=CURE):
        parts = _parts(cls, folder, classes, dtype, build=_load)
        for name, part in parts.items():
            _check_words(folder / name, part, parts.get(name.replace("tokenizer", "text_encoder")))
        settings = dict(dtype=dtype, trust_remote_code=trusted)
        return cls.pipeline.from_pretrained(folder, **parts, **settings)


def outline(
    cls: type[Family], folder: Path, dtype: torch.dtype, trusted: bool
) -> diffusers.DiffusionPipeline | None:
    """Return the pipeline that `load` would return, its weights on the meta device.

    Return None for a folder with Python code, or with configurations that cannot be built: `load`
    reports why. Raises InputError.
    """
    classes = check(cls, folder, trusted)
    if None in classes.values():
        return None
    with quiet_libraries():
        try:
            parts = _parts(cls, folder, classes, dtype, build=_outline)
            return cls.pipeline.from_pretrained(folder, **parts, dtype=dtype)
        except Exception:  # whatever a wrong setting makes the libraries raise
            return None


def check(cls: type[Family], folder: Path, trusted: bool = False) -> dict[str, type | None]:
    """Return the classes of a pipeline's parts, as `classes` does, and check their files.

    Raises InputError for a missing file, for settings of another class or settings that would hang.
    """
    found = classes(cls, folder, trusted)
    if lacking := missing(folder, found):
        what = contents.instead(folder / lacking)
        raise InputError(f"model: {folder} has no {lacking}{what}; {CURE}.")
    configs = defaultdict(dict)  # a part that the index lacks: diffusers reports it
    for name, of in found.items():
        if of is not None:
            with errors.loading("model", folder / name, do=CURE):
                configs[name] = _check_config(folder / name, of)
                wrong = _wrong_weights(folder / name, of)
            if wrong:
                raise InputError(f"model: {wrong}.")
    if None not in found.values():  # code in the folder may read its configurations as it likes
        for name, values in cls.assumed(configs).items():
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            for key, allowed in values.items() if name in found else ():
                require(folder / name / file, configs[name], key, allowed)
    return found


def classes(cls: type[Family], folder: Path, trusted: bool = False) -> dict[str, type | None]:
    """Return the class of each part of a pipeline, {name: class}, as model_index.json names it.

    The class is None if its code is in the folder; none of that code runs here. Raises InputError.
    """
    found = {}
    path = folder / "model_index.json"
    parameters = inspect.signature(cls.pipeline.__init__).parameters
    with errors.loading("model", path, do=CURE):
        index = json.loads(path.read_text(encoding="utf-8"))
        for name, parameter in list(parameters.items())[1:]:
            kinds = get_args(parameter.annotation) or (parameter.annotation,)
            if bool in kinds or float in kinds:  # a setting of the pipeline
                continue
            entry = index.get(name) or [None, None]
            if entry == [None, None]:  # diffusers raises if the pipeline needs it
                continue
            library, class_name = entry
            module = _library(library)
            if module is None and not trusted:
                raise InputError(
                    f"model: {folder}: its {name} brings Python code. Add --trust-remote-code to "
                    "run it, if you trust it."
                )
            kinds = (torch.nn.Module,) if name in cls.encoders else kinds
            found[name] = _class(name, module, class_name, kinds) if module else None
    return found


def missing(folder: Path, classes: dict[str, type | None]) -> str:
    """Return the first file or folder that these parts lack, "" if they are complete.

    Raises InputError for a table of weights that cannot be read.
    """
    for name, of in classes.items():
        if of is None:
            continue
        if not (folder / name).is_dir():  # the libraries would take the path for a hub id
            return name
        with errors.loading("model", folder / name, do=CURE):
            for file in _needed(folder / name, of):
                if not (folder / name / file).is_file():
                    return f"{name}/{file}"
    return ""


# --- What model_index.json names ---


def _library(name: str) -> ModuleType | None:
    """Return the module that the index names for a part, None if it is code in the folder."""
    if name in ("diffusers", "transformers", "worlds.points"):
        return importlib.import_module(name)
    # Stable Diffusion's safety checker is in diffusers.pipelines.stable_diffusion
    found = getattr(diffusers.pipelines, name, None) if name.isidentifier() else None
    return found if isinstance(found, ModuleType) else None


def _class(name: str, library: ModuleType, class_name: str, kinds: tuple) -> type:
    """Return the class that the index names for a part. Raises TypeError if it does not fit.

    kinds: the classes that the pipeline declares. A part declared as a module must be one: another
    class, such as AutoModel, would load it without a check of its weights.
    """
    of = getattr(library, class_name)
    modules = tuple(kind for kind in kinds if _is_module(kind))
    fits = issubclass(of, modules) if modules else not _is_module(of)
    if not fits or not hasattr(of, "from_pretrained"):
        raise TypeError(f"its {name} is {class_name}, which this pipeline does not take")
    return of


def _is_module(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.nn.Module)


# --- The files of a part ---


def _needed(part: Path, of: type) -> list[str]:
    """Return the files without which a part would not load, or would load wrongly."""
    if issubclass(of, diffusers.SchedulerMixin):
        return ["scheduler_config.json"]
    if "Tokenizer" in of.__name__:  # else its captions would have another length
        return ["tokenizer_config.json"]
    if not _is_module(of):
        return []
    stem, variant = _stem(of), _variant(part, of)
    file = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    table = part / f"{stem}.safetensors.index{f'.{variant}' * bool(variant)}.json"
    if (part / file).is_file() or list(part.glob("*.bin")):
        return ["config.json"]
    if not table.is_file():
        return ["config.json", file]
    shards = json.loads(table.read_text(encoding="utf-8"))["weight_map"].values()
    return ["config.json", *sorted(set(shards))]


def _stem(of: type) -> str:
    """Return the name of a part's file of weights, without what follows the first point."""
    return "model" if issubclass(of, transformers.PreTrainedModel) else "diffusion_pytorch_model"


def _variant(part: Path, of: type) -> str | None:
    """Return the variant of a part's weights, such as fp16, if the folder has one and no other."""
    variants = set(_variants(part, of).values())
    return variants.pop() if len(variants) == 1 else None


def _variants(part: Path, of: type) -> dict[Path, str | None]:
    """Return the safetensors files of a part's weights and their variants, None for the plain."""
    pattern = re.compile(rf"{_stem(of)}(\.(\w+))?(-\d+-of-\d+)?\.safetensors")
    found = {path: pattern.fullmatch(path.name) for path in sorted(part.glob("*.safetensors"))}
    return {path: match[2] for path, match in found.items() if match}


def _wrong_weights(part: Path, of: type) -> str:
    """Return the file of a part that is not weights, what it is and what to do; "" for none."""
    if not _is_module(of):
        return ""
    variant = _variant(part, of)  # other files may be pointers of git-lfs
    used = [path for path, found in _variants(part, of).items() if found == variant]
    for file in used or sorted(part.glob("*.bin")):
        if wrong := contents.of_weights(file):
            return f"{file} {wrong}"
    return ""


def _check_config(part: Path, of: type) -> dict[str, Any]:
    """Return the configuration of a part, {} for a tokenizer.

    Raises ValueError for the settings of another class, or of a part that cannot be built.
    """
    scheduler = issubclass(of, diffusers.SchedulerMixin)
    if not scheduler and not _is_module(of):
        return {}
    file = "scheduler_config.json" if scheduler else "config.json"
    config = json.loads((part / file).read_text(encoding="utf-8"))
    own = config.get("_class_name", of.__name__)
    # the libraries would take their defaults instead of settings that they do not know
    if own != of.__name__ and own not in getattr(of, "_compatibles", ()):
        raise ValueError(f"its {file} is of {own!s:.60}, not {of.__name__}")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "an unknown method")
        raise ValueError(
            f"it is quantized ({method!s:.60} in its {file}), and training needs the weights in "
            "full precision"
        )
    for key, value in config.items():
        counts = "layers" in key or "blocks" in key
        most = TIMESTEPS if key == "num_train_timesteps" else LAYERS if counts else None
        if most and isinstance(value, int) and value > most:
            raise ValueError(f"{key} is {value:.3g} in its {file}")
    return config


# --- Loading ---


def _parts(
    cls: type[Family],
    folder: Path,
    classes: dict[str, type | None],
    dtype: torch.dtype,
    build: Callable[[Path, type, torch.dtype], Any],
) -> dict[str, Any]:
    """Return {name: part} of a pipeline, each by build(its folder, its class, its dtype).

    A part that the folder may lack, and does, is None. Parts with code in the folder are left out.
    """
    parts = dict.fromkeys(cls.left_out)
    for name, of in classes.items():
        if of is not None:
            own = cls.vae_dtype if name == "vae" else None
            parts[name] = build(folder / name, of, own or dtype)
    return parts


def _load(part: Path, of: type, dtype: torch.dtype) -> Any:
    """Load a part of the pipeline. Raises InputError unless weights and module fit each other.

    The file must have all weights. It may have others only for layers that the module lacks.
    """
    with errors.loading("model", part, do=CURE):
        if not _is_module(of):
            return of.from_pretrained(part)
        module, report = of.from_pretrained(
            part, dtype=dtype, variant=_variant(part, of), output_loading_info=True
        )
    absent = sorted(report["missing_keys"])
    layers = {re.sub(r"\d+", "#", key) for key in module.state_dict()}
    extra = [key for key in report["unexpected_keys"] if re.sub(r"\d+", "#", key) in layers]
    if absent or extra:
        what = f"lack {absent[0]}" if absent else f"have {min(extra)} too many"
        raise InputError(
            f"model: the weights in {part} do not fit its config.json: they {what}; {CURE}."
        )
    return module


def _outline(part: Path, of: type, dtype: torch.dtype) -> Any:
    if not _is_module(of):
        return of.from_pretrained(part)
    with torch.device("meta"):
        if issubclass(of, transformers.PreTrainedModel):
            return of(of.config_class.from_pretrained(part)).to(dtype)
        return of.from_config(json.loads((part / "config.json").read_text(encoding="utf-8"))).to(
            dtype
        )


def _check_words(part: Path, tokenizer: Any, encoder: Any) -> None:
    """Raise InputError for a tokenizer that knows less than half of its text encoder's words.

    A tokenizer without one of its files may load and know no words at all.
    """
    if not part.name.startswith("tokenizer") or not _is_module(type(encoder)):
        return
    words = len(tokenizer)
    embeddings = encoder.get_input_embeddings().num_embeddings
    if words < embeddings / 2:
        raise InputError(
            f"model: {part} has {words} words, its text encoder {embeddings}: a file is missing; "
            f"{CURE}."
        )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence diffusers and transformers in the block: an InputError reports what is wrong."""
    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [log.get_verbosity() for log in logs]
    try:
        for log in logs:
            log.set_verbosity(log.CRITICAL)
            log.disable_progress_bar()
        yield
    finally:
        for log, verbosity in zip(logs, before):
            log.set_verbosity(verbosity)
