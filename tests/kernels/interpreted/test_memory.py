"""split_qkv, value_scale, store_kv and update_memory: interpreter, reference, C++ CPU op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases import KernelCase, cases, make_values
from tests.support.kernels import reference
from tests.support.kernels.core_ops import core
from tests.support.kernels.interpreter import launch
from tests.support.kernels.memory_layout import (
    HEAD_DIM,
    SLOTS,
    Segment,
    k_major,
    launch_update,
    new_segment,
    released_tables,
    rope_tables,
    token_major,
)

EPS = 1e-6
SENTINEL = 0xFF  # of a NaN in both formats: no padding column should keep it


def ids(case: KernelCase) -> str:
    return case.name


def small_cases(op: str) -> list[KernelCase]:
    return cases(op, "correctness", "corner")


def grid_of(case: KernelCase) -> tuple[int, int]:
    return case.sizes["grid_rows"], case.sizes["grid_cols"]


@pytest.mark.parametrize("f8", (True, False), ids=("f8", "bf16"))
@pytest.mark.parametrize("case", small_cases("split_qkv"), ids=ids)
def test_split_qkv(case: KernelCase, f8: bool) -> None:
    heads, (grid_rows, grid_cols) = case.sizes["heads"], grid_of(case)
    frame_tokens = grid_rows * grid_cols
    m, dim, first_position = case.sizes["n"] * frame_tokens, heads * HEAD_DIM, 3
    qkv = make_values(case.values, m, 3 * dim).bfloat16()
    gains = make_values("random", dim, seed=1), make_values("random", dim, seed=2)
    rope = rope_tables(grid_rows, grid_cols)
    current = new_segment(heads, m, f8)
    current.v.view(torch.uint8).fill_(SENTINEL)
    if f8:  # of half the values' size, so that some saturate
        current.v_scale = (qkv[:, 2 * dim :].abs().amax().float() / 2 / 448).expand(heads).clone()
        current.v_scale.clamp_(min=1e-12 / 448)
        current.k_scale = key_scale(gains[1], heads)
    q, q_scale = new_segment(heads, m, f8).k, torch.full((heads, m), float("nan"))
    kind = "f8" if f8 else "bf16"
    launch(
        f"split_qkv.qk.{dim}.{kind}",
        qkv=qkv,
        q_gain=gains[0],
        k_gain=gains[1],
        q=q,
        q_scale=q_scale,
        upper_q=q[:0],
        upper_q_scale=None,
        k=current.k,
        k_scale=current.k_scale,
        upper_k=q[:0],
        frame_table=rope[0],
        row_table=rope[1],
        col_table=rope[2],
        rows=m,
        tokens=m,
        first_token=0,
        lower_heads=heads,
        frame_tokens=frame_tokens,
        grid_cols=grid_cols,
        first_position=first_position,
        eps=EPS,
    )
    launch(
        f"split_qkv.v.{kind}",
        qkv=qkv,
        v=current.v,
        upper_v=current.v[:0],
        v_scale=current.v_scale,
        rows=m,
        first_token=0,
        end_token=current.v.shape[2],
        heads=heads,
        lower_heads=heads,
        v_stride=current.v.shape[2],
    )
    queries, keys, values = reference.split_qkv(qkv, gains, EPS, rope, first_position, heads)
    shape, out = (heads, m, HEAD_DIM), "fp8" if f8 else "bf16"
    scales = current.k_scale, current.v_scale
    cpu_q, cpu_q_scale, (cpu_k, cpu_v) = core(
        "split_qkv", qkv, *gains, EPS, rope, first_position, heads, *scales, shape, out
    )
    v = token_major(current.v, m)
    assert torch.equal(v.view(torch.uint8), cpu_v.view(torch.uint8))  # no sum: bit for bit
    assert not current.v[:, :, m:].float().any()  # zeros, whatever was there
    if f8:
        reference.check_f8(q, q_scale, queries)
        reference.check_codes(*fixed_scale(current.k, keys, current.k_scale))
        assert (current.k.float().abs().nan_to_num() < 448).all()  # by the bound, none saturates
        reference.check_codes(*fixed_scale(v, (values, 0 * values), current.v_scale))
        for codes, others in ((q, cpu_q), (current.k, cpu_k)):
            reference.check_same_codes(codes, others)
        torch.testing.assert_close(q_scale, cpu_q_scale, rtol=1e-5, atol=0)
    else:
        reference.check_bf16(q, queries)
        reference.check_bf16(current.k, keys)
        assert torch.equal(v, qkv[:, 2 * dim :].unflatten(1, (heads, -1)).transpose(0, 1))
        reference.check_bf16(cpu_k, keys)


def key_scale(gain: Tensor, heads: int) -> Tensor:
    """[H]: the scale of K in fp8 (csrc/core/ops.h)."""
    largest = gain.abs().view(heads, -1).amax(1).clamp(min=reference.AMAX_FLOOR)
    return gain.numel() ** 0.5 * largest / reference.F8_MAX


def fixed_scale(
    codes: Tensor, bounded: tuple[Tensor, Tensor], scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of check_codes for (values, errors) [H, T, hd] with a scale per head."""
    exact, error = (t / scale.double().view(-1, 1, 1) for t in bounded)
    return codes, exact, error + 4 * reference.U * exact.abs()


