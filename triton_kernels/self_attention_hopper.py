"""self_attention in fp8 for Hopper, in Gluon: one producer and two consumer warp groups.

The same op, layouts and ABI as self_attention.f8 (self_attention.py has the maths and is the
readable statement); what differs is who does what. A program has 128 queries of one head. One warp
group copies tiles of K and V into a ring in shared memory; two others have 64 queries each and take
turns with their exponentials, so that one's softmax fills the other's waits, on top of the
exponentials of tile i under the scores of tile i+1 within each. Nothing but the barriers of ring
and turns joins them: no program-wide barrier, no copies and no address arithmetic in a consumer.

Copies are cp.async, not TMA: K's rows are wanted in the order of _key_of_column, heads begin at any
row, and the ABI stays plain pointers, without descriptors to encode on the host.

NOTE: Triton's interpreter knows no Gluon. On a CPU the tests execute this file with stand-ins of
their own (tests/kernels/attention/test_attention_emulated.py), where the names that it uses of
Gluon are; on a GPU test_attention_gpu.py compares it with self_attention.f8.
"""

from __future__ import annotations

import dataclasses

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_kernels import self_attention
from triton_kernels.spec import Ceil, Launch

HEAD_DIM = gl.constexpr(128)
SCALE_LOG2 = gl.constexpr(1.4426950408889634 / 128**0.5)  # softmax scale, for exp2
PROBABILITY_SCALE_LOG2 = gl.constexpr(8.0)  # log2 of kProbabilityScale in csrc/core/ops.h
ROWS = gl.constexpr(64)  # queries of a consumer: the M of a wgmma
KEYS = gl.constexpr(128)  # of a tile
STAGES = gl.constexpr(6)  # tiles in the ring: 32 KB each
IN_FLIGHT = gl.constexpr(3)  # of them being copied: 13 MB on 132 SMs, 3 µs of the L2 cache

# 4 + 4 + 4 warps share 65536 registers. Consumers need two score tiles, P·V and the accumulator
# (4 · 64, less what has died by then); the producer holds addresses.
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)
MEAN_REGISTERS = 168  # what 384 threads start with: 65536 / 384, down to a multiple of 8


# P changes its order as in self_attention.py; here the compiler is also told that nothing moves
# between threads (assert_trivial).
@gluon.jit
def _key_of_column(column):
    """Which key of the tile column `column` of the scores holds: bits h·tt·e → tt·h·e of 16."""
    return (column & -16) | ((column & 6) << 1) | ((column & 8) >> 2) | (column & 1)


@gluon.jit
def _to_memory(p):
    """[ROWS, KEYS] in the order of the score columns → in the order of memory."""
    split = p.reshape(ROWS, KEYS // 16, 2, 4, 2)
    return split.permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)


@gluon.jit
def _place(tile, context_tiles, context_tokens, current_tokens):
    """(in the context?, tokens of its segment, first token in it) of key tile `tile`."""
    in_context = tile < context_tiles
    tokens = gl.where(in_context, context_tokens, current_tokens)
    first = gl.where(in_context, tile, tile - context_tiles) * KEYS
    return in_context, tokens, first


@gluon.jit
def _phase(use):
    """Parity of the phase that ends when a stage has been filled (or emptied) `use` + 1 times."""
    return use & 1


