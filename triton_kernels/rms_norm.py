"""rms_norm: x / rms(x) · gain over all columns, bf16 (csrc/core/ops.h). out may be x.

The query of cross-attention and the keys of text and image. One program has one row in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import load_tiles, store_tiles, sum_squares, tile_width
from triton_kernels.sizes import MODEL_SIZES
from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def rms_norm(
    x,  # [rows, COLS] bf16
    gain,  # [COLS] f32
    out,  # [rows, COLS] bf16
    rows,
    eps,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,  # divides COLS
):
    row = tl.program_id(0).to(tl.int64)
    values = load_tiles(x + row * COLS, COLS, BLOCK)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(sum_squares(values) / COLS + eps))
    normed = ()
    for i in tl.static_range(len(values)):
        g = tl.load(gain + i * BLOCK + tl.arange(0, BLOCK))
        normed += (values[i] * inverse * g,)
    store_tiles(out + row * COLS, normed, BLOCK)


TUNING = {"default": Launch(num_warps=4)}


def _spec(cols: int) -> Spec:
    return Spec(
        name=f"rms_norm.{cols}.bf16",
        function=rms_norm,
        parameters={"x": "*bf16", "gain": "*f32", "out": "*bf16", "rows": "i32", "eps": "f32"},
        constexprs={"COLS": cols, "BLOCK": tile_width(cols)},
        launch=TUNING,
        grid=((Ceil("rows"),), (1,), (1,)),
        reason="As layer_norm: 40 values a thread, one read and one write of the row.",
        ops=("rms_norm",),
        max_registers=128,
    )


SPECS = [_spec(size.dim) for size in MODEL_SIZES]
