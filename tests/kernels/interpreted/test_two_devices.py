"""The kernels that write into the memory of another device: two halves, each with the rows of its
latent frames or with its heads, give the bytes of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kernels.attention_self_cases import CASES
from tests.support.kernels.interpreter import launch
from tests.support.kernels.memory_layout import (
    HEAD_DIM,
    Segment,
    launch_update,
    new_segment,
    released_tables,
    rope_tables,
)

HEADS = 2
DIM = HEADS * HEAD_DIM
SENTINEL = 0xFF


def _bytes(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


class Halves:
    """q and the current block of each device, or of one with all heads."""

    def __init__(self, devices: int, tokens: int, f8: bool) -> None:
        self.q = [new_segment(HEADS // devices, tokens, f8).k for _ in range(devices)]
        self.q_scale = [torch.zeros(HEADS // devices, tokens) for _ in range(devices)]
        self.current = [new_segment(HEADS // devices, tokens, f8) for _ in range(devices)]
        for segment in self.current:
            segment.v.view(torch.uint8).fill_(SENTINEL)

    def contents(self) -> list[bytes]:
        parts = [
            self.q,
            self.q_scale,
            [s.k for s in self.current],
            [s.v for s in self.current],
        ]
        return [b"".join(map(_bytes, part)) for part in parts]

    def split(self, qkv: Tensor, gains: Any, grid: tuple[int, int], frames: range) -> None:
        """What the device with these latent frames launches."""
        f8, frame_tokens = self.q[0].itemsize == 1, grid[0] * grid[1]
        rope, kind = rope_tables(*grid), "f8" if f8 else "bf16"
        tokens, first_token = self.q[0].shape[1], frames.start * frame_tokens
        rows = len(frames) * frame_tokens
        here = qkv[first_token : first_token + rows].contiguous()
        both = len(self.q) == 2
        none = self.q[0][:0]
        launch(
            f"split_qkv.qk.{DIM}.{kind}",
            qkv=here,
            q_gain=gains[0],
            k_gain=gains[1],
            q=self.q[0],
            q_scale=self.q_scale[0] if f8 else None,
            upper_q=self.q[1] if both else none,
            upper_q_scale=self.q_scale[1] if f8 and both else None,
            k=self.current[0].k,
            k_scale=torch.tensor([0.04, 0.02]) if f8 else None,
            upper_k=self.current[1].k if both else none,
            frame_table=rope[0],
            row_table=rope[1],
            col_table=rope[2],
            rows=rows,
            tokens=tokens,
            first_token=first_token,
            lower_heads=HEADS // len(self.q),
            frame_tokens=frame_tokens,
            grid_cols=grid[1],
            first_position=3 + frames.start,
            eps=1e-6,
        )
        v, end = self.current[0].v, first_token + rows
        launch(
            f"split_qkv.v.{kind}",
            qkv=here,
            v=v,
            upper_v=self.current[1].v if both else v[:0],
            v_scale=torch.tensor([0.01, 0.02]) if f8 else None,
            rows=rows,
            first_token=first_token,
            end_token=v.shape[2] if end == tokens else end,
            heads=HEADS,
            lower_heads=HEADS // len(self.q),
            v_stride=v.shape[2],
        )


# Whether the split falls on a tile of V (128 or 64 tokens), between two of them or into the first.
@pytest.mark.parametrize(("grid", "frames"), [((4, 8), 4), ((8, 8), 4), ((3, 5), 6), ((5, 9), 5)])
@pytest.mark.parametrize("f8", (True, False), ids=("f8", "bf16"))
def test_split_qkv(grid: tuple[int, int], frames: int, f8: bool) -> None:
    random = torch.Generator().manual_seed(1)
    tokens = frames * grid[0] * grid[1]
    qkv = torch.randn(tokens, 3 * DIM, generator=random).bfloat16()
    gains = torch.randn(2, DIM, generator=random)
    one, two = Halves(1, tokens, f8), Halves(2, tokens, f8)
    one.split(qkv, gains, grid, range(frames))
    middle = (frames + 1) // 2
    two.split(qkv, gains, grid, range(middle, frames))
    two.split(qkv, gains, grid, range(middle))
    assert two.contents() == one.contents()


def _half(segment: Any, head: int) -> Any:
    at = slice(head, head + 1)
    return segment.k[at].contiguous(), segment.v[at].contiguous()


@pytest.mark.parametrize("to_f8", (True, False), ids=("to_f8", "to_bf16"))
@pytest.mark.parametrize("out_rows", [20, 128])
def test_self_attention(out_rows: int, to_f8: bool) -> None:
    """Each device has one head, all queries, and writes the columns of that head on both."""
    case = CASES["one_over"](True)
    tokens = case.q.shape[1]
    scales = torch.tensor([0.001, 0.002])
    dtype = torch.float8_e4m3fn if to_f8 else torch.bfloat16
    name = "self_attention.f8" + (".to_f8" if to_f8 else "")

    def results(rows: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(rows, DIM).to(dtype), torch.zeros(rows)

    whole, rest = results(tokens), results(0)
    given = {"out": whole[0], "out_scale": whole[1], "rest": rest[0], "rest_scale": rest[1]}
    launch(name, **case.arguments() | given | {"head_scale": scales})
    first, second = results(out_rows), results(tokens - out_rows)
    for head in range(HEADS):
        context, current = _half(case.context, head), _half(case.current, head)
        column = head * HEAD_DIM
        launch(
            name,
            **case.arguments()
            | {
                "q": case.q[head : head + 1].contiguous(),
                "q_scale": case.q_scale[head : head + 1].contiguous(),
                "context_k": context[0],
                "context_v": context[1],
                "current_k": current[0],
                "current_v": current[1],
                "k_scale": case.k_scale[head : head + 1].clone(),
                "v_scale": case.v_scale[head : head + 1].clone(),
                "out": first[0].view(-1)[column:],
                "out_scale": first[1],
                "rest": second[0].view(-1)[column:],
                "rest_scale": second[1],
                "head_scale": scales,
                "out_rows": out_rows,
                "heads": 1,
                "all_heads": HEADS,
            },
        )
    assert _bytes(torch.cat([first[0].float(), second[0].float()])) == _bytes(whole[0].float())
    if to_f8:
        assert torch.equal(torch.cat([first[1], second[1]]), whole[1])
        assert (whole[1] == 0.002).all()


@pytest.mark.parametrize("along_tokens", (True, False), ids=("token", "frame"))
def test_update_memory(along_tokens: bool) -> None:
    """A device has the taps of all channels and compresses its own head."""
    grid, random = (2, 3), torch.Generator().manual_seed(2)
    table, first_slot = released_tables()["sequential"]
    frame_tokens = grid[0] * grid[1]

    def segment(slots: int) -> Segment:
        made = new_segment(HEADS, slots * frame_tokens, True)
        made.k = torch.randn(made.k.shape, generator=random).to(made.k.dtype)
        used = torch.randn(HEADS, HEAD_DIM, slots * frame_tokens, generator=random)
        made.v[..., : slots * frame_tokens] = used.to(made.v.dtype)
        return made

    context, current = segment(6), segment(8)
    taps = torch.randn(2, DIM, 5, generator=random)
    whole = context.clone()
    rope = rope_tables(*grid)
    tap_pair = (taps[0], taps[1])
    launch_update(launch, table, tap_pair, along_tokens, rope, first_slot, current, whole)
    for head in range(HEADS):
        own, of_head = Segment(*_half(context, head)), Segment(*_half(current, head))
        first = head * HEAD_DIM
        launch_update(launch, table, tap_pair, along_tokens, rope, first_slot, of_head, own, first)
        expected = _half(whole, head)
        assert [_bytes(x) for x in (own.k, own.v)] == [_bytes(x) for x in expected]


def test_a_barrier_counts_on() -> None:
    counts = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    arrived = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    for meeting in range(1, 4):
        for device in range(2):
            launch("barrier.signal", counts=counts[device], peer_arrived=arrived[1 - device])
        for device in range(2):
            launch("barrier.wait", counts=counts[device], arrived=arrived[device])
        assert [c.tolist() for c in counts] == [[meeting, meeting]] * 2
        assert [a.item() for a in arrived] == [meeting, meeting]
    arrived[0].fill_(2**62)  # open for good, whatever the other one signals
    launch("barrier.signal", counts=counts[1], peer_arrived=arrived[0])
    for _ in range(3):
        launch("barrier.wait", counts=counts[0], arrived=arrived[0])
