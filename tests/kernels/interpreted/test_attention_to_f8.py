"""Attention that writes fp8: its codes and scales are the contract's statement (kProbabilityScale
in csrc/core/ops.h) of the fp32 result of the same kernel, bit for bit; so are the CPU op's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kernels import reference
from tests.support.kernels.attention_cases import HEAD_DIM, SelfAttention
from tests.support.kernels.attention_self_cases import CASES
from tests.support.kernels.core_ops import core
from tests.support.kernels.interpreter import launch

HEADS = 2
WIDTH = HEADS * HEAD_DIM


def stated(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(codes as bytes, scale of every row) of values [M, D] with one scale."""
    scaled = values * (torch.ones_like(scale) / scale)
    codes = scaled.clamp(-reference.F8_MAX, reference.F8_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scale.expand(values.shape[0])


def check(codes: Tensor, scale: Tensor, values: Tensor, expected_scale: Tensor) -> None:
    expected = stated(values, expected_scale)
    assert torch.equal(scale, expected[1])
    assert torch.equal(codes.view(torch.uint8), expected[0])
    assert (codes.float().abs() == reference.F8_MAX).any(), "expected codes that saturate"
    assert expected[0].unique().numel() > 100


def head_scales(values: Tensor, saturating: float = 1.5) -> Tensor:
    """[H]; the second is the largest, and lets the largest value saturate."""
    scale = values.abs().amax() / (reference.F8_MAX * saturating)
    return torch.stack([scale / 3, scale])


def _rest(arguments: dict[str, Any], out: Tensor) -> dict[str, Tensor]:
    """No rows for another device, where the kernel knows one."""
    return {"rest": out[:0]} if "rest" in arguments else {}


def run(name: str, arguments: dict[str, Any], given: dict[str, Tensor], rows: int) -> Any:
    """(codes, scale) of a kernel that writes fp8, or its fp32 result where nothing is given."""
    out = torch.full((rows, WIDTH), float("nan"))
    scale = torch.full((rows,), float("nan"))
    nothing = dict.fromkeys(given)
    if not name.endswith(".to_f8"):
        launch(
            name, **arguments | {"out": out, "out_scale": None} | _rest(arguments, out) | nothing
        )
        return out
    out = out.to(torch.float8_e4m3fn)
    launch(name, **arguments | {"out": out, "out_scale": scale} | _rest(arguments, out) | given)
    return out, scale


@pytest.mark.parametrize("name", ["steady_small", "one_over"])
def test_self_attention(name: str) -> None:
    case: SelfAttention = CASES[name](True)
    rows = case.q.shape[1]
    values = run("self_attention.f8", case.arguments(), {"head_scale": case.v_scale}, rows)
    scales = head_scales(values)
    codes = run("self_attention.f8.to_f8", case.arguments(), {"head_scale": scales}, rows)
    check(*codes, values, scales.max())

    def segment(s: Any) -> tuple[Tensor, ...]:
        return s.k, s.v[..., : s.tokens].transpose(1, 2).contiguous(), case.k_scale, case.v_scale

    call = ("self_attention", case.q, case.q_scale, segment(case.context), segment(case.current))
    check(*core(*call, "fp8", scales), core(*call, "fp32"), scales.max())


def test_cross_attention() -> None:
    rows, text, image = 40, 21, 33
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16()

    keys = [normal(HEADS, tokens, HEAD_DIM) for tokens in (text, text, image, image)]
    names = ("text_k", "text_v", "image_k", "image_v")
    q = normal(rows, WIDTH)
    arguments = {"q": q, **dict(zip(names, keys, strict=True)), "out": None, "out_scale": None}
    arguments |= {"text_v_scale": None, "image_v_scale": None, "tokens": rows, "heads": HEADS}
    arguments |= {"text_tokens": text, "text_keys": text, "image_tokens": image, "pad_bias": 2.0}
    empty = torch.empty(HEADS)
    given = {"text_v_scale": empty, "image_v_scale": empty}
    values = run("cross_attention", arguments, given, rows)
    half = 0.5 * reference.HEADROOM * head_scales(values)  # of each; the headroom is taken back
    given = {"text_v_scale": half, "image_v_scale": half}
    codes = run("cross_attention.to_f8", arguments, given, rows)
    scale = half.max() / reference.HEADROOM + half.max() / reference.HEADROOM
    check(*codes, values, scale)

    segments = [(keys[0], keys[1], None, half), (keys[2], keys[3], None, half)]
    call = ("cross_attention", q, segments[0], 7, segments[1])
    check(*core(*call, "fp8"), core(*call, "fp32"), scale)


def test_audio_attention() -> None:
    frame_rows, frames, tokens = 12, 3, 8
    rows = frame_rows * frames
    random = torch.Generator().manual_seed(2)
    q = torch.randn(rows, WIDTH, generator=random).bfloat16()
    kv = torch.randn(frames * tokens, 2 * WIDTH, generator=random).bfloat16()
    arguments = {"q": q, "kv": kv, "out": None, "out_scale": None, "v_scale": None}
    arguments |= {"frame_rows": frame_rows, "frames": frames, "heads": HEADS}
    arguments |= {"kv_frames": frames, "tokens": tokens}
    values = run("audio_attention", arguments, {"v_scale": torch.empty(HEADS)}, rows)
    scales = reference.HEADROOM * head_scales(values)
    codes = run("audio_attention.to_f8", arguments, {"v_scale": scales}, rows)
    check(*codes, values, scales.max() / reference.HEADROOM)

    call = ("audio_attention", q, kv, frames, frames, HEADS)
    expected = core(*call, "fp32")
    check(*core(*call, "fp8", scales), expected, scales.max() / reference.HEADROOM)
