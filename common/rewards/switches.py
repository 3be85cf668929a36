"""Keep the global switches that a user's reward sets apart from those of the run.

A reward file may call os.chdir, torch.set_grad_enabled(False), random.seed or warnings.simplefilter
for its own work. Left on, some of them change what the run trains, without an error. So a reward
from a file is loaded and called inside its `Switches`. After each call the run gets its values
back, and the next call of the reward gets those that the reward had set.
"""

import contextlib
import logging
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

UNREADABLE = "unreadable"  # a flag of torch that cannot be read after its newer form was set


@dataclass(frozen=True)
class Switch:
    """A global value: read() returns it in a form that == compares, write(value) sets it."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    ofthread: bool = False  # each thread has its own value
    kept: bool = True  # the reward finds its own value again; else the run's value is put back only
    numbers: bool = False  # of the process, and set by nobody while a run samples


def flags(paths: list[str]) -> Switch:
    """Return the Switch of attributes of torch, as "backends.cudnn.enabled", that this torch has.

    They are set in their order.
    """

    def owner(path: str) -> tuple[Any, str]:
        *parts, name = path.split(".")
        found = torch
        for part in parts:
            found = getattr(found, part)
        return found, name

    def read() -> dict[str, Any]:
        values = {}
        for path in paths:
            try:
                module, name = owner(path)
                values[path] = getattr(module, name)
            except AttributeError:  # another release of torch
                continue
            except RuntimeError:
                values[path] = UNREADABLE
        return values

    def write(values: dict[str, Any]) -> None:
        for path, value in values.items():
            if value != UNREADABLE:
                module, name = owner(path)
                setattr(module, name, value)

    return Switch(read, write, numbers=True)


# --- Values that need more than one call ---


def _read_autocast() -> tuple:
    devices = {name: torch.is_autocast_enabled(name) for name in ("cpu", "cuda")}
    dtypes = {name: torch.get_autocast_dtype(name) for name in devices}
    torch.autocast_increment_nesting()  # only these two calls return the depth
    depth = torch.autocast_decrement_nesting()
    return devices, dtypes, depth, torch.is_autocast_cache_enabled()


def _write_autocast(value: tuple) -> None:
    devices, dtypes, depth, cached = value
    for name, is_on in devices.items():
        torch.set_autocast_enabled(name, is_on)
        torch.set_autocast_dtype(name, dtypes[name])
    torch.set_autocast_cache_enabled(cached)
    while _read_autocast()[2] > depth:
        torch.autocast_decrement_nesting()
    while _read_autocast()[2] < depth:
        torch.autocast_increment_nesting()
    torch.clear_autocast_cache()  # half-precision copies of weights, which updates make stale


def _write_default_device(value: torch.device) -> None:
    torch.set_default_device(None if value.type == "cpu" else value)


def _read_cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _write_cuda_device(value: int | None) -> None:
    if value is not None:
        torch.cuda.set_device(value)


def _read_deterministic() -> tuple:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _write_deterministic(value: tuple) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _read_attention() -> tuple:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def _write_attention(value: tuple) -> None:
    torch.backends.cuda.enable_flash_sdp(value[0])
    torch.backends.cuda.enable_mem_efficient_sdp(value[1])
    torch.backends.cuda.enable_math_sdp(value[2])
    torch.backends.cuda.enable_cudnn_sdp(value[3])


def _read_anomaly() -> tuple:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _read_seeds() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    return random.getstate(), pickle.dumps(np.random.get_state()), *states


def _write_seeds(value: tuple) -> None:
    python, numpy, cpu, *cuda = value
    random.setstate(python)
    np.random.set_state(pickle.loads(numpy))
    torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
    if cuda:
        torch.cuda.set_rng_state_all(
            [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in cuda]
        )


def _write_environment(value: dict[str, str]) -> None:
    for name in os.environ.keys() - value.keys():
        del os.environ[name]
    for name, word in value.items():
        if os.environ.get(name) != word:
            os.environ[name] = word


def _write_warnings(value: list) -> None:
    warnings.filters[:] = value
    with warnings.catch_warnings():  # makes Python read the filters again
        pass


def _read_logging() -> tuple:
    root = logging.getLogger()
    return root.level, list(root.handlers), logging.root.manager.disable


def _write_logging(value: tuple) -> None:
    root = logging.getLogger()
    level, root.handlers[:], disabled = value
    root.setLevel(level)
    logging.disable(disabled)


def _read_signals() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _write_signals(value: dict[int, Any]) -> None:
    for number, handler in value.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _write_list(target: list, value: list) -> None:
    target[:] = value


def _write_streams(value: tuple) -> None:
    sys.stdout, sys.stderr = value


SWITCHES = {
    "gradients": Switch(torch.is_grad_enabled, torch.set_grad_enabled, ofthread=True),
    "autocast": Switch(_read_autocast, _write_autocast, ofthread=True),
    "the default device": Switch(torch.get_default_device, _write_default_device, ofthread=True),
    "the CUDA device": Switch(_read_cuda_device, _write_cuda_device, ofthread=True),
    "the default dtype": Switch(torch.get_default_dtype, torch.set_default_dtype, numbers=True),
    "deterministic algorithms": Switch(_read_deterministic, _write_deterministic, numbers=True),
    "flags of torch": flags(
        [
            *("backends.cudnn.enabled", "backends.cudnn.benchmark"),
            *("backends.cudnn.deterministic", "backends.mkldnn.enabled"),
            *("backends.mkldnn.deterministic", "utils.deterministic.fill_uninitialized_memory"),
            "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
            "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
        ]
    ),
    "the precision of float32": flags(
        [  # the older names come first: they set the newer ones
            *("backends.cuda.matmul.allow_tf32", "backends.cudnn.allow_tf32"),
            *("backends.fp32_precision", "backends.cudnn.fp32_precision"),
            *("backends.cuda.matmul.fp32_precision", "backends.cudnn.conv.fp32_precision"),
            *("backends.cudnn.rnn.fp32_precision", "backends.mkldnn.matmul.fp32_precision"),
            "backends.mkldnn.conv.fp32_precision",
        ]
    ),
    "attention kernels": Switch(_read_attention, _write_attention),
    "anomaly detection": Switch(
        _read_anomaly, lambda value: torch.autograd.set_detect_anomaly(*value), numbers=True
    ),
    "threads of torch": Switch(torch.get_num_threads, torch.set_num_threads, ofthread=True),
    "seeds": Switch(_read_seeds, _write_seeds),
    "errors of numpy": Switch(np.geterr, lambda value: np.seterr(**value), ofthread=True),
    "the environment": Switch(lambda: dict(os.environ), _write_environment),
    "sys.path": Switch(lambda: list(sys.path), lambda value: _write_list(sys.path, value)),
    "sys.argv": Switch(lambda: list(sys.argv), lambda value: _write_list(sys.argv, value)),
    "warnings": Switch(lambda: list(warnings.filters), _write_warnings),
    "logging": Switch(_read_logging, _write_logging),
    "signal handlers": Switch(_read_signals, _write_signals, kept=False),
    "stdout and stderr": Switch(lambda: (sys.stdout, sys.stderr), _write_streams, kept=False),
    "the working directory": Switch(os.getcwd, os.chdir, numbers=True),
}


class Switches:
    """A context: inside, the global switches as a reward left them; outside, those of the run.

    In another thread than the main one the run samples at the same time. There only a thread's own
    switches are exchanged, and the context raises ValueError if the reward changed a switch of the
    process that changes numbers or paths. It also raises ValueError if one cannot be put back.
    """

    def __init__(self) -> None:
        self.theirs = {}  # {name: value} of the switches that the reward changed

    def __enter__(self) -> "Switches":
        self.alone = threading.current_thread() is threading.main_thread()
        self.looked = {n: s for n, s in SWITCHES.items() if self.alone or s.ofthread or s.numbers}
        self.ours = {name: switch.read() for name, switch in self.looked.items()}
        # a mode of torch that no function sets; leaving this one undoes all that began inside
        self.mode = contextlib.ExitStack()
        self.mode.enter_context(torch.inference_mode(torch.is_inference_mode_enabled()))
        torch.set_grad_enabled(self.ours["gradients"])
        for name, value in self.theirs.items():
            if name in self.looked and (self.alone or SWITCHES[name].ofthread):
                SWITCHES[name].write(value)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        left = {name: switch.read() for name, switch in self.looked.items()}
        self.mode.close()
        stuck, changed = [], []
        for name, switch in self.looked.items():
            is_changed = left[name] != self.ours[name]
            if is_changed and not self.alone and not switch.ofthread:
                changed.append(name)
            if is_changed and switch.kept:
                self.theirs[name] = left[name]
            else:
                self.theirs.pop(name, None)
            if switch.read() != self.ours[name]:
                with contextlib.suppress(Exception):
                    switch.write(self.ours[name])
                if switch.read() != self.ours[name]:
                    stuck.append(name)
        if error is not None:
            return
        if stuck:
            raise ValueError(f"it changed {', '.join(stuck)}, which cannot be put back")
        if changed:
            raise ValueError(
                f"it changed {', '.join(changed)} while the run samples in another thread; put "
                "that back, or leave `elsewhere` out"
            )
