"""to_pictures: what the last convolution of the VAE decoder left → uint8 RGB.

Clamped to [−1, 1], mapped to 0..255, rounded half to even: `to_uint8` of engine/liveact/vae/vae.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def to_pictures(
    value,  # [pixels, 8] bf16, of which 3 channels count
    bias,  # [3] f32
    out,  # [pixels, 3] u8
    size,  # 3 · pixels
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    pixel = index // 3
    channel = index - 3 * pixel
    x = tl.load(value + pixel.to(tl.int64) * 8 + channel, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias + channel)
    scaled = (tl.clamp(x, -1.0, 1.0) + 1.0) * 127.5
    # Above 2^23 an fp32 has no fraction: the sum is rounded to nearest even, in its low bits.
    rounded = (scaled + 8388608.0).to(tl.int32, bitcast=True)
    tl.store(out + index, (rounded & 0xFF).to(tl.uint8), mask=inside)


SPECS = [
    Spec(
        name="to_pictures.bf16",
        function=to_pictures,
        parameters={"value": "*bf16", "bias": "*f32:4", "out": "*u8", "size": "i32"},
        constexprs={},
        launch={"default": Launch(num_warps=4, constexprs={"BLOCK": 1024})},
        grid=((Ceil("size", "BLOCK"),), (1,), (1,)),
        reason="Bytes leave in order; the three channels of a pixel are read through the cache.",
        ops=(),
        max_registers=64,
    )
]
