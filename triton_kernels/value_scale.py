"""value_scale: the fixed scale of V per head, from block 0 (csrc/core/ops.h, kValueHeadroom).

`value_scale`: one program per head walks all tokens, so there is no atomic, no second launch and
nothing to clear. 40 programs do not fill a GPU; at an estimated 0.1 ms for 6 latent frames of 1024
tokens that costs 12 ms in block 0 of a session and never again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import AMAX_FLOOR, F8_MAX
from triton_kernels.sizes import HEAD_DIM
from triton_kernels.spec import Ceil, Launch, Spec

HEADROOM = tl.constexpr(8.0)  # kValueHeadroom


@triton.jit
def value_scale(
    qkv,  # [rows, 3 * heads * HD] bf16
    v_scale,  # [heads] f32
    rows,
    heads,
    HD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0)
    column = (2 * heads + head) * HD + tl.arange(0, HD)[None, :]
    magnitude = tl.zeros((TOKENS, HD), tl.float32)
    for first in range(0, rows, TOKENS):
        token = (first + tl.arange(0, TOKENS))[:, None]
        at = qkv + token.to(tl.int64) * (3 * heads * HD) + column
        values = tl.load(at, mask=token < rows, other=0.0)
        magnitude = tl.maximum(magnitude, tl.abs(values.to(tl.float32)))
    bound = tl.maximum(tl.max(tl.max(magnitude, axis=1), axis=0), AMAX_FLOOR)
    tl.store(v_scale + head, tl.div_rn(HEADROOM * bound, F8_MAX))


SPECS = [
    Spec(
        name="value_scale",
        function=value_scale,
        parameters={"qkv": "*bf16", "v_scale": "*f32:4", "rows": "i32", "heads": "i32"},
        constexprs={"HD": HEAD_DIM},
        launch={"default": Launch(num_warps=8, constexprs={"TOKENS": 128})},
        grid=((Ceil("heads"),), (1,), (1,)),
        reason="32 KB of loads in flight per program, which is what one SM can have.",
        ops=("value_scale",),
        max_registers=255,
    )
]
