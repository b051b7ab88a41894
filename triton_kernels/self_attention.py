"""self_attention: out = softmax(q · [context; current]ᵀ / √hd) · [context; current] (core/ops.h).

One program has BLOCK_M queries of one head and walks the key tiles of the context, then those of
the current block, with a running maximum (online softmax); no mask but the ragged end of either
segment. docs/attention.md has the arithmetic; the numbers in the comments below come from there.

Layouts: q, k [H, tokens, hd]; V is K-major, [H, hd, stride] with stride = tokens rounded up to
VALUE_PADDING and zeros beyond the tokens, because an fp8 wgmma reads nothing else.
fp8: q has a scale per token and head; K and V have one per head, so that K's goes into the scale of
the query's row and V's is applied once, at the end. P is multiplied by 256 (kProbabilityScale)
before its cast, which is an addition in the exponent of exp2 and leaves the result by the division
by the row sum, which carries the same factor.
Not finite: a NaN or infinite logit makes its query's row NaN, a NaN in V its column.

Two devices have half of the heads each and the rows of some latent frames: `out` is on the device
of the first rows, `rest` on that of the others, and one of them is a peer's memory.

Grid: query tiles run fastest, so the 132 programs of a wave share two or three heads, whose K and V
(3.7 MB a head at 14 latent frames of 1024 tokens) stay in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import largest, store_mixed
from triton_kernels.spec import Ceil, Launch, Spec

HEAD_DIM = 128
VALUE_PADDING = 128  # columns of a K-major V are allocated, and zero, up to a multiple of this
SCALE_LOG2 = tl.constexpr(1.4426950408889634 / HEAD_DIM**0.5)  # softmax scale, for exp2
PROBABILITY_SCALE_LOG2 = tl.constexpr(8.0)  # log2 of kProbabilityScale in csrc/core/ops.h


# A tensor core leaves row sums of products with a thread holding columns 2t, 2t+1 of every 8, but
# wants its fp8 left operand with bytes 4t .. 4t+3 of every 16: P would have to travel between
# threads. Softmax does not care in which order the keys stand, so K's rows are loaded in the order
# below, and P is then in the order of memory where it is, without a single shuffle.
@triton.jit
def _key_of_column(column):
    """Which key of the tile column `column` of the scores holds: bits h·tt·e → tt·h·e of 16."""
    return (column & -16) | ((column & 6) << 1) | ((column & 8) >> 2) | (column & 1)


@triton.jit
def _to_memory(p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] in the order of the score columns → in the order of memory."""
    split = p.reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2)
    return split.trans(0, 1, 3, 2, 4).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _place(tile, context_tiles, context_tokens, current_tokens, BLOCK_N: tl.constexpr):
    """(in the context?, tokens of its segment, first token in it) of key tile `tile`."""
    in_context = tile < context_tiles
    tokens = tl.where(in_context, context_tokens, current_tokens)
    first = tl.where(in_context, tile, tile - context_tiles) * BLOCK_N
    return in_context, tokens, first


