"""Pieces shared by the kernels: rows in tiles, the fp8 contract (liveact/dtype.h) and the rotation.

A row of 5120 or 13824 is no power of two, so it is held as a tuple of equal tiles (5 × 1024,
27 × 512): no lane works on padding, and sums need one reduction over threads, not one per tile.

NaN: like csrc/cpu, the amax of a row passes over a NaN, and the NaN itself becomes the code 0x7f.
An infinity makes the scale infinite, which turns the row into NaN where it is used. So neither is
ever hidden by saturation. Divisions and roots that fix a scale are the correctly rounded ones:
codes are then equal to the CPU's, bit for bit, wherever the row that is quantised is.
"""

from __future__ import annotations

import triton
import triton.language as tl

F8_MAX = tl.constexpr(448.0)
AMAX_FLOOR = tl.constexpr(1e-12)
MAX_HEADS = tl.constexpr(64)  # kMaxHeads in csrc/cuda/cuda_ops.cpp
HEADROOM = tl.constexpr(8.0)  # kValueHeadroom


def tile_width(cols: int) -> int:
    """The largest power of two that divides a row: the width of its tiles."""
    return cols & -cols


@triton.jit
def load_tiles(row, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """A row as f32 tiles of BLOCK; BLOCK divides COLS."""
    tiles = ()
    for start in tl.static_range(0, COLS, BLOCK):
        tiles += (tl.load(row + start + tl.arange(0, BLOCK)).to(tl.float32),)
    return tiles


@triton.jit
def store_tiles(row, tiles, BLOCK: tl.constexpr):
    """f32 tiles to a row, rounded to its element type (not fp8: see quantize_tiles)."""
    for i in tl.static_range(len(tiles)):
        tl.store(row + i * BLOCK + tl.arange(0, BLOCK), tiles[i].to(row.dtype.element_ty))


@triton.jit
def sum_tiles(tiles):
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    return tl.sum(total, axis=0)


@triton.jit
def sum_squares(tiles):
    total = tiles[0] * tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i] * tiles[i]
    return tl.sum(total, axis=0)


@triton.jit
def encode(values, inverse_scale):
    """f32 -> fp8 codes of values · inverse_scale: round to nearest even, saturating, NaN kept.

    The conversion does all that (cvt.rn.satfinite): a clamp before it would be two instructions.
    """
    return (values * inverse_scale).to(tl.float8e4nv)


@triton.jit
def largest(scales, heads):
    """The largest of [heads] f32, at most MAX_HEADS."""
    head = tl.arange(0, MAX_HEADS)
    return tl.max(tl.load(scales + head, mask=head < heads, other=0.0), axis=0)


@triton.jit
def tight(v_scales, heads):
    """The scale of averages of values that have these scales, which cannot grow over them."""
    return largest(v_scales, heads) / HEADROOM


@triton.jit
def store_mixed(
    at,  # [rows, HD] pointers, bf16 or fp8
    values,  # [rows, HD] f32
    inside,  # [rows]
    scale_at,  # [rows] pointers f32, fp8 only
    scale,  # of all rows, fp8 only
    head,
):
    """What attention writes for one head: fp8 with one scale for all rows (kProbabilityScale)."""
    if at.dtype.element_ty == tl.float8e4nv:
        tl.store(at, encode(values, tl.div_rn(1.0, scale)), mask=inside[:, None])
        if head == 0:
            tl.store(scale_at, scale, mask=inside)
    else:
        tl.store(at, values.to(at.dtype.element_ty), mask=inside[:, None])


@triton.jit
def quantize_tiles(row, scale, tiles, BLOCK: tl.constexpr):
    """f32 tiles -> fp8 codes at `row`, and scale = max(amax, 1e-12) / 448 at `scale`."""
    magnitude = tl.abs(tiles[0])
    for i in tl.static_range(1, len(tiles)):
        magnitude = tl.maximum(magnitude, tl.abs(tiles[i]))
    bound = tl.maximum(tl.max(magnitude, axis=0), AMAX_FLOOR)
    inverse = tl.div_rn(F8_MAX, bound)
    for i in tl.static_range(len(tiles)):
        tl.store(row + i * BLOCK + tl.arange(0, BLOCK), encode(tiles[i], inverse))
    tl.store(scale, tl.div_rn(bound, F8_MAX))


@triton.jit
def angles(
    frame_table,  # [positions, PAIRS_FRAME, 2] (cos, sin)
    row_table,  # [grid_rows, PAIRS_ROW, 2]
    col_table,  # [grid_cols, PAIRS_COL, 2]
    position,  # [tokens, 1]
    token,  # [tokens, 1] within its latent frame
    grid_cols,
    PAIRS: tl.constexpr,  # of a head
    PAIRS_FRAME: tl.constexpr,
    PAIRS_ROW: tl.constexpr,
):
    """(cos, sin) [tokens, PAIRS] of the 3D rotation."""
    FRAME_END: tl.constexpr = 2 * PAIRS_FRAME
    ROW_END: tl.constexpr = FRAME_END + 2 * PAIRS_ROW
    COL_WIDTH: tl.constexpr = 2 * PAIRS - ROW_END
    column = tl.arange(0, 2 * PAIRS)[None, :]
    at = tl.where(
        column < FRAME_END,
        frame_table + position * FRAME_END + column,
        tl.where(
            column < ROW_END,
            row_table + token // grid_cols * (2 * PAIRS_ROW) + column - FRAME_END,
            col_table + token % grid_cols * COL_WIDTH + column - ROW_END,
        ),
    )
    # A (cos, sin) never straddles two tables: 8 aligned bytes, which lanes take in order.
    at = tl.multiple_of(tl.max_contiguous(at, [1, 2]), [8, 8])
    return split_pairs(tl.load(at), PAIRS)


@triton.jit
def split_pairs(heads, PAIRS: tl.constexpr):
    """[n, 2 * PAIRS] -> its even and odd columns, [n, PAIRS] each."""
    return tl.split(tl.reshape(heads, (heads.shape[0], PAIRS, 2)))


@triton.jit
def join_pairs(even, odd, PAIRS: tl.constexpr):
    """The inverse of split_pairs."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * PAIRS))


@triton.jit
def store_queries(at, scale_at, even, odd, PAIRS: tl.constexpr, F8: tl.constexpr):
    """Rotated queries of n heads [n, PAIRS] to rows [n, 2 * PAIRS] at `at`, fp8 with a scale
    [n, 1] of their own at `scale_at`."""
    if F8:
        magnitude = tl.maximum(tl.abs(even), tl.abs(odd))
        bound = tl.maximum(tl.max(magnitude, axis=1, keep_dims=True), AMAX_FLOOR)
        tl.store(at, encode(join_pairs(even, odd, PAIRS), tl.div_rn(F8_MAX, bound)))
        tl.store(scale_at, tl.div_rn(bound, F8_MAX))
    else:
        tl.store(at, join_pairs(even, odd, PAIRS).to(tl.bfloat16))


@triton.jit
def store_keys(at, inverse_scale, even, odd, inside, PAIRS: tl.constexpr, F8: tl.constexpr):
    """Rotated keys of n heads or tokens [n, PAIRS] to rows [n, 2 * PAIRS] at `at`, fp8 with the
    scale of their head."""
    keys = join_pairs(even, odd, PAIRS)
    tl.store(at, encode(keys, inverse_scale) if F8 else keys.to(tl.bfloat16), mask=inside)
