"""The C++ ops of the CPU backend on tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from liveact import _core, _core_dev

DEVICE = _core.open_cpu()


def to_core(value: Any) -> Any:
    """Tensor → array (bf16 and fp8 as their bits); anything else stays what it is."""
    if isinstance(value, tuple):
        return tuple(to_core(v) for v in value)
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bfloat16:
        value = value.view(torch.uint16)
    if value.dtype == torch.float8_e4m3fn:
        value = value.view(torch.uint8)
    return np.ascontiguousarray(value.numpy())


def to_tensor(value: Any) -> Any:
    """The inverse."""
    if isinstance(value, tuple):
        return tuple(to_tensor(v) for v in value)
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(value)
    views = {torch.uint16: torch.bfloat16, torch.uint8: torch.float8_e4m3fn}
    return tensor.view(views[tensor.dtype]) if tensor.dtype in views else tensor


def core(op: str, *arguments: Any) -> Any:
    """Calls `_core_dev.ops.<op>` on the CPU device."""
    return to_tensor(getattr(_core_dev.ops, op)(DEVICE, *(to_core(a) for a in arguments)))
