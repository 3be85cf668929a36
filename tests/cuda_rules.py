"""CUDA's autocast rules on a CPU, whose own autocast has shorter lists: rms_norm, layer_norm or pow
stay in bfloat16 there."""

import re
from functools import cache
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

HEADER = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"


@cache
def ops(rule: str) -> frozenset[str]:
    """Return the names of the operations in a list of torch's header, AT_FORALL_{rule}."""
    text = HEADER.read_text()
    (body,) = re.findall(rf"define AT_FORALL_{rule}\(_\)(.*?)\n\n", text, re.S)
    return frozenset(re.findall(r"_\((\w+)", body))


class CudaAutocast(TorchFunctionMode):
    """Inside, calls of torch's functions under torch.autocast("cpu") cast their arguments as
    torch.autocast("cuda") would.

    What autocast on CPUs casts beyond CUDA's lists stays so: a few losses and poolings.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtype = self._dtype(func)
        if dtype:
            args = [self._cast(value, dtype) for value in args]
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    @staticmethod
    def _dtype(func) -> torch.dtype | None:
        if not torch.is_autocast_enabled("cpu"):
            return None
        name = getattr(func, "__name__", "").strip("_")
        if name in ops("FP32") | ops("FP32_SET_OPT_DTYPE"):
            return torch.float32
        if name in ops("LOWER_PRECISION_FP"):
            return torch.get_autocast_dtype("cpu")
        return None

    def _cast(self, value, dtype):
        if isinstance(value, (tuple, list)):
            return type(value)(self._cast(part, dtype) for part in value)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        return value
