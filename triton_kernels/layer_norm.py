"""layer_norm: LayerNorm(x)·gain + bias over the columns, quantised per row (csrc/core/ops.h).

Modulation (gain = 1 + scale, bias = shift) and the affine norm are the same kernel. One program has
one row in registers, so a row is read once and written once; out may be x.

`layer_norm.<dim>.{f8,bf16}` are for the rows of the DiT. `layer_norm.conditioning.{f32,bf16}` (by
the type of x) takes rows of any width up to 2048: image features and audio tokens, a few hundred
rows per session or block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import (
    load_tiles,
    quantize_tiles,
    store_tiles,
    sum_squares,
    sum_tiles,
    tile_width,
)
from triton_kernels.sizes import MODEL_SIZES
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
    BLOCK: tl.constexpr,  # divides COLS
    F8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = load_tiles(x + row * COLS, COLS, BLOCK)
    mean = sum_tiles(values) / COLS
    centred = ()
    for i in tl.static_range(len(values)):
        centred += (values[i] - mean,)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(sum_squares(centred) / COLS + eps))
    normed = ()
    for i in tl.static_range(len(centred)):
        columns = i * BLOCK + tl.arange(0, BLOCK)
        scaled = centred[i] * inverse * tl.load(gain + columns)
        normed += (scaled + tl.load(bias + columns),)
    if F8:
        quantize_tiles(out + row * COLS, scale + row, normed, BLOCK)
    else:
        store_tiles(out + row * COLS, normed, BLOCK)


@triton.jit
def layer_norm_conditioning(
    x,  # [rows, cols] f32 or bf16
    gain,  # [cols] f32
    bias,  # [cols] f32
    out,  # [rows, cols] bf16
    rows,
    cols,  # <= BLOCK
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < cols
    values = tl.load(x + row * cols + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / cols
    centred = tl.where(inside, values - mean, 0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, axis=0) / cols + eps))
    scaled = centred * inverse * tl.load(gain + columns, mask=inside, other=0.0)
    normed = scaled + tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(out + row * cols + columns, normed.to(tl.bfloat16), mask=inside)


MAX_CONDITIONING_COLS = 2048
TUNING = {"default": Launch(num_warps=4)}
CONDITIONING_TUNING = {"default": Launch(num_warps=4)}


def _spec(cols: int, f8: bool) -> Spec:
    return Spec(
        name=f"layer_norm.{cols}.{'f8' if f8 else 'bf16'}",
        function=layer_norm,
        parameters={
            "x": "*bf16",
            "gain": "*f32",
            "bias": "*f32",
            "out": "*f8" if f8 else "*bf16",
            "scale": "*f32:4",
            "rows": "i32",
            "eps": "f32",
        },
        constexprs={"COLS": cols, "BLOCK": tile_width(cols), "F8": f8},
        launch=TUNING,
        grid=((Ceil("rows"),), (1,), (1,)),
        reason="5120 values in 4 warps are 40 a thread, loaded 16 bytes at a time; 5 or more rows "
        "in flight per SM keep the loads of the next under this one's arithmetic.",
        ops=("layer_norm",),
        max_registers=128,
    )


def _conditioning_spec(x_type: str) -> Spec:
    return Spec(
        name=f"layer_norm.conditioning.{x_type}",
        function=layer_norm_conditioning,
        parameters={
            "x": f"*{x_type}",
            "gain": "*f32",
            "bias": "*f32",
            "out": "*bf16",
            "rows": "i32",
            "cols": "i32:16",
            "eps": "f32",
        },
        constexprs={"BLOCK": MAX_CONDITIONING_COLS},
        launch=CONDITIONING_TUNING,
        grid=((Ceil("rows"),), (1,), (1,)),
        reason="Off the hot path: one kernel for every width is worth more than its lanes.",
        ops=("layer_norm",),
        max_registers=128,
    )


SPECS = [
    *(_spec(size.dim, f8) for size in MODEL_SIZES for f8 in (True, False)),
    *(_conditioning_spec(x_type) for x_type in ("f32", "bf16")),
]
