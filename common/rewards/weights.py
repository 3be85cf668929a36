"""Find and load the weights of the learned rewards."""

from pathlib import Path

import torch

from common import errors
from common.errors import InputError


class Source:
    """Find the weights of one reward: at a path of --reward-path, or on the hub."""

    def __init__(self, name: str, paths: dict[str, str | Path] | None = None) -> None:
        """Keep the name of the reward, and the paths {name: path} of --reward-path."""
        self.name = name
        self.paths = paths or {}
        self.given = Path(self.paths[name]) if name in self.paths else None  # a file or a folder

    def of(self, name: str) -> "Source":
        """Return the Source of another reward."""
        return Source(name, self.paths)

    def find(self, repo: str, file: str, beside: bool = False) -> Path:
        """Return the path of a file: the given one, or `file` of the hub's `repo`.

        beside: look for the file next to the weights first. Raises an InputError that names the
        file, the repository and the flag.
        """
        if self.given:
            folder = self.given if self.given.is_dir() else self.given.parent
            path = folder / file if beside or self.given.is_dir() else self.given
            if path.is_file():
                return path
            if not beside:
                raise InputError(
                    f"--reward-path {self.name}={self.given}: there is no file {path}. Correct the "
                    "path."
                )
        from common import hub  # imports huggingface_hub

        download = f"run `hf download {repo} {file}` where there is a network"
        with errors.loading(
            f"reward {self.name}:",
            f"{file} of {repo}",
            do=f"{download}, or give --reward-path {self.name}=FILE",
        ):
            return hub.find(repo, file)


def read(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Return the weights {name: tensor} of a checkpoint, on the CPU. Raises InputError."""
    from safetensors.torch import load_file

    with errors.loading(f"reward {name}: checkpoint", path, do="download it again"):
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        return {key.removeprefix("module."): value for key, value in tensors.items()}


def fill(
    name: str, module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path
) -> torch.nn.Module:
    """Return the module with exactly the weights `state` {name: tensor}, ready to score.

    Raises InputError if a weight is missing, unknown or of another shape.
    """
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    with errors.loading(f"reward {name}: checkpoint", path, do="give the checkpoint of this model"):
        module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def placed(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return the module on a device: in half precision on a GPU, in float32 elsewhere."""
    weight = next(module.parameters())
    dtype = precision(device)
    return module if (weight.device, weight.dtype) == (device, dtype) else module.to(device, dtype)


def precision(device: torch.device) -> torch.dtype:
    """Return the dtype of a reward model's weights on a device."""
    return torch.float32 if device.type == "cpu" else torch.float16


def autocast(device: torch.device) -> torch.autocast:
    """Return a context of half precision on GPUs, and of float32 on a CPU."""
    dtype = precision(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
