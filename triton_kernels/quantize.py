"""quantize: a row in another format (csrc/core/ops.h).

`quantize.<cols>.bf16.f8` writes fp8 codes and one scale per row: bf16 activations before an fp8
linear, and the rows (output channels) of a weight. `quantize.f32.bf16` is elementwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import load_tiles, quantize_tiles, tile_width
from triton_kernels.sizes import MODEL_SIZES
from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def quantize_rows(
    x,  # [rows, COLS] bf16
    out,  # [rows, COLS] f8
    scale,  # [rows] f32
    rows,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,  # divides COLS
):
    row = tl.program_id(0).to(tl.int64)
    values = load_tiles(x + row * COLS, COLS, BLOCK)
    quantize_tiles(out + row * COLS, scale + row, values, BLOCK)


@triton.jit
def to_bf16(
    x,  # [size] f32
    out,  # [size] bf16
    size,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    tl.store(out + index, tl.load(x + index, mask=inside).to(tl.bfloat16), mask=inside)


TUNING = {"default": Launch(num_warps=4)}
ELEMENTWISE_TUNING = {"default": Launch(num_warps=4, constexprs={"BLOCK": 1024})}


def _rows_spec(cols: int) -> Spec:
    return Spec(
        name=f"quantize.{cols}.bf16.f8",
        function=quantize_rows,
        parameters={"x": "*bf16", "out": "*f8", "scale": "*f32:4", "rows": "i32"},
        constexprs={"COLS": cols, "BLOCK": tile_width(cols)},
        launch=TUNING,
        grid=((Ceil("rows"),), (1,), (1,)),
        reason="The row stays in registers between amax and codes: 40 values a thread at 5120, "
        "108 at 13824, where 3 rows per SM still have 80 KB of loads in flight.",
        ops=("quantize",),
        max_registers=200,
    )


SPECS = [
    *(_rows_spec(cols) for size in MODEL_SIZES for cols in (size.dim, size.ffn_dim)),
    Spec(
        name="quantize.f32.bf16",
        function=to_bf16,
        parameters={"x": "*f32", "out": "*bf16", "size": "i32:16"},
        constexprs={},
        launch=ELEMENTWISE_TUNING,
        grid=((Ceil("size", "BLOCK"),), (1,), (1,)),
        reason="8 values a thread: one 16-byte store each.",
        ops=("quantize",),
        max_registers=64,
    ),
]
