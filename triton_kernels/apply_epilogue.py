"""apply_epilogue: out += acc · scale + bias, the end of a linear whose product cannot do that.

`apply_epilogue.bf16`: the bf16 path of `linear` (csrc/core/ops.h), where a gate is folded in scale
and bias. `apply_epilogue.residual`, without scale and with the bias in bf16: an fp8 product that is
added to the residual, where cuBLASLt has no algorithm that does this itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def apply_epilogue(
    acc,  # [rows, cols] bf16
    scale,  # [cols] f32, gated only
    bias,  # [cols] f32, bf16 where not gated
    out,  # [rows, cols] bf16, in and out
    rows,
    cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GATED: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < cols)
    at = row.to(tl.int64) * cols + col
    b = tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)
    before = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(acc + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        values *= tl.load(scale + col, mask=col < cols, other=0.0)
    tl.store(out + at, (before + (values + b)).to(tl.bfloat16), mask=inside)


def _spec(name: str, gated: bool) -> Spec:
    return Spec(
        name=name,
        function=apply_epilogue,
        parameters={
            "acc": "*bf16",
            "scale": "*f32",
            "bias": "*f32" if gated else "*bf16",
            "out": "*bf16",
            "rows": "i32",
            "cols": "i32:16",
        },
        constexprs={"GATED": gated},
        launch={"default": Launch(num_warps=4, constexprs={"ROWS": 16, "COLS": 256})},
        grid=((Ceil("rows", "ROWS"),), (Ceil("cols", "COLS"),), (1,)),
        reason="32 values a thread in 16-byte accesses; scale and bias are read once per 16 rows.",
        ops=("linear",),
        max_registers=128,
    )


SPECS = [_spec("apply_epilogue.bf16", True), _spec("apply_epilogue.residual", False)]
