"""Whether numbers are numbers: NaN and infinity are refused where they can first be seen."""

from __future__ import annotations

import torch

NOT_FINITE = "a NaN or an infinity"


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether nothing in `tensor` is NaN or infinite. One pass without a copy: a sum is finite only
    if all of it is; where the sum itself overflows, every entry is looked at."""
    if tensor.itemsize == 1:  # fp8: no sums of these
        tensor = tensor.float()
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