@triton.jit
def self_attention(
    q,  # [H, M, HEAD_DIM] f8 or bf16
    q_scale,  # [H, M] f32, f8 only
    context_k,  # [H, Tc, HEAD_DIM]
    context_v,  # [H, HEAD_DIM, context_v_stride]
    current_k,  # [H, Tk, HEAD_DIM]
    current_v,  # [H, HEAD_DIM, current_v_stride]
    k_scale,  # [H] f32, f8 only
    v_scale,  # [H] f32, f8 only
    out,  # [out_rows, all_heads * HEAD_DIM] bf16 or f8, at the columns of the first of these heads
    out_scale,  # [out_rows] f32, f8 only
    rest,  # the rows after them, [M - out_rows, all_heads * HEAD_DIM]
    rest_scale,  # [M - out_rows] f32, f8 only
    head_scale,  # [all_heads] f32, f8 only: the largest is every row's scale
    tokens,  # M
    out_rows,
    heads,  # H
    all_heads,  # of both devices where two share them, else H
    context_tokens,  # Tc, may be 0
    current_tokens,  # Tk, at least 1
    context_v_stride,
    current_v_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F8: tl.constexpr,
    TO_F8: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    dims = tl.arange(0, HEAD_DIM)
    columns = tl.arange(0, BLOCK_N)
    keys = _key_of_column(columns) if F8 else columns

    q_rows = q + head * tokens * HEAD_DIM + rows[:, None] * HEAD_DIM
    q_tile = tl.load(q_rows + dims[None, :], mask=inside[:, None], other=0.0)
    row_scale = tl.full([BLOCK_M], SCALE_LOG2, tl.float32)  # logit in powers of two per score
    if F8:
        row_scale *= tl.load(q_scale + head * tokens + rows, mask=inside, other=0.0)
        row_scale *= tl.load(k_scale + head)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    context_tiles = tl.cdiv(context_tokens, BLOCK_N)
    tiles = context_tiles + tl.cdiv(current_tokens, BLOCK_N)
    # The scores of tile i+1 are computed under the softmax of tile i: one tile of K runs ahead.
    in_context, n, first = _place(0, context_tiles, context_tokens, current_tokens, BLOCK_N)
    k_rows = tl.where(in_context, context_k, current_k) + head * n * HEAD_DIM
    k_offsets = keys[:, None] * HEAD_DIM + dims[None, :]
    k_tile = tl.load(k_rows + k_offsets, mask=(keys < n)[:, None], other=0.0)
    scores_ahead = tl.dot(q_tile, k_tile.trans())
    for tile in tl.range(0, tiles):
        scores = scores_ahead
        in_context, n, first = _place(tile, context_tiles, context_tokens, current_tokens, BLOCK_N)
        if first + BLOCK_N > n:
            scores = tl.where((keys < n - first)[None, :], scores, float("-inf"))

        # NOTE: the order of these statements is the schedule. The exponents are taken before the
        # next product is issued: it goes where these scores were, where otherwise 64 moves a tile
        # would make room. The exponentials, which take twice as long as it, are what runs over it.
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * row_scale)
        correction = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        shift = maximum - PROBABILITY_SCALE_LOG2
        exponents = scores * row_scale[:, None] - shift[:, None]

        ahead_in_context, ahead_n, ahead_first = _place(
            tile + 1, context_tiles, context_tokens, current_tokens, BLOCK_N
        )
        k_rows = tl.where(ahead_in_context, context_k, current_k)
        k_rows += (head * ahead_n + ahead_first) * HEAD_DIM
        k_inside = keys < ahead_n - ahead_first  # none after the last tile
        k_tile = tl.load(k_rows + k_offsets, mask=k_inside[:, None], other=0.0)
        scores_ahead = tl.dot(q_tile, k_tile.trans())

        v_stride = tl.where(in_context, context_v_stride, current_v_stride)
        v_rows = tl.where(in_context, context_v, current_v) + head * HEAD_DIM * v_stride + first
        v_tile = tl.load(v_rows + dims[:, None] * v_stride + columns[None, :])

        p = tl.exp2(exponents)  # 256 · P
        total = total * correction + tl.sum(p, axis=1)
        if F8:
            p = _to_memory(p.to(tl.float8e4nv), BLOCK_M, BLOCK_N)
            # Two levels: the tensor core sums a tile (4 steps, ~14 bits), f32 sums the tiles. It
            # costs nothing: the correction turns from a multiplication into a multiply-add.
            acc = acc * correction[:, None] + tl.dot(p, v_tile.trans())
        else:
            acc = tl.dot(p.to(tl.bfloat16), v_tile.trans(), acc * correction[:, None])

    scale = 1.0 / total
    if F8:
        scale *= tl.load(v_scale + head)
    here = rows < out_rows
    row = tl.where(here, rows, rows - out_rows)
    targets = tl.where(here, out, rest) + row.to(tl.int64) * (all_heads * HEAD_DIM)
    scales = tl.where(here, out_scale, rest_scale) + row
    row_scale_out = largest(head_scale, all_heads) if TO_F8 else 1.0
    values = acc * scale[:, None]
    at = targets[:, None] + head * HEAD_DIM + dims[None, :]
    store_mixed(at, values, inside, scales, row_scale_out, head)


def _spec(f8: bool, to_f8: bool = False) -> Spec:
    element = "*f8" if f8 else "*bf16"
    return Spec(
        name=f"self_attention.{'f8' if f8 else 'bf16'}{'.to_f8' if to_f8 else ''}",
        function=self_attention,
        parameters={
            "q": element,
            "q_scale": "*f32:4",
            "context_k": element,
            "context_v": element,
            "current_k": element,
            "current_v": element,
            "k_scale": "*f32:4",
            "v_scale": "*f32:4",
            "out": "*f8" if to_f8 else "*bf16",
            "out_scale": "*f32:4",
            "rest": "*f8" if to_f8 else "*bf16",
            "rest_scale": "*f32:4",
            "head_scale": "*f32:4",
            "tokens": "i32",
            "out_rows": "i32",
            "heads": "i32",
            "all_heads": "i32",
            "context_tokens": "i32",
            "current_tokens": "i32",
            "context_v_stride": f"i32:{VALUE_PADDING}",
            "current_v_stride": f"i32:{VALUE_PADDING}",
        },
        constexprs={"HEAD_DIM": HEAD_DIM, "F8": f8, "TO_F8": to_f8},
        launch=TUNING_F8 if f8 else TUNING_BF16,
        grid=((Ceil("tokens", "BLOCK_M"),), (Ceil("heads"),), (1,)),
        reason=REASON_F8 if f8 else REASON_BF16,
        ops=("self_attention",),
    )


def _tiles(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Launch:
    return Launch(num_warps, num_stages, {"BLOCK_M": block_m, "BLOCK_N": block_n})


REASON_F8 = (
    "Registers: two score tiles, the tile's P·V and the accumulator are 4 × 64 of the 255 of a "
    "thread at 64 rows a warp group. 128 rows a program because with 64 K and V would leave the L2 "
    "cache at 5.1 TB/s (650 TFLOP/s), its limit; with 128 at half of that."
)
REASON_BF16 = (
    "Registers: the accumulator and two score tiles; key tiles of 64, since with 128 the packed P "
    "(32 registers instead of 16 in fp8) spills."
)
# Ada and consumer Blackwell have 99 KB of shared memory and no wgmma: operands pass through
# registers, so smaller key tiles. Datacentre Blackwell keeps scores in tensor memory.
TUNING_F8 = {
    "default": _tiles(128, 64, 8, 2),
    "sm_90a": _tiles(128, 128, 8, 3),
    "sm_100a": _tiles(128, 128, 8, 2),
}
TUNING_BF16 = {
    "default": _tiles(128, 32, 8, 2),
    "sm_90a": _tiles(128, 64, 8, 3),
    "sm_100a": _tiles(128, 128, 8, 2),
}

SPECS = [_spec(True), _spec(False), _spec(True, to_f8=True)]
