"""The folder of a diffusers pipeline: looked through before it is loaded, and loaded part by part.

Half a download, a part of another pipeline, a config that its weights do not fit: diffusers and
transformers raise whatever comes first, or start the weights that are missing at random. Here each
is one line with the folder, the file and what to do."""

import contextlib
import importlib
import inspect
import json
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import diffusers
import torch
import transformers

from common.errors import InputError, text

if TYPE_CHECKING:
    from common.models.family import Family

LIBRARIES = (
    "diffusers",
    "transformers",
)  # and the modules of diffusers.pipelines; any other is code in the folder
VOCABULARIES = (
    "tokenizer.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
)  # of a tokenizer
POINTER = int.from_bytes(b"version ", "little")  # how a file begins that git-lfs has not fetched
LARGEST = 10**6  # steps of a schedule


def load(
    cls: "type[Family]", folder: Path, dtype: torch.dtype, trusted: bool
) -> diffusers.DiffusionPipeline:
    """The pipeline of a family's class on the CPU, weights in `dtype`, every weight from the
    folder; InputError."""
    with _silence():
        parts = {
            name: _load(folder / name, of, _dtype(cls, name, dtype))
            for name, of in check(cls, folder, trusted).items()
            if of is not None
        }
        for name, part in parts.items():
            _check_words(folder, name, part, parts.get(name.replace("tokenizer", "text_encoder")))
        try:
            return _pipeline(cls, folder, parts, dtype=dtype, trust_remote_code=trusted)
        except Exception as error:  # anything; the parts are in order
            raise wrong(folder, f"does not load: {text(error):.300}") from None


def outline(
    cls: "type[Family]", folder: Path, dtype: torch.dtype, trusted: bool
) -> diffusers.DiffusionPipeline | None:
    """The pipeline that `load` would give, its weights without contents (on the meta device). None
    where the folder brings code of its own, and where something is wrong that `load` has the words
    for."""
    parts = check(cls, folder, trusted)
    if None in parts.values():
        return None
    with _silence():
        try:
            parts = {
                name: _outline(folder, name, of, _dtype(cls, name, dtype))
                for name, of in parts.items()
            }
            return _pipeline(cls, folder, parts, dtype=dtype)
        except Exception:  # whatever a wrong setting makes them say
            return None


def _pipeline(
    cls: "type[Family]", folder: Path, parts: dict, **settings
) -> diffusers.DiffusionPipeline:
    return cls.pipeline.from_pretrained(
        folder, **settings, **{**dict.fromkeys(cls.left_out), **parts}
    )


def _dtype(cls: "type[Family]", name: str, dtype: torch.dtype) -> torch.dtype:
    return cls.vae_dtype or dtype if name == "vae" else dtype


def _outline(folder: Path, name: str, of: type, dtype: torch.dtype) -> Any:
    if not _is_module(of):
        return of.from_pretrained(folder / name)
    with torch.device("meta"):
        if issubclass(of, transformers.PreTrainedModel):
            return of(of.config_class.from_pretrained(folder / name)).to(dtype)
        return of.from_config(read_json(folder, f"{name}/config.json")).to(dtype)


def check(cls: "type[Family]", folder: Path, trusted: bool = False) -> dict[str, type | None]:
    """Looks whether a folder has all that a family's pipeline needs, without loading it: {part: its
    class; None for code that the folder brings}. Raises InputError."""
    index, parts = read_json(folder, "model_index.json"), {}
    for name, parameter in list(inspect.signature(cls.pipeline.__init__).parameters.items())[1:]:
        entry, kinds = index.get(name), get_args(parameter.annotation) or (parameter.annotation,)
        if bool in kinds or float in kinds:  # a setting
            if entry is not None and not isinstance(entry, (bool, int, float)):
                raise wrong(
                    folder, f"has a model_index.json whose {name} is {entry!r:.60}, no number"
                )
            continue
        if entry in (None, [None, None]):
            optional = parameter.default is not inspect.Parameter.empty
            optional = optional or name in (*cls.pipeline._optional_components, *cls.left_out)
            if not optional or name == cls.trained[0]:
                raise wrong(
                    folder,
                    f"has a model_index.json without a {name}, which a {cls.pipeline.__name__} "
                    "needs",
                )
            continue
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and all(isinstance(word, str) for word in entry)
        ):
            raise wrong(
                folder,
                f"has a model_index.json whose {name} is {entry!r:.60}, no library and class",
            )
        library = _library(entry[0])
        if library is None and not trusted:
            raise InputError(
                f"model: {folder}: its {name} brings Python code; --trust-remote-code runs it"
            )
        kinds = (torch.nn.Module,) if name in cls.encoders else kinds
        parts[name] = _class_of(folder, name, library, entry[1], kinds) if library else None
    for name, of in parts.items():
        if of is not None:
            _check_files(folder, name, of)
    return parts


