"""cross_attention: out = Attn(q, text) + Attn(q, image), two softmaxes over one q (core/ops.h).

The last text key stands for all padding rows of the prompt: log(their count) is added to its logit.
The launcher passes that logarithm as `pad_bias` and the number of keys attended to as `text_keys`:
text_tokens, or text_tokens - 1 with pad_bias 0 where there is no padding.

bf16 throughout: the key sets are short (prompt + 1, and 257), so q and out are what is moved, and
the keys and values of all heads (2 · 40 · 600 · 128 · 2 bytes = 12 MB) stay in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import store_mixed, tight
from triton_kernels.spec import Ceil, Launch, Spec

HEAD_DIM = 128
SCALE_LOG2 = tl.constexpr(1.4426950408889634 / HEAD_DIM**0.5)  # softmax scale, for exp2
INVERSE_SCALE = tl.constexpr(HEAD_DIM**0.5)


@triton.jit
def _attend(
    q_tile,  # [BLOCK_M, HEAD_DIM] bf16
    k,  # [rows, HEAD_DIM] bf16, of one head
    v,  # [rows, HEAD_DIM] bf16, of one head
    keys,  # how many rows are attended to, at least 1
    last_bias,  # added to the logit of the last of them, f32
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """softmax(q · kᵀ / √hd + bias) · v as f32 [BLOCK_M, HEAD_DIM]."""
    dims = tl.arange(0, HEAD_DIM)
    columns = tl.arange(0, BLOCK_N)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for first in tl.range(0, keys, BLOCK_N):
        left = keys - first
        offsets = (first + columns)[:, None] * HEAD_DIM + dims[None, :]
        inside = (columns < left)[:, None]
        k_tile = tl.load(k + offsets, mask=inside, other=0.0)
        v_tile = tl.load(v + offsets, mask=inside, other=0.0)
        scores = tl.dot(q_tile, k_tile.trans())
        if left <= BLOCK_N:
            scores += tl.where(columns == left - 1, last_bias * INVERSE_SCALE, 0.0)[None, :]
            scores = tl.where((columns < left)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * SCALE_LOG2)
        correction = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        p = tl.exp2(scores * SCALE_LOG2 - maximum[:, None])
        total = total * correction + tl.sum(p, axis=1)
        acc = tl.dot(p.to(tl.bfloat16), v_tile, acc * correction[:, None])
    return acc * (1.0 / total)[:, None]


@triton.jit
def cross_attention(
    q,  # [M, H * HEAD_DIM] bf16
    text_k,  # [H, text_tokens, HEAD_DIM] bf16
    text_v,  # [H, text_tokens, HEAD_DIM] bf16
    image_k,  # [H, image_tokens, HEAD_DIM] bf16
    image_v,  # [H, image_tokens, HEAD_DIM] bf16
    out,  # [M, H * HEAD_DIM] bf16 or f8
    out_scale,  # [M] f32, f8 only
    text_v_scale,  # [H] f32, f8 only: the largest of both make every row's scale
    image_v_scale,  # [H] f32, f8 only
    tokens,  # M
    heads,  # H
    text_tokens,
    text_keys,
    image_tokens,
    pad_bias,  # f32
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TO_F8: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    row_offsets = rows[:, None].to(tl.int64) * (heads * HEAD_DIM) + head * HEAD_DIM
    offsets = row_offsets + tl.arange(0, HEAD_DIM)[None, :]
    q_tile = tl.load(q + offsets, mask=inside[:, None], other=0.0)
    text = head * text_tokens * HEAD_DIM
    image = head * image_tokens * HEAD_DIM
    values = _attend(
        q_tile, text_k + text, text_v + text, text_keys, pad_bias, HEAD_DIM, BLOCK_M, BLOCK_N
    )
    values += _attend(
        q_tile, image_k + image, image_v + image, image_tokens, 0.0, HEAD_DIM, BLOCK_M, BLOCK_N
    )
    scale = 1.0
    if TO_F8:
        scale = tight(text_v_scale, heads) + tight(image_v_scale, heads)
    store_mixed(out + offsets, values, inside, out_scale + rows, scale, head)


TUNING = {
    "default": Launch(8, 2, {"BLOCK_M": 128, "BLOCK_N": 32}),
    "sm_90a": Launch(8, 2, {"BLOCK_M": 128, "BLOCK_N": 64}),
}

SPECS = [
    Spec(
        name=f"cross_attention{'.to_f8' if to_f8 else ''}",
        function=cross_attention,
        parameters={
            "q": "*bf16",
            "text_k": "*bf16",
            "text_v": "*bf16",
            "image_k": "*bf16",
            "image_v": "*bf16",
            "out": "*f8" if to_f8 else "*bf16",
            "out_scale": "*f32:4",
            "text_v_scale": "*f32:4",
            "image_v_scale": "*f32:4",
            "tokens": "i32",
            "heads": "i32",
            "text_tokens": "i32",
            "text_keys": "i32",
            "image_tokens": "i32",
            "pad_bias": "f32",
        },
        constexprs={"HEAD_DIM": HEAD_DIM, "TO_F8": to_f8},
        launch=TUNING,
        grid=((Ceil("tokens", "BLOCK_M"),), (Ceil("heads"),), (1,)),
        reason="Moving q and out takes 168 MB at 8192 tokens, 40 µs; the products of 320 + 64 keys "
        "take about as long. Key tiles of 64 waste least of 257 = 4 · 64 + 1 keys and of a prompt.",
        ops=("cross_attention",),
    )
    for to_f8 in (False, True)
]
