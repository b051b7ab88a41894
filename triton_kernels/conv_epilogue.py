"""conv_epilogue: everything between two convolutions of the VAE decoder, in one pass.

x = value + bias + skip; then either SiLU(norm(x) · gamma) or x itself goes to `out`, which is where
the next convolution reads (the frames after those it remembers). The reference is
`TorchOps.settle` of engine/liveact/vae/ops.py; that file also describes the orders of `value`.

A pixel is a row of C channels: 384, 192 or 96 in the released model, three tiles of a power of two.
The variants are those that the decoder uses; in a name, `keep` says that x is also written to
`kept`, where the residual branch finds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import tile_width
from triton_kernels.sizes import VAE_WIDTHS
from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def source_of(row, height, width, COLS: tl.constexpr, ORDER: tl.constexpr):
    """Where pixel `row` of [t, height, width] begins in `value`, in elements."""
    if ORDER == "frames":  # [t/2, height, width, 2·COLS]
        size = height * width
        frame = row // size
        pixel = (frame // 2).to(tl.int64) * size + row % size
        return (2 * pixel + frame % 2) * COLS
    elif ORDER == "phases":  # [t, height/2 + 1, width/2 + 1, 4·COLS]
        x = row % width
        line = row // width
        y = line % height
        a = y % 2
        b = x % 2
        frame = (line // height).to(tl.int64)
        pixel = (frame * (height // 2 + 1) + y // 2 + a) * (width // 2 + 1) + x // 2 + b
        return (4 * pixel + 2 * a + b) * COLS
    else:
        return row.to(tl.int64) * COLS


@triton.jit
def conv_epilogue(
    value,  # [rows, COLS] bf16, in the given order
    bias,  # [COLS] f32; [2 * COLS] in the order `frames`
    skip,  # [rows, COLS] bf16
    gamma,  # [COLS] f32
    kept,  # [rows, COLS] bf16
    out,  # [rows, COLS] bf16
    rows,  # t · height · width
    height,
    width,
    COLS: tl.constexpr,
    TILE: tl.constexpr,  # divides COLS
    BLOCK: tl.constexpr,  # rows of a program
    ORDER: tl.constexpr,
    SKIP: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    inside = row < rows
    source = value + source_of(row, height, width, COLS, ORDER)
    target = row.to(tl.int64) * COLS
    tiles = ()
    for start in tl.static_range(0, COLS, TILE):
        column = start + tl.arange(0, TILE)[None, :]
        x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        if ORDER == "frames":
            half = row // (height * width) % 2
            x += tl.load(bias + half * COLS + column)
        else:
            x += tl.load(bias + column)
        if SKIP:
            x += tl.load(skip + target + column, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(kept + target + column, x.to(tl.bfloat16), mask=inside)
        tiles += (x,)
    if NORM:
        squares = tiles[0] * tiles[0]
        for i in tl.static_range(1, len(tiles)):
            squares += tiles[i] * tiles[i]
        length = tl.sqrt(tl.sum(squares, axis=1, keep_dims=True))
        scale = COLS**0.5 / tl.maximum(length, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    for i in tl.static_range(len(tiles)):
        column = i * TILE + tl.arange(0, TILE)[None, :]
        x = tiles[i]
        if NORM:
            x = x * scale * tl.load(gamma + column)
            x = x / (1.0 + tl.exp2(tl.minimum(-1.4426950408889634 * x, 126.0)))
        tl.store(out + target + column, x.to(tl.bfloat16), mask=inside)


def _tuning(cols: int) -> dict[str, Launch]:
    block = max(1, 4096 // (1 << (cols - 1).bit_length()))
    return {"default": Launch(num_warps=4, constexprs={"BLOCK": block})}


def _spec(cols: int, variant: str) -> Spec:
    traits = variant.split("_")
    return Spec(
        name=f"conv_epilogue.{cols}.{variant}",
        function=conv_epilogue,
        parameters={
            "value": "*bf16",
            "bias": "*f32",
            "skip": "*bf16",
            "gamma": "*f32",
            "kept": "*bf16",
            "out": "*bf16",
            "rows": "i32",
            "height": "i32",
            "width": "i32",
        },
        constexprs={
            "COLS": cols,
            "TILE": tile_width(cols),
            "ORDER": traits[0] if traits[0] in ("frames", "phases") else "plain",
            "SKIP": "skip" in traits,
            "NORM": "norm" in traits,
            "KEEP": "keep" in traits,
        },
        launch=_tuning(cols),
        grid=((Ceil("rows", "BLOCK"),), (1,), (1,)),
        reason="Bound by memory: about 3000 values a program, 24 a thread, in loads of 16 bytes; "
        "few registers, so that enough programs are in flight to cover the latency.",
        ops=(),
        max_registers=128,
    )


def _specs(base: int) -> list[Spec]:
    """Where the decoder of a base width uses which variant."""
    inner, middle, outer = 4 * base, 2 * base, base
    used = [
        *((cols, "norm") for cols in (inner, middle, outer)),  # inside of a residual block
        *((cols, "skip_norm_keep") for cols in (inner, middle, outer)),  # between two
        (inner, "norm_keep"),  # after the first convolution
        (inner, "skip"),  # before the attention and the first two up-samplings
        (middle, "skip"),  # before the last
        (inner, "frames"),  # after a temporal convolution
        *((cols, "phases_norm_keep") for cols in (middle, outer)),  # after an up-sampling
        (outer, "skip_norm"),  # before the last convolution
    ]
    return [_spec(cols, variant) for cols, variant in used]


SPECS = [spec for base in VAE_WIDTHS for spec in _specs(base)]