def wrong(folder: Path, what: str) -> InputError:
    """The InputError of a folder, for what is wrong with it."""
    return InputError(
        f"model: {folder} {what}; download the whole model again (hf download OWNER/NAME "
        f"--local-dir {folder}), or "
        "give another --model"
    )


def read_json(folder: Path, file: str) -> dict:
    """The dictionary in a JSON file of a folder. Raises InputError."""
    try:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise wrong(folder, f"has no {file}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(folder, f"has a broken {file} ({text(error):.100})") from None
    if not isinstance(content, dict):
        raise wrong(folder, f"has a broken {file} (it holds no dictionary)")
    return content


def _library(name: str) -> ModuleType | None:
    """The module that the index names for a part; None where it is the folder's own."""
    if name in LIBRARIES:
        return importlib.import_module(name)
    found = (
        getattr(diffusers.pipelines, name, None) if name.isidentifier() else None
    )  # SD's safety checker is there
    return found if isinstance(found, ModuleType) else None


def _class_of(folder: Path, name: str, library: ModuleType, class_name: str, kinds: tuple) -> type:
    """The class that the index names for a part, once it is one that the pipeline takes; kinds:
    what it declares."""
    try:
        of = getattr(library, class_name)
    except Exception:  # it imports what it finds by that name
        of = None
    if not isinstance(of, type) or not hasattr(of, "from_pretrained"):
        called = f"{library.__name__}.{class_name:.60}"
        raise wrong(
            folder, f"has a model_index.json whose {name} is {called}, which does not exist"
        )
    modules = tuple(kind for kind in kinds if _is_module(kind))
    fits = issubclass(of, modules) if modules else not _is_module(of)
    if not fits or issubclass(of, diffusers.SchedulerMixin) != (name == "scheduler"):
        raise wrong(
            folder,
            f"has a model_index.json whose {name} is {class_name}"
            + (f", not {' or '.join(kind.__name__ for kind in modules)}" if modules else ""),
        )
    return of


def _is_module(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.nn.Module)


# --- Files ---


def _check_files(folder: Path, name: str, of: type) -> None:
    """Whether a part has its configuration and, of a module, its whole weights."""
    if not (folder / name).is_dir():
        raise wrong(folder, f"has no {name}")
    if _is_module(of):
        config, tensors = read_json(folder, f"{name}/config.json"), _check_weights(folder, name, of)
        if config.get("_class_name", of.__name__) != of.__name__:
            raise wrong(
                folder,
                f"has a {name}/config.json of {config['_class_name']!s:.60}, not {of.__name__}",
            )
        for key, value in config.items():  # each takes a while to build, empty as it is
            if "layers" in key and isinstance(value, int) and value > tensors:
                raise wrong(
                    folder,
                    f"has a {name}/config.json whose {key} is {value}, with {tensors} tensors of "
                    "weights",
                )
    elif issubclass(of, diffusers.SchedulerMixin):
        config = read_json(folder, f"{name}/scheduler_config.json")
        steps = config.get("num_train_timesteps", 1000)
        if not (isinstance(steps, int) and 0 < steps <= LARGEST):
            raise wrong(
                folder,
                f"has a {name}/scheduler_config.json whose num_train_timesteps is {steps!r:.60}",
            )
    elif "Tokenizer" in of.__name__:
        read_json(folder, f"{name}/tokenizer_config.json")
        if not any(
            (folder / name / file).is_file() for file in VOCABULARIES
        ):  # it would know no word
            raise wrong(folder, f"has a {name} without a vocabulary ({', '.join(VOCABULARIES)})")
    for file in sorted((folder / name).glob("*.json")):
        if file.name not in ("vocab.json", "added_tokens.json", "special_tokens_map.json"):
            read_json(folder, f"{name}/{file.name}")


def _check_weights(folder: Path, name: str, of: type) -> float:
    """The number of tensors in a module's weights, by the heads of its files; without .safetensors:
    infinite."""
    stem = "model" if issubclass(of, transformers.PreTrainedModel) else "diffusion_pytorch_model"
    file, table = f"{name}/{stem}.safetensors", f"{name}/{stem}.safetensors.index.json"
    if (folder / file).is_file():
        return _check_safetensors(folder, file)
    if (folder / table).is_file():
        shards = read_json(folder, table).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(shard, str) for shard in shards.values()
        ):
            raise wrong(folder, f"has a broken {table} (it has no weight_map)")
        return sum(
            _check_safetensors(folder, f"{name}/{shard}") for shard in sorted(set(shards.values()))
        )
    if not list((folder / name).glob("*.bin")):
        raise wrong(folder, f"has no {file}")
    return math.inf


