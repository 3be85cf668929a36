"""Find the file of a LoRA, read its rank and alpha, and write files that name alpha."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import errors
from common.errors import InputError

ALPHA = "vgrpo_lora_alpha"  # in the metadata of our files: alpha of the training
FIRST = re.compile(r"lora(_A|_down|\.down)(\.\w+)?\.weight$")  # end of the first matrix's name
# How the names of a LoRA's weights end. diffusers drops others, such as a DoRA's magnitudes, with a
# warning.
PARTS = re.compile(r"(lora(_A|_B|_down|_up|\.down|\.up)(\.\w+)?\.weight|\.alpha)$")


def writer(alpha: float) -> Callable[[dict[str, torch.Tensor], str], None]:
    """Return the save_function of save_lora_weights that keeps alpha in the file's metadata."""
    from safetensors.torch import save_file

    def save(weights: dict[str, torch.Tensor], path: str) -> None:
        # A single entry: safetensors writes several in a random order, and the files of equal
        # weights would differ.
        save_file(weights, path, metadata={ALPHA: str(alpha)})

    return save


def find(path: str | Path) -> Path:
    """Return the safetensors file that a path names, or the one in its folder.

    Raises ValueError unless there is one.
    """
    path = Path(path)
    own = path / "pytorch_lora_weights.safetensors"
    if path.is_file() or own.is_file():
        return path if path.is_file() else own
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{path} has {len(files)} safetensors files, one is needed")
    return files[0]


def rank_and_alpha(path: str | Path) -> tuple[int, float]:
    """Return rank and alpha of the LoRA in a file or folder, from the file's header.

    Our files have alpha in their metadata, diffusers' in the adapter's metadata, kohya's in
    tensors. If a file names no alpha, it is the rank. Raises InputError unless it is a LoRA with
    one rank.
    """
    from safetensors import safe_open

    if not Path(path).exists():
        raise InputError(
            f"--init-lora {path}: there is no such file or folder. A run needs it at its start and "
            "at every resume. Put it back, or start a run without it."
        )
    with (
        errors.loading("--init-lora", path, do="give a LoRA's safetensors file or its folder"),
        safe_open(find(path), framework="pt") as file,
    ):
        names = list(file.keys())
        first = [name for name in names if FIRST.search(name)]
        ranks = sorted({file.get_slice(name).get_shape()[0] for name in first})
        alphas = _in_metadata(file.metadata() or {})
        alphas += [float(file.get_tensor(name)) for name in names if name.endswith(".alpha")]
    other = next((name for name in names if not PARTS.search(name)), None)
    if not ranks or other:
        found = other or next(iter(names), "no tensor")
        raise InputError(f"--init-lora {path}: not a LoRA, it has {found:.100}. Give a LoRA.")
    if len(ranks) > 1:
        raise InputError(
            f"--init-lora {path}: its layers have the ranks {', '.join(map(str, ranks))}. Only one "
            "rank for all is supported. Merge it into the model, and train that (--model FOLDER)."
        )
    alpha = alphas[0] if alphas else float(ranks[0])
    if not 0 < alpha < math.inf:
        raise InputError(f"--init-lora {path}: its alpha is {alpha:g}. Give another LoRA.")
    return ranks[0], alpha


def _in_metadata(metadata: dict[str, str]) -> list[float]:
    """Return the alphas that a file's metadata names."""
    if ALPHA in metadata:
        return [float(metadata[ALPHA])]
    adapter: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return [float(value) for key, value in adapter.items() if key.endswith("lora_alpha")]
