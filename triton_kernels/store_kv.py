"""store_kv: keys and values of a text or an image, token-major, to [H, T, hd] each (core/ops.h).

`store_kv.bf16`: both matrices plain bf16 and both [H, T, hd]: unlike the self-attention segments, V
is not K-major here. Runs once per prompt or image and layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.sizes import HEAD_DIM
from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def store_kv(
    k,  # [tokens, heads * HD] bf16
    v,  # [tokens, heads * HD] bf16
    segment_k,  # [heads, tokens, HD] bf16
    segment_v,  # [heads, tokens, HD] bf16
    tokens,
    heads,
    HD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    head = tl.program_id(1)
    dim = tl.arange(0, HD)[None, :]
    inside = token < tokens
    source = (token * heads + head) * HD + dim
    target = (head * tokens + token) * HD + dim
    tl.store(segment_k + target, tl.load(k + source, mask=inside), mask=inside)
    tl.store(segment_v + target, tl.load(v + source, mask=inside), mask=inside)


SPECS = [
    Spec(
        name="store_kv.bf16",
        function=store_kv,
        parameters={
            "k": "*bf16",
            "v": "*bf16",
            "segment_k": "*bf16",
            "segment_v": "*bf16",
            "tokens": "i32",
            "heads": "i32",
        },
        constexprs={"HD": HEAD_DIM},
        launch={"default": Launch(num_warps=4, constexprs={"TOKENS": 16})},
        grid=((Ceil("tokens", "TOKENS"),), (Ceil("heads"),), (1,)),
        reason="A copy: 16 bytes a thread and access, rows of 256 bytes on both sides.",
        ops=("store_kv",),
        max_registers=64,
    )
]
