"""unpatchify: the head's tokens to the velocity [channels, n, h, w] (csrc/core/ops.h).

Elementwise over the velocity, which is written in order; its values are gathered. Once per step,
2 MB. The head writes fp32 whatever the format of the rest is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def unpatchify(
    tokens,  # [n * h * w / 4, 4 * channels] f32, columns (ph, pw, channel)
    v,  # [channels, n, h, w] f32
    channels,
    n,
    h,
    w,
    size,  # elements of v
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    col = index % w
    row = index // w % h
    frame = index // (w * h) % n
    channel = index // (w * h * n)
    token = (frame * (h // 2) + row // 2) * (w // 2) + col // 2
    patch = row % 2 * 2 + col % 2
    value = tl.load(tokens + (token * 4 + patch) * channels + channel, mask=inside, other=0.0)
    tl.store(v + index, value, mask=inside)


SPECS = [
    Spec(
        name="unpatchify",
        function=unpatchify,
        parameters={
            "tokens": "*f32",
            "v": "*f32",
            "channels": "i32",
            "n": "i32",
            "h": "i32",
            "w": "i32",
            "size": "i32:16",
        },
        constexprs={},
        launch={"default": Launch(num_warps=4, constexprs={"BLOCK": 512})},
        grid=((Ceil("size", "BLOCK"),), (1,), (1,)),
        reason="Index arithmetic, not memory, is the work here; 4 values a thread are enough.",
        ops=("unpatchify",),
        max_registers=128,
    )
]