@pytest.mark.parametrize("frame_tokens", (13, 1170))
def test_split_values_of_any_length(frame_tokens: int) -> None:
    """Masked and unmasked tiles of the transposed store: 1170 = 9 · 128 + 18."""
    qkv = make_values("random", frame_tokens, 3 * 2 * HEAD_DIM).bfloat16()
    for f8 in (True, False):
        segment = new_segment(2, frame_tokens, f8)
        if f8:
            segment.v_scale = torch.tensor([0.01, 0.001])
        launch(
            f"split_qkv.v.{'f8' if f8 else 'bf16'}",
            qkv=qkv,
            v=segment.v,
            upper_v=segment.v[:0],
            v_scale=segment.v_scale,
            rows=frame_tokens,
            first_token=0,
            end_token=segment.v.shape[2],
            heads=2,
            lower_heads=2,
            v_stride=segment.v.shape[2],
        )
        values = qkv[:, 2 * 2 * HEAD_DIM :].unflatten(1, (2, -1)).transpose(0, 1)
        if f8:
            v = token_major(segment.v, frame_tokens)
            exact = values.double()
            reference.check_codes(*fixed_scale(v, (exact, 0 * exact), segment.v_scale))
            assert (v[1].float().abs() == 448).any()  # the small scale saturates
        else:
            assert torch.equal(token_major(segment.v, frame_tokens), values)
        assert not segment.v[:, :, frame_tokens:].float().any()


