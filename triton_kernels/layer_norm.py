"""layer_norm: LayerNorm(x)·gain + bias over the columns, quantised per row (csrc/ops.h).

Modulation (gain = 1 + scale, bias = shift) and the affine norm are the same kernel. One program has
one row in registers, so a row is read once and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import quantize_row
from triton_kernels.sizes import ROW_WIDTHS
from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def layer_norm(
    x,  # [rows, COLS] bf16
    gain,  # [COLS] f32
    bias,  # [COLS] f32
    out,  # [rows, COLS] f8 or bf16
    scale,  # [rows] f32, f8 only
    rows,
    eps,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= COLS
    F8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < COLS
    values = tl.load(x + row * COLS + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / COLS
    centred = tl.where(inside, values - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / COLS + eps)
    g = tl.load(gain + columns, mask=inside, other=0.0)
    b = tl.load(bias + columns, mask=inside, other=0.0)
    normed = centred * inverse * g + b
    if F8:
        quantize_row(normed, out + row * COLS + columns, scale + row, inside)
    else:
        tl.store(out + row * COLS + columns, normed.to(tl.bfloat16), mask=inside)


def _spec(cols: int, f8: bool) -> Spec:
    return Spec(
        name=f"layer_norm.{cols}.{'f8' if f8 else 'bf16'}",
        function=layer_norm,
        parameters={
            "x": "*bf16",
            "gain": "*f32",
            "bias": "*f32",
            "out": "*f8" if f8 else "*bf16",
            "scale": "*f32",
            "rows": "i32",
            "eps": "f32",
        },
        constexprs={"COLS": cols, "BLOCK": triton.next_power_of_2(cols), "F8": f8},
        launch=TUNING,
        grid=((Ceil("rows"),), (1,), (1,)),
        reason="A row of 5120 in 8 warps is 32 values a thread (8192 with the padding): no spills, "
        "and 8 rows in flight per SM keep the loads of the next rows under this one's arithmetic.",
        ops=("layer_norm",),
        max_registers=128,
    )


TUNING = {"default": Launch(num_warps=8)}

SPECS = [_spec(cols, f8) for cols in ROW_WIDTHS for f8 in (True, False)]
