"""split_qkv: the fused product qkv [M, 3D] to rotated queries and keys and K-major values
(csrc/core/ops.h). Two launches:

`split_qkv.qk.<dim>.{f8,bf16}`: one program per token. RMS over all of D, gain, rotation for the
token's latent frame, row and column; q is quantised per token and head, K with the head's fixed
scale. Writes q and K, both [H, M, hd].
`split_qkv.v.{f8,bf16}`: one program per 128 (64 in bf16) tokens of a head. Quantises with the
head's fixed scale and transposes: V is [H, hd, v_stride], v_stride a multiple of 128, at least M.
Columns from M on become zeros: attention multiplies them by a P of 0, and what was there before may
be a NaN, since layers of another format, and blocks of another length, use the same memory.

Two devices have the rows of some latent frames and half of the heads each: a rank writes the heads
of the other one to `upper_*` (or the lower ones to q, k, v), which is peer memory then.

DRAM traffic is the minimum: qkv is read once, q, K and V are written once, in rows of 128 bytes.
At M = 8192, D = 5120, fp8: 252 MB read + 126 MB written + 2 MB of scales and gains = 100 µs at
3.8 TB/s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import (
    angles,
    encode,
    load_tiles,
    split_pairs,
    store_keys,
    store_queries,
    sum_squares,
    tile_width,
)
from triton_kernels.sizes import HEAD_DIM, MODEL_SIZES, PAIRS_FRAME, PAIRS_ROW
from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def norm_rotate_store(
    x,  # [D] bf16: the token's row of q or k
    gain,  # [D] f32
    out,  # [lower_heads, tokens, HD], at this token
    scale,  # f8 only; of q: [lower_heads, tokens], at this token; of k: [H], read
    upper,  # the heads after those: [H - lower_heads, tokens, HD], at this token
    upper_scale,  # of q only
    tokens,
    lower_heads,
    eps,
    cos,  # [1, HD // 2]
    sin,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HD: tl.constexpr,
    KEYS: tl.constexpr,  # k or q?
    F8: tl.constexpr,
):
    HEADS: tl.constexpr = BLOCK // HD  # of a tile
    values = load_tiles(x, D, BLOCK)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(sum_squares(values) / D + eps))
    for i in tl.static_range(len(values)):
        g = tl.load(gain + i * BLOCK + tl.arange(0, BLOCK))
        normed = tl.reshape(values[i] * inverse * g, (HEADS, HD))
        even, odd = split_pairs(normed, HD // 2)
        even, odd = even * cos - odd * sin, even * sin + odd * cos
        head = i * HEADS + tl.arange(0, HEADS)[:, None]
        is_lower = head < lower_heads
        row = (head - tl.where(is_lower, 0, lower_heads)) * tokens
        at = tl.where(is_lower, out, upper) + row * HD + tl.arange(0, HD)[None, :]
        if KEYS:
            inverse_scale = tl.div_rn(1.0, tl.load(scale + head)) if F8 else 1.0
            store_keys(at, inverse_scale, even, odd, None, HD // 2, F8)
        else:
            scale_at = tl.where(is_lower, scale, upper_scale) + row
            store_queries(at, scale_at, even, odd, HD // 2, F8)


@triton.jit
def split_queries_keys(
    qkv,  # [rows, 3D] bf16
    q_gain,  # [D] f32
    k_gain,  # [D] f32
    q,  # [lower_heads, tokens, HD] f8 or bf16
    q_scale,  # [lower_heads, tokens] f32, f8 only
    upper_q,  # [H - lower_heads, tokens, HD]; null where all heads are lower ones
    upper_q_scale,
    k,  # [lower_heads, tokens, HD]
    k_scale,  # [H] f32, f8 only
    upper_k,
    frame_table,  # [positions, PAIRS_FRAME, 2] f32, (cos, sin)
    row_table,  # [grid_rows, PAIRS_ROW, 2] f32
    col_table,  # [grid_cols, PAIRS_COL, 2] f32
    rows,  # a whole number of latent frames
    tokens,  # M
    first_token,  # of row 0
    lower_heads,
    frame_tokens,  # F
    grid_cols,
    first_position,  # latent-frame position of row 0
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two that divides D, a whole number of heads
    HD: tl.constexpr,
    PAIRS_FRAME: tl.constexpr,
    PAIRS_ROW: tl.constexpr,
    F8: tl.constexpr,
):
    row = tl.program_id(0)
    x = qkv + row.to(tl.int64) * (3 * D)
    cos, sin = angles(
        frame_table,
        row_table,
        col_table,
        first_position + row // frame_tokens,
        row % frame_tokens,
        grid_cols,
        HD // 2,
        PAIRS_FRAME,
        PAIRS_ROW,
    )
    token = first_token + row
    at = token * HD
    norm_rotate_store(
        x,
        q_gain,
        q + at,
        q_scale + token,
        upper_q + at,
        upper_q_scale + token,
        tokens,
        lower_heads,
        eps,
        cos,
        sin,
        D,
        BLOCK,
        HD,
        False,
        F8,
    )
    norm_rotate_store(
        x + D,
        k_gain,
        k + at,
        k_scale,
        upper_k + at,
        None,
        tokens,
        lower_heads,
        eps,
        cos,
        sin,
        D,
        BLOCK,
        HD,
        True,
        F8,
    )


@triton.jit
def store_values(at, values, inverse_scale, inside, F8: tl.constexpr):
    if F8:
        tl.store(at, tl.trans(encode(values, inverse_scale)), mask=inside)
    else:
        tl.store(at, tl.trans(values.to(tl.bfloat16)), mask=inside)


@triton.jit
def split_values(
    qkv,  # [rows, 3 * heads * HD] bf16
    v,  # [lower_heads, HD, v_stride] f8 or bf16
    upper_v,  # [heads - lower_heads, HD, v_stride]; null where all heads are lower ones
    v_scale,  # [heads] f32, f8 only
    rows,
    first_token,  # of row 0
    end_token,  # first_token + rows, or v_stride behind the last token
    heads,
    lower_heads,
    v_stride,
    HD: tl.constexpr,
    TOKENS: tl.constexpr,
    F8: tl.constexpr,
):
    first = tl.program_id(0) * TOKENS
    head = tl.program_id(1)
    index = tl.arange(0, TOKENS)
    row = first - first_token + index
    token = first + index
    dim = tl.arange(0, HD)
    width = 3 * heads * HD
    # Pointers of the tile's corner: what is added to them fits 32 bits.
    source = qkv + (first - first_token).to(tl.int64) * width + (2 * heads + head) * HD
    source += index[:, None] * width + dim[None, :]
    is_lower = head < lower_heads
    target_head = head - tl.where(is_lower, 0, lower_heads)
    target = tl.where(is_lower, v, upper_v) + target_head.to(tl.int64) * HD * v_stride + first
    target += dim[:, None] * v_stride + index[None, :]
    inverse = tl.div_rn(1.0, tl.load(v_scale + head)) if F8 else 1.0
    # Only a tile without a mask can move 16 bytes at a time, and all but the ends have none. Tiles
    # begin at multiples of TOKENS wherever the first row is.
    if (first >= first_token) & (first + TOKENS <= first_token + rows):
        store_values(target, tl.load(source).to(tl.float32), inverse, None, F8)
    elif (first + TOKENS > first_token) & (first < end_token):
        is_row = (row >= 0) & (row < rows)
        values = tl.load(source, mask=is_row[:, None], other=0.0).to(tl.float32)
        stored = (row >= 0) & (token < end_token)
        store_values(target, values, inverse, stored[None, :], F8)


QK_TUNING = {"default": Launch(num_warps=4)}
V_TUNING_F8 = {"default": Launch(num_warps=8, constexprs={"TOKENS": 128})}
V_TUNING_BF16 = {"default": Launch(num_warps=8, constexprs={"TOKENS": 64})}


def _qk_spec(dim: int, f8: bool) -> Spec:
    out_type = "f8" if f8 else "bf16"
    return Spec(
        name=f"split_qkv.qk.{dim}.{out_type}",
        function=split_queries_keys,
        parameters={
            "qkv": "*bf16",
            "q_gain": "*f32",
            "k_gain": "*f32",
            "q": f"*{out_type}",
            "q_scale": "*f32:4",
            "upper_q": f"*{out_type}",
            "upper_q_scale": "*f32:4",
            "k": f"*{out_type}",
            "k_scale": "*f32:4",
            "upper_k": f"*{out_type}",
            "frame_table": "*f32",
            "row_table": "*f32",
            "col_table": "*f32",
            "rows": "i32",
            "tokens": "i32",
            "first_token": "i32",
            "lower_heads": "i32",
            "frame_tokens": "i32",
            "grid_cols": "i32",
            "first_position": "i32",
            "eps": "f32",
        },
        constexprs={
            "D": dim,
            "BLOCK": tile_width(dim),
            "HD": HEAD_DIM,
            "PAIRS_FRAME": PAIRS_FRAME,
            "PAIRS_ROW": PAIRS_ROW,
            "F8": f8,
        },
        launch=QK_TUNING,
        grid=((Ceil("rows"),), (1,), (1,)),
        reason="A tile is 8 heads: 8 values a thread, so pairs stay inside a thread and the amax "
        "of a head is 4 shuffles among 16 lanes; only the RMS crosses warps.",
        ops=("split_qkv",),
        max_registers=128,
    )


def _v_spec(f8: bool) -> Spec:
    out_type = "f8" if f8 else "bf16"
    return Spec(
        name=f"split_qkv.v.{out_type}",
        function=split_values,
        parameters={
            "qkv": "*bf16",
            "v": f"*{out_type}",
            "upper_v": f"*{out_type}",
            "v_scale": "*f32:4",
            "rows": "i32",
            "first_token": "i32",
            "end_token": "i32",
            "heads": "i32",
            "lower_heads": "i32",
            "v_stride": "i32:128",
        },
        constexprs={"HD": HEAD_DIM, "F8": f8},
        launch=V_TUNING_F8 if f8 else V_TUNING_BF16,
        grid=((Ceil("v_stride", "TOKENS"),), (Ceil("heads"),), (1,)),
        reason="128 tokens in fp8 and 64 in bf16 make a row of the transposed store one 128-byte "
        "line; the transpose goes through shared memory, 32 KB at most, so 6 programs fit an SM.",
        ops=("split_qkv",),
        max_registers=128,
        max_shared_bytes=48 * 1024,
    )


SPECS = [
    *(_qk_spec(size.dim, f8) for size in MODEL_SIZES for f8 in (True, False)),
    *(_v_spec(f8) for f8 in (True, False)),
]