def _check_safetensors(folder: Path, file: str) -> int:
    """The number of tensors in a file, once it is as long as its head says."""
    try:
        with open(folder / file, "rb") as opened:
            length = (folder / file).stat().st_size
            head = int.from_bytes(opened.read(8), "little")
            if not 0 < head <= length - 8:
                pointer = (
                    "a pointer of git-lfs: git lfs pull"
                    if head == POINTER
                    else "cut short, or no safetensors"
                )
                raise wrong(folder, f"has a broken {file} ({length} bytes: {pointer})")
            tensors = json.loads(opened.read(head))
        ends = [about["data_offsets"][1] for key, about in tensors.items() if key != "__metadata__"]
        whole = 8 + head + max(ends, default=0)
    except FileNotFoundError:
        raise wrong(folder, f"has no {file}") from None
    except (
        OSError,
        ValueError,
        RecursionError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise wrong(folder, f"has a broken {file} (its head cannot be read)") from None
    if length != whole:
        raise wrong(folder, f"has a broken {file} ({length} of {whole} bytes)")
    return len(ends)


# --- Loading ---


def _load(part: Path, of: type, dtype: torch.dtype) -> Any:
    """A part of the pipeline; of a module every weight is in its file, and no layer of the file is
    left over."""
    try:
        if not _is_module(of):
            return of.from_pretrained(part)
        module, about = of.from_pretrained(part, dtype=dtype, output_loading_info=True)
    except Exception as error:  # whatever a broken file or a wrong setting makes them say
        reason = f"{text(error):.300}"
        while error and not isinstance(error, pickle.UnpicklingError):
            error = error.__cause__ or error.__context__
        reason = (
            "its weights would run code, which is refused: take it as safetensors"
            if error
            else reason
        )
        raise wrong(part.parent, f"has a {part.name} that does not load: {reason}") from None
    missing, extra = sorted(about["missing_keys"]), sorted(about["unexpected_keys"])
    layers = {re.sub(r"\d+", "#", key) for key in module.state_dict()}
    extra = [key for key in extra if re.sub(r"\d+", "#", key) in layers]
    if missing or extra:
        what = (
            f"lacks {missing[0]}"
            if missing
            else f"also has {extra[0]}: its config.json is another model's"
        )
        raise wrong(part.parent, f"has weights of a {part.name} that do not fit: the file {what}")
    return module


def _check_words(folder: Path, name: str, tokenizer: Any, encoder: Any) -> None:
    """Whether a tokenizer knows the words that its text encoder does, or about as many: without one
    of its files it may load, and know none."""
    if name.startswith("tokenizer") and _is_module(type(encoder)):
        words, embeddings = len(tokenizer), encoder.get_input_embeddings().num_embeddings
        if words < embeddings / 2:
            raise wrong(
                folder,
                f"has a {name} of {words} words, for a text encoder of {embeddings}: a file is "
                "missing",
            )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Inside, the libraries report nothing: what is wrong with the weights is said in one line."""
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
