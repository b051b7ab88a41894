"""value_scale: a scale per head that leaves headroom (csrc/core/ops.h, kValueHeadroom): of V and of
what self-attention writes, from block 0; of the values of text, image and audio.

`value_scale`: one program per head walks all tokens, so there is no atomic, no second launch and
nothing to clear. 40 programs do not fill a GPU; at an estimated 0.1 ms for 6 latent frames of 1024
tokens twice that costs 24 ms in block 0 of a session and never again. The 256 audio tokens of a
block take some 4 µs a layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import AMAX_FLOOR, F8_MAX, HEADROOM
from triton_kernels.sizes import HEAD_DIM
from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def value_scale(
    values,  # [rows, heads * HD] bf16
    scale,  # [heads] f32
    rows,
    heads,
    stride,  # elements from row to row
    HD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0)
    column = head * HD + tl.arange(0, HD)[None, :]
    magnitude = tl.zeros((TOKENS, HD), tl.float32)
    for first in range(0, rows, TOKENS):
        token = (first + tl.arange(0, TOKENS))[:, None]
        at = values + token.to(tl.int64) * stride + column
        tile = tl.load(at, mask=token < rows, other=0.0)
        magnitude = tl.maximum(magnitude, tl.abs(tile.to(tl.float32)))
    bound = tl.maximum(tl.max(tl.max(magnitude, axis=1), axis=0), AMAX_FLOOR)
    tl.store(scale + head, tl.div_rn(HEADROOM * bound, F8_MAX))


SPECS = [
    Spec(
        name="value_scale",
        function=value_scale,
        parameters={
            "values": "*bf16",
            "scale": "*f32:4",
            "rows": "i32",
            "heads": "i32",
            "stride": "i32:16",
        },
        constexprs={"HD": HEAD_DIM},
        launch={"default": Launch(num_warps=8, constexprs={"TOKENS": 128})},
        grid=((Ceil("heads"),), (1,), (1,)),
        reason="32 KB of loads in flight per program, which is what one SM can have.",
        ops=("value_scale",),
        max_registers=255,
    )
]
