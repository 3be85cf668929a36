"""What a run is made of: digests of its prompts, model, rewards and LoRA, in RUN/inputs.json.

{setting: {part: digest}}, where a part is a file, or contents and order of the prompts. Paths are
left out, so a run may move to another machine. A digest of more than a MiB covers the size and 64
places of the file. It misses a change of a few weights between these places, and a conditioning
image that was replaced by one of the same name and size. Files that a reward imports, weights from
the hub for rewards, and a judge's server are not covered.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from common import models
from common.args import Args
from common.errors import InputError, loading
from common.models import lora_file
from common.prompts import caption_of, fields_of, images_of, read_prompts
from common.rewards import own, table

NAME = "inputs.json"
WHOLE = 2**20  # bytes up to which a file is read as a whole
PLACES = 64
BLOCK = 4096  # bytes that are read at each place

Inputs = dict[str, dict[str, str]]


def found(args: Args) -> Inputs:
    """Return the digests of what the settings name, without what is not on this machine yet.

    What cannot be read is left out: it is reported where it is loaded.
    """
    parts = {
        "prompts": lambda: _prompts(args.prompts),
        "eval_prompts": lambda: _prompts(args.eval_prompts),
        "model": lambda: _files(models.files(args.model, args.source, args.trust_remote_code)),
        "init_lora": lambda: {"LoRA": digest(lora_file.find(args.init_lora))},
        "reward": lambda: _rewards(args.reward),
        "reward_path": lambda: _weights(args.reward_path),
        "judge_model": lambda: _files(_within(Path(args.judge_model), "")),
    }
    digests = {}
    for name, parts_of in parts.items():
        if getattr(args, name):
            with contextlib.suppress(InputError, OSError, ValueError):
                digests[name] = parts_of()
    return {name: values for name, values in digests.items() if values}


def read(folder: Path) -> Inputs:
    """Return the inputs.json of a run, {} for one of an older version. Raises InputError."""
    path = folder / NAME
    if not os.path.exists(path):
        return {}
    with loading(f"--resume: {path}", do="remove it to resume without this comparison"):
        inputs = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(parts, dict) for parts in inputs.values()):
            raise ValueError("it is not a dictionary of digests")
    return inputs


def changed(then: Inputs, now: Inputs) -> dict[str, str]:
    """Return {setting: the first part that differs} of the settings that both have."""
    found = {}
    for name in sorted(then.keys() & now.keys()):
        parts = sorted(then[name].keys() | now[name].keys())
        different = [part for part in parts if then[name].get(part) != now[name].get(part)]
        if different:
            found[name] = different[0]
    return found


def digest(path: str | Path) -> str:
    """Return a digest of a file's size and content; of a large file's content at PLACES places.

    Raises OSError.
    """
    size = os.path.getsize(path)
    words = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE:
            words.update(file.read())
        else:
            for place in range(PLACES):
                file.seek((size - BLOCK) * place // (PLACES - 1))
                words.update(file.read(BLOCK))
    return words.hexdigest()[:32]


# --- The parts of a setting ---


def _prompts(spec: str) -> dict[str, str]:
    rows = [_row(prompt) for prompt in read_prompts(spec)]
    return {"contents": _digest_of(sorted(rows)), "order": _digest_of(rows)}


def _row(prompt: str) -> str:
    """Return a prompt as text, with names and sizes of its images in the place of their paths."""
    images = []
    for image in images_of(prompt) or [""]:  # "": as older runs hashed a prompt without an image
        size = os.path.getsize(image) if image and os.path.exists(image) else 0
        images += [Path(image).name, size]
    return json.dumps([caption_of(prompt), fields_of(prompt), *images], default=str)


def _digest_of(rows: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:32]


def _rewards(specs: Iterable[str]) -> dict[str, str]:
    """Return the digests of the rewards that are files of the user."""
    sources = [table.split(spec)[:2] for spec in specs]
    own_files = [(source, name) for source, name in sources if own.MARK in source]
    return {name: digest(source.rpartition(":")[0]) for source, name in own_files}


def _weights(specs: Iterable[str]) -> dict[str, str]:
    files = {}
    for spec in specs:
        name, _, path = spec.partition("=")
        files.update(_within(Path(path), name) if Path(path).is_dir() else {name: Path(path)})
    return _files(files)


def _within(folder: Path, name: str) -> dict[str, Path]:
    """Return the files of a folder, without those of its folders."""
    return {f"{name}/{path.name}": path for path in folder.glob("*") if path.is_file()}


def _files(files: dict[str, Path]) -> dict[str, str]:
    return {name: digest(path) for name, path in sorted(files.items())}