@pytest.mark.parametrize("case", small_cases("value_scale"), ids=ids)
def test_value_scale(case: KernelCase) -> None:
    rows, heads = case.sizes["rows"], case.sizes["heads"]
    qkv = make_values(case.values, rows, 3 * heads * HEAD_DIM).bfloat16()
    scale = torch.full((heads,), float("nan"))
    # Every second row, and of those the first heads: rows lie further apart than they are wide.
    half, stride = -(-rows // 2), 2 * qkv.stride(0)
    launch("value_scale", values=qkv, scale=scale, rows=half, heads=heads, stride=stride)

    def expected(values: Tensor) -> Tensor:
        bound = values.unflatten(1, (heads, -1)).float().abs().amax((0, 2))
        return reference.HEADROOM * bound.clamp(min=reference.AMAX_FLOOR) / reference.F8_MAX

    assert torch.equal(scale, expected(qkv[::2, : heads * HEAD_DIM]))
    values = qkv[:, 2 * heads * HEAD_DIM :]
    assert torch.equal(core("value_scale", qkv, heads), expected(values))


@pytest.mark.parametrize("case", small_cases("store_kv"), ids=ids)
def test_store_kv(case: KernelCase) -> None:
    tokens, heads = case.sizes["tokens"], case.sizes["heads"]
    k, v = (make_values("random", tokens, heads * HEAD_DIM, seed=s).bfloat16() for s in (0, 1))
    out = [torch.full((heads, tokens, HEAD_DIM), float("nan")).bfloat16() for _ in range(2)]
    launch(
        "store_kv.bf16", k=k, v=v, segment_k=out[0], segment_v=out[1], tokens=tokens, heads=heads
    )
    expected = core("store_kv", k, v, heads)
    for rows, segment, cpu in zip((k, v), out, expected, strict=False):
        assert torch.equal(segment, rows.unflatten(1, (heads, -1)).transpose(0, 1))
        assert torch.equal(segment, cpu)


def random_segments(case: KernelCase, f8: bool, first_slot: int) -> tuple[Segment, Segment]:
    """Context and current block with random contents; K and V have one scale per head."""
    heads, (grid_rows, grid_cols) = case.sizes["heads"], grid_of(case)
    frame_tokens = grid_rows * grid_cols
    slots = SLOTS if first_slot else 6
    segments = [new_segment(heads, n * frame_tokens, f8) for n in (6, slots - first_slot)]
    k_scale, v_scale = torch.linspace(0.1, 3.0, heads), torch.linspace(0.5, 2.0, heads)
    for seed, segment in enumerate(segments):
        tokens = segment.k.shape[1]
        k = make_values("random", heads, tokens, HEAD_DIM, seed=seed)
        v = make_values("random", heads, tokens, HEAD_DIM, seed=seed + 10)
        if f8:
            segment.k.copy_((k * 100).clamp(-448, 448).to(torch.float8_e4m3fn))
            segment.k_scale, segment.v_scale = k_scale, v_scale
            v = (v * 100).clamp(-448, 448)
        else:
            segment.k.copy_(k.bfloat16())
        segment.v.copy_(k_major(v.to(segment.v.dtype), segment.v.shape[2]))
    return segments[0], segments[1]


def all_slots(context: Segment, current: Segment, first_slot: int) -> tuple[Tensor, Tensor]:
    """Dequantised keys and values of every slot, [H, slots · F, hd] float64."""
    parts = [current] if first_slot == 0 else [context, current]
    decoded = [part.decoded() for part in parts]
    return torch.cat([k for k, _ in decoded], 1), torch.cat([v for _, v in decoded], 1)


def make_taps(kind: str, dim: int) -> tuple[Tensor, Tensor]:
    if kind == "mean":
        return (torch.full((dim, 5), 0.2),) * 2
    key = make_values("random", dim, 5, seed=30) / 5
    return key, key if kind == "key" else make_values("random", dim, 5, seed=31) / 5


@pytest.mark.parametrize("f8", (True, False), ids=("f8", "bf16"))
@pytest.mark.parametrize("case", small_cases("update_memory"), ids=ids)
def test_update_memory(case: KernelCase, f8: bool) -> None:
    heads, grid = case.sizes["heads"], grid_of(case)
    frame_tokens = grid[0] * grid[1]
    table, first_slot = released_tables()[case.options["table"]]
    along_tokens = case.options["axis"] == "token"
    taps = make_taps(case.options["taps"], heads * HEAD_DIM)
    rope = rope_tables(*grid)
    context, current = random_segments(case, f8, first_slot)
    expected = reference.update_memory(
        table, taps, along_tokens, rope, all_slots(context, current, first_slot)
    )
    given: tuple[Any, Any] = (None, None) if case.options["taps"] == "mean" else taps
    cpu = core(
        "update_memory",
        table,
        *given,
        case.options["axis"],
        rope,
        first_slot,
        current.for_core(),
        context.for_core(),
    )
    before = context.clone()
    launch_update(launch, table, taps, along_tokens, rope, first_slot, current, context)
    written = {target for target, _ in table}
    for slot in range(6):
        k, v = context.slot(slot, frame_tokens)
        at = slice(slot * frame_tokens, (slot + 1) * frame_tokens)
        cpu_k, cpu_v = cpu[0][:, at].contiguous(), cpu[1][:, at].contiguous()
        if slot not in written:  # the reference slots keep every byte
            kept = before.slot(slot, frame_tokens)
            assert torch.equal(k.view(torch.uint8), kept[0].view(torch.uint8))
            assert torch.equal(v.view(torch.uint8), kept[1].view(torch.uint8))
            continue
        keys, values = expected[slot]
        moved = len(dict(table)[slot]) == 1
        if f8:
            reference.check_codes(*fixed_scale(k, keys, context.k_scale))
            reference.check_codes(*fixed_scale(cpu_k, keys, context.k_scale))
            reference.check_codes(*fixed_scale(v, values, context.v_scale))
            assert (reference.ordinal(k) - reference.ordinal(cpu_k)).abs().max() <= 1
        else:
            reference.check_bf16(k, keys)
            reference.check_bf16(v, values)
        if moved:  # values move as bytes
            assert torch.equal(v.view(torch.uint8), cpu_v.view(torch.uint8))
    assert not context.v[:, :, 6 * frame_tokens :].float().any()


def test_update_of_nan_is_not_hidden() -> None:
    """A NaN key makes its pair's target NaN, a NaN value its target value."""
    case = cases("update_memory", "correctness")[0]
    table, first_slot = released_tables()["sequential"]
    context, current = random_segments(case, True, first_slot)
    current.k.view(torch.uint8)[0, 6 * 12 + 5, 8] = 0x7F  # slot 12, moved to slot 4
    current.v.view(torch.uint8)[1, 3, 1 * 12 + 2] = 0x7F  # slot 7: compressed into slot 3
    taps = make_taps("key", 2 * HEAD_DIM)
    launch_update(launch, table, taps, True, rope_tables(3, 4), first_slot, current, context)
    k, _ = context.slot(4, 12)
    assert k[0, 5, 8:10].float().isnan().all() and int(k.float().isnan().sum()) == 2
    _, v = context.slot(3, 12)
    assert v[1, 0, 3].float().isnan() and int(v.float().isnan().sum()) == 1
