"""Key and value segments as the GPU lays them out, and an update as the C++ launcher runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

HEAD_DIM = 128
VALUE_STRIDE = 128  # kValueStride: columns of a K-major V are a multiple of this
SLOTS = 14
PAIRS = (22, 21, 21)  # of a head, by latent frame, row, column

Table = list[tuple[int, list[int]]]


def released_tables() -> dict[str, tuple[Table, int]]:
    """Name → (target, sources) of an update, and the first slot of the current block."""
    moves: Table = [(4, [12]), (5, [13])]
    run: Table = [(2, [2, 3, 4, 5, 6]), (3, [7, 8, 9, 10, 11]), *moves]
    return {
        "sequential": (run, 6),
        "mean": (run, 6),
        "sharded": ([(2, [2, 6, 7, 8, 9]), (3, [3, 4, 5, 10, 11]), *moves], 6),
        "block_0": ([(slot, [slot]) for slot in range(6)], 0),
    }


def rope_tables(grid_rows: int, grid_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin per axis, [positions, pairs, 2] fp32."""

    def table(positions: int, pairs: int) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(pairs).double() / pairs)
        angles = torch.arange(positions).double()[:, None] * frequencies
        return torch.stack((angles.cos(), angles.sin()), dim=-1).float()

    return table(SLOTS, PAIRS[0]), table(grid_rows, PAIRS[1]), table(grid_cols, PAIRS[2])


def k_major(v: Tensor, stride: int) -> Tensor:
    """[H, T, hd] -> [H, hd, stride], zeros beyond T."""
    out = torch.zeros(v.shape[0], v.shape[2], stride).to(v.dtype)
    out.view(torch.uint8 if v.itemsize == 1 else torch.uint16)[:, :, : v.shape[1]] = v.view(
        torch.uint8 if v.itemsize == 1 else torch.uint16
    ).transpose(1, 2)
    return out


def token_major(v: Tensor, tokens: int) -> Tensor:
    """[H, hd, stride] -> [H, tokens, hd]"""
    return v[:, :, :tokens].transpose(1, 2).contiguous()


@dataclass
class Segment:
    """KvSegment of csrc/core/ops.h with the GPU's V."""

    k: Tensor  # [H, T, hd]
    v: Tensor  # [H, hd, stride]
    k_scale: Tensor | None = None  # [H], fp8 only
    v_scale: Tensor | None = None  # [H], fp8 only

    def clone(self) -> Segment:
        return replace(self, k=self.k.clone(), v=self.v.clone())

    def slot(self, slot: int, frame_tokens: int) -> tuple[Tensor, Tensor]:
        """(k, v) of one slot, [H, F, hd]."""
        at = slice(slot * frame_tokens, (slot + 1) * frame_tokens)
        return self.k[:, at].contiguous(), self.v[:, :, at].transpose(1, 2).contiguous()

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values in float64, [H, T, hd] each."""
        k, v = self.k.double(), token_major(self.v, self.k.shape[1]).double()
        if self.k_scale is not None and self.v_scale is not None:
            k = k * self.k_scale.double().view(-1, 1, 1)
            v = v * self.v_scale.double().view(-1, 1, 1)
        return k, v

    def for_core(self) -> tuple[Any, ...]:
        """As the CPU ops take it: V token-major."""
        return self.k, token_major(self.v, self.k.shape[1]), self.k_scale, self.v_scale


def new_segment(heads: int, tokens: int, f8: bool) -> Segment:
    """Keys that start as NaN, values that start as zeros."""
    dtype = torch.float8_e4m3fn if f8 else torch.bfloat16
    stride = -(-tokens // VALUE_STRIDE) * VALUE_STRIDE
    return Segment(
        k=torch.full((heads, tokens, HEAD_DIM), float("nan")).to(dtype),
        v=torch.zeros(heads, HEAD_DIM, stride).to(dtype),
    )


def launch_update(
    launch: Callable[..., None],
    table: Table,
    taps: tuple[Tensor, Tensor],
    along_tokens: bool,
    rope: tuple[Tensor, Tensor, Tensor],
    first_slot: int,
    current: Segment,
    context: Segment,
    first_channel: int = 0,
) -> None:
    """The three rounds that triton_kernels/update_memory.py describes. taps are [D, 5], the heads
    of the segments those from first_channel on."""
    # A few hundred tokens are too many programs for the interpreter at the tuned sizes.
    many = rope[1].shape[0] * rope[2].shape[0] > 64
    tiles = {"TOKENS": 256 if many else 16, "ROWS": HEAD_DIM}
    heads, context_tokens = context.k.shape[:2]
    frame_tokens = rope[1].shape[0] * rope[2].shape[0]
    f8 = context.k.itemsize == 1
    kind = "f8" if f8 else "bf16"
    staging = new_segment(heads, context_tokens, f8)

    def build(target: int, sources: list[int], to: Segment) -> None:
        variant = f"{'move' if len(sources) == 1 else 'compress'}.{kind}"
        strides = (1, 0) if len(sources) == 1 else (5, 1) if along_tokens else (1, frame_tokens)
        slots = {
            "first_slot": first_slot,
            **{f"source{j}": (sources + [0] * 4)[j] for j in range(5)},
            "target_slot": target,
            "token_stride": strides[0],
            "tap_stride": strides[1],
        }
        launch(
            f"update_memory.key.{variant}",
            tiles,
            context=context.k,
            current=current.k,
            target=to.k,
            taps=taps[0].T.contiguous().view(-1)[first_channel:],
            frame_table=rope[0],
            row_table=rope[1],
            col_table=rope[2],
            tap_channels=taps[0].shape[0],
            heads=heads,
            frame_tokens=frame_tokens,
            grid_cols=rope[2].shape[0],
            context_tokens=context_tokens,
            current_tokens=current.k.shape[1],
            **slots,
        )
        launch(
            f"update_memory.value.{variant}",
            tiles,
            context=context.v,
            current=current.v,
            target=to.v,
            taps=taps[1].T.contiguous().view(-1)[first_channel:],
            tap_channels=taps[0].shape[0],
            heads=heads,
            frame_tokens=frame_tokens,
            context_stride=context.v.shape[2],
            current_stride=current.v.shape[2],
            **slots,
        )

    staged = [row for row in table if min(row[1]) < first_slot]
    for target, sources in staged:
        build(target, sources, staging)
    for target, sources in table:
        if (target, sources) not in staged:
            build(target, sources, context)
    for target, _ in staged:
        launch(
            f"update_memory.copy.{kind}",
            tiles,
            source_k=staging.k,
            source_v=staging.v,
            target_k=context.k,
            target_v=context.v,
            heads=heads,
            frame_tokens=frame_tokens,
            tokens=context_tokens,
            v_stride=context.v.shape[2],
            slot=target,
        )
