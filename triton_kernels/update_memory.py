"""update_memory: the context of the next block from this one's context and current block
(csrc/core/ops.h, include/liveact/kv_layout.h). Every target slot is one pair of launches:

`update_memory.key.{compress,move}.{f8,bf16}`: keys are un-rotated from the slot, row and column
they were rotated for, filtered with 5 taps (or moved), rotated for the target, rounded again.
`update_memory.value.{compress,move}.{f8,bf16}`: values are filtered; a move is a copy of bytes.
V is K-major, [H, hd, stride]: a slot starts at any byte of a row.
`update_memory.copy.{f8,bf16}`: one slot of a segment (K, V) to another one of the same layout.
Keys and values in fp8 keep the fixed scales of their head, so these cancel: nothing here reads one.

The 5F tokens of the sources s0..s4 are one sequence; target token t takes, as tap j, token
t · token_stride + j · tap_stride of it: (5, 1) compresses along tokens, (1, F) along latent frames,
(1, 0) moves. Any F is right, multiple of something or not. Plain averaging is taps of 0.2.

NOTE: taps are [5, D] here, tap-major, and [D, 5] in the checkpoint: one transposition when a model
is loaded, against 40 scalar loads per thread and head in the inner loop.

In place, without a copy of the context: the launcher (1) writes the targets that read the context
into a staging segment of the context's layout, (2) writes the others, which read the current block
only, straight into the context, (3) copies the staged slots. Sources and target are separate
arguments for that.

DRAM traffic of one update, released counts (2 compress, 2 move), F = 1024, 40 heads × 128, fp8. A
slot's K or V is 5.24 MB:
    read 2 · 5 + 2 = 12 slots of K and V      126 MB
    write 4 slots                              42 MB
    copy of the one staged slot                11 MB written; its reads hit L2
179 MB = 47 µs at 3.8 TB/s; 120 updates 5.7 ms = 0.63 % of a block of 0.9 s, against 0.5 % aimed at
(and 1.9 % in the paper). NOTE: the reads and writes without any copy are already 0.60 %, so the aim
needs either what attention has just left in L2 (50 MB) or, better, a second stream: nothing needs
the context before the next block, and only the next layer's split_qkv must wait for the current
block to be read, so all of it can run under this layer's matrix products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common import angles, encode, split_pairs, store_keys
from triton_kernels.sizes import HEAD_DIM, PAIRS_FRAME, PAIRS_ROW
from triton_kernels.spec import Ceil, Launch, Spec, Tiles

COMPRESS_TAPS = 5  # kCompressTaps


@triton.jit
def pick(frame, source0, source1, source2, source3, source4):
    """The slot that holds latent frame `frame` (0..4) of the concatenated sources."""
    slot = tl.where(frame == 0, source0, source1)
    slot = tl.where(frame == 2, source2, slot)
    slot = tl.where(frame == 3, source3, slot)
    return tl.where(frame == 4, source4, slot)


@triton.jit
def update_keys(
    context,  # [heads, context_tokens, HD] f8 or bf16
    current,  # [heads, current_tokens, HD]
    target,  # [heads, context_tokens, HD]: staging, or the context
    taps,  # [5, tap_channels] f32, compress only; it starts at the first of these heads
    frame_table,  # [positions, PAIRS_FRAME, 2] f32, (cos, sin); a slot is its position
    row_table,  # [grid_rows, PAIRS_ROW, 2] f32
    col_table,  # [grid_cols, PAIRS_COL, 2] f32
    tap_channels,  # D, of all heads
    heads,
    frame_tokens,  # F
    grid_cols,
    context_tokens,
    current_tokens,
    first_slot,  # slots from here on are in the current block
    source0,
    source1,
    source2,
    source3,
    source4,
    target_slot,
    token_stride,
    tap_stride,
    HD: tl.constexpr,
    PAIRS_FRAME: tl.constexpr,
    PAIRS_ROW: tl.constexpr,
    TAPS: tl.constexpr,  # 5, or 1 for a move
    F8: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    PAIRS: tl.constexpr = HD // 2
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = token < frame_tokens
    dim = tl.arange(0, HD)[None, :]
    # What does not depend on the head: where each tap's rows start, how they are rotated.
    rows, tokens_per_head, coss, sins = (), (), (), ()
    for j in tl.static_range(TAPS):
        sequence = tl.where(inside, token * token_stride + j * tap_stride, 0)
        slot = pick(sequence // frame_tokens, source0, source1, source2, source3, source4)
        source_token = sequence % frame_tokens
        in_current = slot >= first_slot
        at = tl.where(in_current, slot - first_slot, slot) * frame_tokens + source_token
        rows += (tl.where(in_current, current + at * HD, context + at * HD),)
        tokens_per_head += (tl.where(in_current, current_tokens, context_tokens),)
        cos, sin = angles(
            frame_table,
            row_table,
            col_table,
            slot,
            source_token,
            grid_cols,
            PAIRS,
            PAIRS_FRAME,
            PAIRS_ROW,
        )
        coss += (cos,)
        sins += (sin,)
    token_or_0 = tl.where(inside, token, 0)
    cos, sin = angles(
        frame_table,
        row_table,
        col_table,
        target_slot,
        token_or_0,
        grid_cols,
        PAIRS,
        PAIRS_FRAME,
        PAIRS_ROW,
    )
    first_head = tl.program_id(1) * HEADS
    for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
        even_sum = tl.zeros((TOKENS, PAIRS), tl.float32)
        odd_sum = tl.zeros((TOKENS, PAIRS), tl.float32)
        for j in tl.static_range(TAPS):
            offset = head * tokens_per_head[j] * HD
            keys = tl.load(rows[j] + offset + dim).to(tl.float32)
            even, odd = split_pairs(keys, PAIRS)
            even, odd = even * coss[j] + odd * sins[j], odd * coss[j] - even * sins[j]
            if TAPS > 1:
                tap = tl.load(taps + j * tap_channels + head * HD + dim)
                even_tap, odd_tap = split_pairs(tap, PAIRS)
                even, odd = even * even_tap, odd * odd_tap
            even_sum += even
            odd_sum += odd
        at = head * context_tokens + target_slot * frame_tokens + token
        store_keys(
            target + at * HD + dim,
            1.0,  # the scale of sources and target
            even_sum * cos - odd_sum * sin,
            even_sum * sin + odd_sum * cos,
            inside,
            PAIRS,
            F8,
        )


@triton.jit
def update_values(
    context,  # [heads, HD, context_stride] f8 or bf16
    current,  # [heads, HD, current_stride]
    target,  # [heads, HD, context_stride]: staging, or the context
    taps,  # [5, tap_channels] f32, compress only; it starts at the first of these heads
    tap_channels,  # D, of all heads
    heads,
    frame_tokens,  # F
    context_stride,
    current_stride,
    first_slot,
    source0,
    source1,
    source2,
    source3,
    source4,
    target_slot,
    token_stride,
    tap_stride,
    HD: tl.constexpr,
    TAPS: tl.constexpr,
    F8: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # NOTE: tokens are the first axis of the tile: where Triton sees no contiguity (5 bytes from
    # lane to lane) it lays lanes along the first axis, and rows are far apart.
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = token < frame_tokens
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[None, :]
    at = target + row * context_stride + target_slot * frame_tokens + token
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    tap = taps + row
    for j in tl.static_range(TAPS):
        sequence = tl.where(inside, token * token_stride + j * tap_stride, 0)
        slot = pick(sequence // frame_tokens, source0, source1, source2, source3, source4)
        in_current = slot >= first_slot
        column = sequence % frame_tokens
        column += tl.where(in_current, slot - first_slot, slot) * frame_tokens
        stride = tl.where(in_current, current_stride, context_stride)
        values = tl.load(tl.where(in_current, current, context) + column + row * stride)
        if TAPS == 1:
            tl.store(at, values, mask=inside)
        else:
            total += values.to(tl.float32) * tl.load(tap)
            tap += tap_channels
    if TAPS > 1:
        # Sources and target have one scale, so it cancels: the sum is the new code's value.
        result = encode(total, 1.0) if F8 else total.to(tl.bfloat16)
        tl.store(at, result, mask=inside)


@triton.jit
def copy_slot(
    source_k,  # [heads, tokens, HD] f8 or bf16
    source_v,  # [heads, HD, v_stride]
    target_k,
    target_v,
    heads,
    frame_tokens,
    tokens,  # of a segment
    v_stride,
    slot,
    HD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(1)
    in_frame = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = in_frame < frame_tokens
    token = slot * frame_tokens + in_frame
    dim = tl.arange(0, HD)
    at = (head * tokens + token)[:, None] * HD + dim[None, :]
    tl.store(target_k + at, tl.load(source_k + at, mask=inside[:, None]), mask=inside[:, None])
    at = (head * HD + dim[:, None]) * v_stride + token[None, :]
    tl.store(target_v + at, tl.load(source_v + at, mask=inside[None, :]), mask=inside[None, :])


KEY_TUNING = {"default": Launch(num_warps=8, constexprs={"TOKENS": 16, "HEADS": 4})}
VALUE_TUNING = {"default": Launch(num_warps=4, constexprs={"TOKENS": 128, "ROWS": 16})}
COPY_TUNING = {"default": Launch(num_warps=4, constexprs={"TOKENS": 32})}

_SLOTS = {
    "first_slot": "i32",
    **{f"source{j}": "i32" for j in range(COMPRESS_TAPS)},
    "target_slot": "i32",
    "token_stride": "i32",
    "tap_stride": "i32",
}


def _key_spec(taps: int, f8: bool) -> Spec:
    data = "*f8" if f8 else "*bf16"
    return Spec(
        name=f"update_memory.key.{'move' if taps == 1 else 'compress'}.{data[1:]}",
        function=update_keys,
        parameters={
            "context": data,
            "current": data,
            "target": data,
            "taps": "*f32",
            "frame_table": "*f32",
            "row_table": "*f32",
            "col_table": "*f32",
            "tap_channels": "i32:128",
            "heads": "i32",
            "frame_tokens": "i32",
            "grid_cols": "i32",
            "context_tokens": "i32",
            "current_tokens": "i32",
            **_SLOTS,
        },
        constexprs={
            "HD": HEAD_DIM,
            "PAIRS_FRAME": PAIRS_FRAME,
            "PAIRS_ROW": PAIRS_ROW,
            "TAPS": taps,
            "F8": f8,
        },
        launch=KEY_TUNING,
        grid=((Ceil("frame_tokens", "TOKENS"),), (Ceil("heads", "HEADS"),), (1,)),
        reason="cos and sin of 5 taps × 16 tokens stay in registers (40 a thread) over 4 heads, so "
        "their gathers and the index divisions are paid once per 4 heads; 10 KB of keys in flight.",
        ops=("update_memory",),
        max_registers=168,
        max_shared_bytes=48 * 1024,
    )


def _value_spec(taps: int, f8: bool) -> Spec:
    data = "*f8" if f8 else "*bf16"
    return Spec(
        name=f"update_memory.value.{'move' if taps == 1 else 'compress'}.{data[1:]}",
        function=update_values,
        parameters={
            "context": data,
            "current": data,
            "target": data,
            "taps": "*f32",
            "tap_channels": "i32:128",
            "heads": "i32",
            "frame_tokens": "i32",
            "context_stride": "i32:16",
            "current_stride": "i32:16",
            **_SLOTS,
        },
        constexprs={"HD": HEAD_DIM, "TAPS": taps, "F8": f8},
        launch=VALUE_TUNING,
        grid=(
            (Ceil("frame_tokens", "TOKENS"),),
            (Ceil("heads"), Tiles(HEAD_DIM, "ROWS")),
            (1,),
        ),
        reason="Byte accesses, because a slot of a K-major row starts anywhere: lanes lie along "
        "tokens, and the 5 taps hit the same L1 lines. 16 values a thread and tap in flight.",
        ops=("update_memory",),
        max_registers=128,
        max_shared_bytes=48 * 1024,
    )


def _copy_spec(f8: bool) -> Spec:
    data = "*f8" if f8 else "*bf16"
    return Spec(
        name=f"update_memory.copy.{data[1:]}",
        function=copy_slot,
        parameters={
            "source_k": data,
            "source_v": data,
            "target_k": data,
            "target_v": data,
            "heads": "i32",
            "frame_tokens": "i32",
            "tokens": "i32",
            "v_stride": "i32:16",
            "slot": "i32",
        },
        constexprs={"HD": HEAD_DIM},
        launch=COPY_TUNING,
        grid=((Ceil("frame_tokens", "TOKENS"),), (Ceil("heads"),), (1,)),
        reason="Reads what was written a moment ago, from L2; keys in 16-byte accesses, values in "
        "bytes as above.",
        ops=("update_memory",),
        max_registers=128,
        max_shared_bytes=48 * 1024,
    )


SPECS = [
    *(_key_spec(taps, f8) for taps in (COMPRESS_TAPS, 1) for f8 in (True, False)),
    *(_value_spec(taps, f8) for taps in (COMPRESS_TAPS, 1) for f8 in (True, False)),
    *(_copy_spec(f8) for f8 in (True, False)),
]
