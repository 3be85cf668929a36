"""Weights of the learned rewards: found by --reward-path, in the Hugging Face cache or on the hub,
and loaded whole."""

from pathlib import Path

import torch

from common.errors import InputError


class Source:
    """Where the weights of one reward come from: what --reward-path says {name: path}, or else the
    hub."""

    def __init__(self, name: str, paths: dict[str, str | Path] | None = None) -> None:
        self.name, self.paths = name, paths or {}
        self.given = Path(self.paths[name]) if name in self.paths else None  # a file, or a folder

    def of(self, name: str) -> "Source":
        """That of another reward."""
        return Source(name, self.paths)

    def find(self, repo: str, file: str, beside: bool = False) -> Path:
        """The path of a file; beside: of one that belongs to the weights and is looked for next to
        them first.

        Raises InputError with the file, the hub id and the flag.
        """
        if self.given:
            folder = self.given if self.given.is_dir() else self.given.parent
            path = folder / file if beside or self.given.is_dir() else self.given
            if path.is_file():
                return path
            if not beside:
                raise InputError(
                    f"reward {self.name}: there is no file {path} (--reward-path "
                    f"{self.name}={self.given})"
                )
        return self._from_hub(repo, file)

    def _from_hub(self, repo: str, file: str) -> Path:
        from common import hub  # and with it its client

        try:
            return hub.find(repo, file)
        except hub.ERRORS:
            raise InputError(
                f"reward {self.name}: {file} of {repo} is not in the Hugging Face cache, and the "
                "hub does not give it; "
                f"run `hf download {repo} {file}` where there is a network, or give "
                f"--reward-path {self.name}=FILE"
            ) from None


def read(name: str, path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights {name: tensor} on the CPU; raises InputError for a file that holds
    none."""
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {
            key.removeprefix("module."): value
            for key, value in state.items()
            if torch.is_tensor(value)
        }
    except Exception as error:  # whatever a broken file makes torch say
        raise InputError(
            f"reward {name}: {path} is no checkpoint: {(str(error) or repr(error)).splitlines()[0]}"
        ) from None


def fill(
    name: str, module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path
) -> torch.nn.Module:
    """Puts `state` {name: tensor} into the module, every weight of it, ready to score; raises
    InputError for a checkpoint of another shape. Weights on top of those are an error too: they are
    another model's."""
    expected = {key: value.shape for key, value in module.state_dict().items()}
    state = {
        key: value for key, value in state.items() if not key.endswith("position_ids")
    }  # numbers 0, 1, 2, ...
    wrong = [key for key in expected if key in state and state[key].shape != expected[key]]
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if wrong or missing or extra:
        reasons = [f"it lacks {missing[0]}"] if missing else []
        reasons += [f"it also has {extra[0]}"] if extra else []
        reasons += [
            f"its {key} is {list(state[key].shape)}, not {list(expected[key])}" for key in wrong[:1]
        ]
        raise InputError(
            f"reward {name}: {path} is the checkpoint of another model: {', '.join(reasons)} (of "
            f"{len(expected)} "
            f"weights {len(missing)} are missing and {len(wrong)} have another shape; "
            f"{len(extra)} are unknown)"
        )
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def placed(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The module on the device of the media, at the first call: in half precision on a GPU, in
    float32 elsewhere."""
    weight, dtype = next(module.parameters()), precision(device)
    return module if (weight.device, weight.dtype) == (device, dtype) else module.to(device, dtype)


def precision(device: torch.device) -> torch.dtype:
    """The dtype of a reward model's weights on a device."""
    return torch.float32 if device.type == "cpu" else torch.float16


def autocast(device: torch.device) -> torch.autocast:
    """Half precision on GPUs with float32 where it matters (norms, softmax); on a CPU float32
    whatever is around."""
    dtype = precision(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
