"""Pieces shared by the kernels: the fp8 contract (see csrc/dtype.h) and the rotation."""

from __future__ import annotations

import triton
import triton.language as tl

F8_MAX = tl.constexpr(448.0)
AMAX_FLOOR = tl.constexpr(1e-12)


@triton.jit
def quantize_row(values, out, scale, inside):
    """One row of f32 -> fp8 codes at `out`, and its scale = max(amax, 1e-12) / 448 at `scale`."""
    bound = tl.maximum(tl.max(tl.abs(values), axis=0), AMAX_FLOOR)
    scaled = tl.clamp(values * (F8_MAX / bound), -F8_MAX, F8_MAX)
    tl.store(out, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scale, bound / F8_MAX)
