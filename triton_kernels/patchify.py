"""patchify: latent z and conditioning y to patch tokens (csrc/core/ops.h).

`patchify`: elementwise over the tokens, which are written in order; the 2 × 2 patches are gathered.
Once per step, 5 MB: not worth more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.spec import Ceil, Launch, Spec


@triton.jit
def patchify(
    z,  # [z_channels, n, h, w] f32
    y,  # [y_channels, y_frames, h, w] f32; the block starts at y_first
    tokens,  # [n * h * w / 4, (z_channels + y_channels) * 4] bf16, columns (channel, ph, pw)
    z_channels,
    y_channels,
    y_frames,
    y_first,
    n,
    h,
    w,
    size,  # elements of tokens
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    columns = (z_channels + y_channels) * 4
    token = index // columns
    channel = index % columns // 4
    patch = index % 4
    grid_cols = w // 2
    frame = token // (h // 2 * grid_cols)
    row = token // grid_cols % (h // 2) * 2 + patch // 2
    col = token % grid_cols * 2 + patch % 2
    pixel = row * w + col
    from_z = channel < z_channels
    z_at = (channel * n + frame) * h * w + pixel
    y_at = ((channel - z_channels) * y_frames + y_first + frame) * h * w + pixel
    value = tl.load(tl.where(from_z, z + z_at, y + y_at), mask=inside, other=0.0)
    tl.store(tokens + index, value.to(tl.bfloat16), mask=inside)


SPECS = [
    Spec(
        name="patchify",
        function=patchify,
        parameters={
            "z": "*f32",
            "y": "*f32",
            "tokens": "*bf16",
            "z_channels": "i32",
            "y_channels": "i32",
            "y_frames": "i32",
            "y_first": "i32",
            "n": "i32",
            "h": "i32",
            "w": "i32",
            "size": "i32:16",
        },
        constexprs={},
        launch={"default": Launch(num_warps=4, constexprs={"BLOCK": 512})},
        grid=((Ceil("size", "BLOCK"),), (1,), (1,)),
        reason="Index arithmetic, not memory, is the work here; 4 values a thread are enough.",
        ops=("patchify",),
        max_registers=128,
    )
]