@gluon.jit
def _produce(keys_and_values, sizes, ring):
    context_k, context_v, current_k, current_v = keys_and_values
    _, _, context_tokens, current_tokens, context_v_stride, current_v_stride = sizes
    k_tiles, v_tiles, full, empty, _ = ring
    square: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])  # 16-byte copies
    head = gl.program_id(1).to(gl.int64)
    rows = gl.arange(0, KEYS, gl.SliceLayout(1, square))
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, square))
    keys = _key_of_column(rows)
    context_tiles = gl.cdiv(context_tokens, KEYS)
    tiles = context_tiles + gl.cdiv(current_tokens, KEYS)
    for step in range(tiles + IN_FLIGHT):
        if step >= IN_FLIGHT:  # hand over an old tile before waiting for room for a new one
            async_copy.wait_group(IN_FLIGHT - 1)
            # Written through the generic proxy, read by wgmma: each thread's writes need a fence of
            # its own, before the barrier after which one thread says that the tile is there.
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(full.index((step - IN_FLIGHT) % STAGES), count=1)
        if step < tiles:
            stage = step % STAGES
            # The first round finds every stage empty: the phase before the first one is over.
            mbarrier.wait(empty.index(stage), _phase(step // STAGES + 1))
            in_context, n, first = _place(step, context_tiles, context_tokens, current_tokens)
            # Beyond the segment the last key stands again; its scores are masked.
            last = n - first - 1
            k_rows = gl.where(in_context, context_k, current_k) + (head * n + first) * HEAD_DIM
            k_offsets = gl.minimum(keys, last)[:, None] * HEAD_DIM + columns[None, :]
            async_copy.async_copy_global_to_shared(k_tiles.index(stage), k_rows + k_offsets)
            v_stride = gl.where(in_context, context_v_stride, current_v_stride)
            v_rows = gl.where(in_context, context_v, current_v) + head * HEAD_DIM * v_stride + first
            v_offsets = rows[:, None] * v_stride + columns[None, :]
            async_copy.async_copy_global_to_shared(v_tiles.index(stage), v_rows + v_offsets)
        async_copy.commit_group()  # an empty group after the last tile keeps the count


@gluon.jit
def _consume(queries, results, scales, sizes, q_tiles, ring, GROUP: gl.constexpr):
    q, q_scale = queries
    k_scale, v_scale = scales
    out, out_scale, rest, rest_scale, head_scale, out_rows, all_heads = results
    tokens, _, context_tokens, current_tokens, _, _ = sizes
    k_tiles, v_tiles, full, empty, turns = ring
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    square: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])

    head = gl.program_id(1).to(gl.int64)
    row0 = gl.program_id(0) * (2 * ROWS) + GROUP * ROWS
    load_rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, square))
    load_dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, square))
    q_offsets = (head * tokens + load_rows[:, None]) * HEAD_DIM + load_dims[None, :]
    q_tile = q_tiles.index(GROUP)
    q_tile.store(gl.load(q + q_offsets, mask=(load_rows < tokens)[:, None], other=0.0))
    fence_async_shared()

    rows = row0 + gl.arange(0, ROWS, by_row)
    inside = rows < tokens
    row_scale = gl.load(q_scale + head * tokens + rows, mask=inside, other=0.0) * SCALE_LOG2
    row_scale *= gl.load(k_scale + head)
    maximum = gl.full([ROWS], float("-inf"), gl.float32, by_row)
    total = gl.zeros([ROWS], gl.float32, by_row)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, mma)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, mma)  # never read: use_acc=False

    context_tiles = gl.cdiv(context_tokens, KEYS)
    tiles = context_tiles + gl.cdiv(current_tokens, KEYS)
    mbarrier.wait(full.index(0), 0)
    scores = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), zeros, use_acc=False)
    for tile in range(tiles):
        stage = tile % STAGES
        _in_context, n, first = _place(tile, context_tiles, context_tokens, current_tokens)
        if first + KEYS > n:
            # keys < n - first, split so that a thread compares constants with one number
            columns = gl.arange(0, KEYS, by_column)
            of_thread = (columns & 6) << 1
            of_register = _key_of_column(columns & ~6)
            is_key = of_register < n - first - of_thread
            scores = gl.where(is_key[None, :], scores, float("-inf"))
        # NOTE: before the product, so that it can go where these scores were: 64 moves a tile less.
        new_maximum = gl.maximum(maximum, gl.max(scores, axis=1) * row_scale)
        correction = gl.exp2(maximum - new_maximum)
        maximum = new_maximum
        shift = maximum - PROBABILITY_SCALE_LOG2
        exponents = scores * row_scale[:, None] - shift[:, None]
        # The consumers take turns with their exponentials: see docs/attention.md. The first one's
        # first turn is after a phase that is over, as the producer's first round.
        mbarrier.wait(turns.index(GROUP), _phase(tile + 1 - GROUP))
        next_stage = (tile + 1) % STAGES
        # After the last tile there is none to wait for; the product below is then of stale bytes
        # and dropped.
        is_next = tile + 1 < tiles
        mbarrier.wait(full.index(next_stage), _phase((tile + 1) // STAGES), pred=is_next)
        k_tile = k_tiles.index(next_stage).permute((1, 0))
        scores_ahead = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
        p = gl.exp2(exponents)  # 256 · P
        total = total * correction + gl.sum(p, axis=1)
        p_tile = gl.convert_layout(
            _to_memory(p.to(gl.float8e4nv)), left_operand, assert_trivial=True
        )
        v_tile = v_tiles.index(stage).permute((1, 0))
        values = warpgroup_mma(p_tile, v_tile, zeros, use_acc=False, is_async=True)
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        scores, values = warpgroup_mma_wait(0, deps=[scores_ahead, values])
        mbarrier.arrive(empty.index(stage), count=1)
        # Two levels: the tensor core sums a tile (4 steps, ~14 bits), f32 sums the tiles.
        acc = acc * correction[:, None] + values

    scale = gl.load(v_scale + head) / total
    here = rows < out_rows
    row = gl.where(here, rows, rows - out_rows)
    targets = gl.where(here, out, rest) + row.to(gl.int64) * (all_heads * HEAD_DIM)
    row_scales = gl.where(here, out_scale, rest_scale) + row
    dims = gl.arange(0, HEAD_DIM, by_column)
    at = targets[:, None] + head * HEAD_DIM + dims[None, :]
    values = acc * scale[:, None]
    if out.dtype.element_ty == gl.float8e4nv:  # as store_mixed in common.py
        of_head = gl.arange(0, KEYS, by_column)
        scales = gl.load(head_scale + of_head, mask=of_head < all_heads, other=0.0)
        largest = gl.max(scales, axis=0)
        values *= 1.0 / largest  # the conversion saturates
        gl.store(at, values.to(gl.float8e4nv), inside[:, None])
        if head == 0:
            gl.store(row_scales, gl.full([ROWS], 0.0, gl.float32, by_row) + largest, inside)
    else:
        gl.store(at, values.to(gl.bfloat16), inside[:, None])


@gluon.jit
def self_attention_hopper(
    q,  # [H, M, HEAD_DIM] f8
    q_scale,  # [H, M] f32
    context_k,  # [H, Tc, HEAD_DIM] f8
    context_v,  # [H, HEAD_DIM, context_v_stride] f8
    current_k,  # [H, Tk, HEAD_DIM] f8
    current_v,  # [H, HEAD_DIM, current_v_stride] f8
    k_scale,  # [H] f32
    v_scale,  # [H] f32
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
):
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)  # as wgmma reads it
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(gl.float8e4nv, [2, ROWS, HEAD_DIM], swizzled)
    k_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, KEYS, HEAD_DIM], swizzled)
    v_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, HEAD_DIM, KEYS], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)  # the other consumer
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)  # the producer
        mbarrier.init(empty.index(stage), count=2)  # both consumers
    keys_and_values = (context_k, context_v, current_k, current_v)
    sizes = (
        tokens,
        heads,
        context_tokens,
        current_tokens,
        context_v_stride,
        current_v_stride,
    )
    ring = (k_tiles, v_tiles, full, empty, turns)
    scales = (k_scale, v_scale)
    queries = (q, q_scale)
    results = (out, out_scale, rest, rest_scale, head_scale, out_rows, all_heads)
    gl.warp_specialize(
        [
            (_consume, (queries, results, scales, sizes, q_tiles, ring, 0)),
            (_consume, (queries, results, scales, sizes, q_tiles, ring, 1)),
            (_produce, (keys_and_values, sizes, ring)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


# The runtime times both when a stream opens and takes the faster one.
SPECS = [
    dataclasses.replace(
        spec,  # the same parameters in the same order
        name=spec.name.replace(".f8", ".f8.hopper", 1),
        function=self_attention_hopper,
        constexprs={},
        launch={"default": Launch(num_warps=4)},  # of the first consumer; 12 in all
        grid=((Ceil("tokens", 2 * ROWS.value),), (Ceil("heads"),), (1,)),
        reason="Issue slots: 456 instructions a warp and tile in a consumer, 151 in the producer: "
        "1063 cycles of four schedulers where the products take 1024 and the exponentials "
        "1056. Two consumers of 64 rows at 232 registers are all that 64 K registers hold.",
        arches=("sm_90a",),  # wgmma
        start_registers=MEAN_REGISTERS,
    )
    for spec in self_attention.SPECS
    if spec.name.startswith("self_attention.f8")
]
