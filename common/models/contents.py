"""Say what a file or folder is that is not what --model needs, and what to do about it.

The libraries report "header too large" for a web page and "no file named" for a LoRA. The first
bytes and the names of files tell which of the usual mix-ups it is.
"""

import json
import pickletools
import re
import zipfile
from pathlib import Path

HEAD = 512  # bytes that tell a kind of file
LONGEST_HEADER = 10**8  # bytes of a safetensors header, as the library has it
AGAIN = "download it again"
CONVERT = (
    "Convert it with diffusers: PIPELINE.from_single_file(FILE).save_pretrained(FOLDER), then "
    "--model FOLDER"
)
LORA = "Give the model that it adapts as --model, and it as --init-lora"
WHOLE = "Give the folder of a whole diffusers pipeline"
# names of tensors, for files of weights alone: (what, pattern)
KEYS = (
    ("a LoRA", r"lora_(A|B|up|down)|lora\.(up|down)"),
    ("a ControlNet", r"^control_model\.|controlnet_|control_add_embedding"),
)
QUANTIZED = ("F8_", "F4", "F6_", "I8", "U8")  # dtypes of quantized weights in a safetensors file
PICKLED = ("torch", "collections", "_codecs", "numpy")  # modules that pickled tensors name
OTHER = {
    ".gguf": "GGUF files, which are quantized",
    ".msgpack": "Flax weights",
    ".h5": "TensorFlow weights",
    ".onnx": "ONNX files",
}


def of_weights(file: Path) -> str:
    """Return what is wrong with a file of weights and what to do, "" for tensors.

    A file that is cut short is left to the libraries.
    """
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    start = head.lstrip().lower()
    if not head:
        return f"is empty; {AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return f"is a pointer of git-lfs, not the weights; run `git lfs pull` in {file.parent}"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return f"is a web page; {AGAIN}, after `hf auth login` if the model is gated"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, quantized; give the model in full precision"
    if head.startswith(b"PK"):
        return _of_zip(file)
    if start.startswith((b"{", b"access to model", b"entry not found", b"invalid")):
        return f"is text ({start[:40].decode(errors='replace')}...); {AGAIN}"
    header = _header(file)
    dtypes = {value.get("dtype", "") for value in header.values() if isinstance(value, dict)}
    if found := sorted(dtype for dtype in dtypes if dtype.startswith(QUANTIZED)):
        return f"is quantized ({', '.join(found)}); give the model in full precision"
    return ""


def of_file(file: Path) -> str:
    """Return what a file is that was given as --model, and what to do."""
    if wrong := of_weights(file):
        return wrong
    names = _header(file).keys()
    for what, pattern in KEYS:
        if any(re.search(pattern, name) for name in names):
            return f"is {what}. {LORA if what == 'a LoRA' else WHOLE}"
    if file.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        return f"is a single file of weights. {CONVERT}"
    return f"is a file. {WHOLE}"


def of_folder(folder: Path) -> str:
    """Return what a folder without model_index.json is, and what to do."""
    files = [path for path in folder.iterdir() if path.is_file()]
    names = {path.name for path in files}
    within = sorted(path.parent for path in folder.glob("*/model_index.json"))
    snapshots = sorted(folder.glob("snapshots/*"))
    if unfinished(folder):
        return f"its download did not finish. {AGAIN.capitalize()}"
    if within:
        return f"a pipeline is inside it. Give {within[-1]}"
    if snapshots:
        return f"it is a folder of the hub's cache. Give its OWNER/NAME, or {snapshots[-1]}"
    if {"adapter_config.json", "pytorch_lora_weights.safetensors"} & names:
        return f"it is a LoRA. {LORA}"
    if {"config.json", "metrics.jsonl"} <= names:
        return "it is the folder of a run. Give its export/, or --resume latest to continue it"
    if "config.json" in names:
        return _of_part(folder)
    weights = [path for path in files if path.suffix in (".safetensors", ".ckpt", ".gguf")]
    if len(weights) == 1:
        return f"its {weights[0].name} {of_file(weights[0])}"
    if not any(folder.iterdir()):
        return f"it is empty. {WHOLE}"
    return WHOLE


def instead(file: Path) -> str:
    """Return what is in the place of a file of weights that is missing, "" for nothing known."""
    part = file.parent
    if unfinished(part.parent) or unfinished(part):
        return ": its download did not finish"
    other = sorted({OTHER[path.suffix] for path in part.glob("*") if path.suffix in OTHER})
    if other:
        return f" but {' and '.join(other)}, which are not supported"
    variants = sorted(path.name for path in part.glob("*.safetensors"))
    if variants:
        return f" but {', '.join(variants[:4])}: give the one that is meant that name"
    if "snapshots" in part.parts:
        return (
            ". If its repository has variants only (fp16), run `hf download OWNER/NAME --local-dir "
            "FOLDER`, and give --model FOLDER"
        )
    return ""


def unfinished(folder: Path) -> bool:
    """Return whether a download into a folder was cut."""
    places = (folder, folder / ".cache/huggingface/download", folder / "blobs")
    return any(next(place.rglob("*.incomplete"), None) for place in places if place.is_dir())


def _of_part(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name") or next(iter(config.get("architectures") or ()), "model")
    except (ValueError, AttributeError):
        name = "model"
    above = folder.parent
    whole = f"Give {above}" if (above / "model_index.json").is_file() else WHOLE
    return f"it is a {name!s:.60} alone. {whole}"


def _of_zip(file: Path) -> str:
    """Return what is wrong with a zip file, "" for tensors that torch.save wrote."""
    try:
        with zipfile.ZipFile(file) as opened:
            names = opened.namelist()
            pickled = [opened.read(name) for name in names if name.endswith("/data.pkl")]
            called = [arg for data in pickled for _, arg, _ in _calls(data)]
    except (zipfile.BadZipFile, OSError, ValueError):  # cut short
        return ""
    if any("/code/" in name for name in names):
        return "is a TorchScript program; give the model's weights as safetensors"
    if not any(name.endswith("data.pkl") for name in names):
        return "is a zip file; unpack it"
    if foreign := [name for name in called if name.split(".")[0].split()[0] not in PICKLED]:
        return f"holds Python code ({foreign[0]!s:.60}); get the weights as safetensors"
    if file.suffix == ".safetensors":
        return f"is a file of torch.save under another name; {AGAIN}"
    return ""


def _calls(data: bytes) -> list:
    """Return the operations of a pickle that name a function or class, without running it."""
    return [found for found in pickletools.genops(data) if found[0].name == "GLOBAL"]


def _header(file: Path) -> dict:
    """Return the header of a safetensors file, {} if it has none."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if file.suffix != ".safetensors" or length > LONGEST_HEADER:
            return {}
        try:
            header = json.loads(opened.read(length))
        except (ValueError, RecursionError):
            return {}
    return header if isinstance(header, dict) else {}
