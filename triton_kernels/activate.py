"""activate: gelu_tanh, gelu_erf or relu, quantised per row where the next linear is fp8
(csrc/core/ops.h).

`activate.gelu_tanh.<cols>.f8` is the hot one, between the two products of the FFN. The bf16
variants are elementwise over the whole matrix; out may be x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import load_tiles, quantize_tiles, tile_width
from triton_kernels.sizes import MODEL_SIZES
from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def gelu_tanh(x):
    """0.5·x·(1 + tanh(u)) = x / (1 + exp(−2u)), u = √(2/π)·(x + 0.044715·x³).

    The exponent is bounded as in csrc/cpu: an infinite x stays infinite instead of becoming NaN.
    """
    # −2u · log2(e) with its constants folded, and 1 / d as a squared root, which Triton does not
    # guard against denormal numbers as it does a division: 4 of 19 instructions a value.
    exponent = x * (-2.3022081985 - 0.10294324 * x * x)
    root = tl.rsqrt(1.0 + tl.exp2(tl.minimum(exponent, 126.0)))
    return x * root * root


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        return gelu_tanh(x)
    elif ACTIVATION == "gelu_erf":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(x < 0.0, 0.0, x)  # not maximum, which would turn a NaN into 0


@triton.jit
def activate_rows(
    x,  # [rows, COLS] bf16
    out,  # [rows, COLS] f8
    scale,  # [rows] f32
    rows,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,  # divides COLS
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = load_tiles(x + row * COLS, COLS, BLOCK)
    results = ()
    for i in tl.static_range(len(values)):
        results += (activated(values[i], ACTIVATION),)
    quantize_tiles(out + row * COLS, scale + row, results, BLOCK)


@triton.jit
def activate(
    x,  # [size] bf16
    out,  # [size] bf16
    size,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    values = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, activated(values, ACTIVATION).to(tl.bfloat16), mask=inside)


TUNING = {"default": Launch(num_warps=4)}
ELEMENTWISE_TUNING = {"default": Launch(num_warps=4, constexprs={"BLOCK": 1024})}


def _rows_spec(cols: int) -> Spec:
    return Spec(
        name=f"activate.gelu_tanh.{cols}.f8",
        function=activate_rows,
        parameters={"x": "*bf16", "out": "*f8", "scale": "*f32:4", "rows": "i32"},
        constexprs={"COLS": cols, "BLOCK": tile_width(cols), "ACTIVATION": "gelu_tanh"},
        launch=TUNING,
        grid=((Ceil("rows"),), (1,), (1,)),
        reason="The amax needs the whole activated row: 13824 values are 108 registers in 4 warps, "
        "so nothing is computed or read twice; 3 rows per SM have 80 KB of loads in flight.",
        ops=("activate",),
        max_registers=200,
    )


def _spec(activation: str) -> Spec:
    return Spec(
        name=f"activate.{activation}.bf16",
        function=activate,
        parameters={"x": "*bf16", "out": "*bf16", "size": "i32:16"},
        constexprs={"ACTIVATION": activation},
        launch=ELEMENTWISE_TUNING,
        grid=((Ceil("size", "BLOCK"),), (1,), (1,)),
        reason="8 values a thread: one 16-byte load and store each.",
        ops=("activate",),
        max_registers=64,
    )


SPECS = [
    *(_rows_spec(size.ffn_dim) for size in MODEL_SIZES),
    *(_spec(activation) for activation in ("gelu_tanh", "gelu_erf", "relu")),
]
