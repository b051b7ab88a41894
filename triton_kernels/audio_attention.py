"""audio_attention: each latent frame's queries attend to that frame's audio tokens (core/ops.h).

A frame has at most BLOCK_T audio tokens (32; 8 in the small models), so one tile holds all keys and
the softmax needs no running maximum. kv comes from the fused projection, token-major (k | v); with
kv_frames 1 every latent frame attends to the same tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import store_mixed, tight
from triton_kernels.spec import Ceil, Launch, Spec

HEAD_DIM = 128
MAX_TOKENS = 32  # audio tokens of a latent frame
SCALE_LOG2 = tl.constexpr(1.4426950408889634 / HEAD_DIM**0.5)  # softmax scale, for exp2


@triton.jit
def audio_attention(
    q,  # [frames * frame_rows, H * HEAD_DIM] bf16
    kv,  # [kv_frames * tokens, 2 * H * HEAD_DIM] bf16
    out,  # [frames * frame_rows, H * HEAD_DIM] bf16 or f8
    out_scale,  # [frames * frame_rows] f32, f8 only
    v_scale,  # [H] f32, f8 only: the largest is every row's scale
    frame_rows,  # queries of a latent frame
    frames,  # latent frames, read by the grid only
    heads,  # H
    kv_frames,  # frames or 1
    tokens,  # audio tokens of a latent frame, 1 .. BLOCK_T
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TO_F8: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(2)
    width = heads * HEAD_DIM
    dims = tl.arange(0, HEAD_DIM)
    columns = tl.arange(0, BLOCK_T)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < frame_rows
    token = frame * frame_rows + rows
    row_offsets = token[:, None].to(tl.int64) * width + head * HEAD_DIM
    q_tile = tl.load(q + row_offsets + dims[None, :], mask=inside[:, None], other=0.0)

    kv_row = tl.where(kv_frames == 1, 0, frame) * tokens + columns
    kv_offsets = kv_row[:, None].to(tl.int64) * (2 * width) + head * HEAD_DIM + dims[None, :]
    is_token = columns < tokens
    k_tile = tl.load(kv + kv_offsets, mask=is_token[:, None], other=0.0)
    v_tile = tl.load(kv + width + kv_offsets, mask=is_token[:, None], other=0.0)

    logits = tl.dot(q_tile, k_tile.trans()) * SCALE_LOG2
    logits = tl.where(is_token[None, :], logits, float("-inf"))
    p = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    acc = tl.dot(p.to(tl.bfloat16), v_tile)
    values = acc * (1.0 / tl.sum(p, axis=1))[:, None]
    scale = tight(v_scale, heads) if TO_F8 else 1.0
    store_mixed(out + row_offsets + dims[None, :], values, inside, out_scale + token, scale, head)


TUNING = {"default": Launch(4, 1, {"BLOCK_M": 64})}

SPECS = [
    Spec(
        name=f"audio_attention{'.to_f8' if to_f8 else ''}",
        function=audio_attention,
        parameters={
            "q": "*bf16",
            "kv": "*bf16",
            "out": "*f8" if to_f8 else "*bf16",
            "out_scale": "*f32:4",
            "v_scale": "*f32:4",
            "frame_rows": "i32",
            "frames": "i32",
            "heads": "i32",
            "kv_frames": "i32",
            "tokens": "i32",
        },
        constexprs={"HEAD_DIM": HEAD_DIM, "BLOCK_T": MAX_TOKENS, "TO_F8": to_f8},
        launch=TUNING,
        grid=((Ceil("frame_rows", "BLOCK_M"),), (Ceil("heads"),), (Ceil("frames"),)),
        reason="Memory bound: q and out are 168 MB at 8192 tokens, the products 3 % of that time. "
        "4 warps and 16 KB of q, so that several programs per SM keep loads in flight.",
        ops=("audio_attention",),
    )
    for to_f8 in (False, True)
]
