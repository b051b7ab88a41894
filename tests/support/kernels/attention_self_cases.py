"""Cases of self-attention, for the interpreter and for a GPU: name → builder, in fp8 or not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.support.kernels.attention_cases import HEAD_DIM, SelfAttention, make, random_tokens


def _random(
    m: int, tc: int, tk: int, heads: int = 2, size: float = 1.0
) -> Callable[[bool], SelfAttention]:
    def build(f8: bool) -> SelfAttention:
        g = torch.Generator().manual_seed(m * 10007 + tc * 101 + tk)
        q, kc, vc, kt, vt = (
            random_tokens(g, heads, n, s)
            for n, s in ((m, size), (tc, 1.0), (tc, 1.0), (tk, 1.0), (tk, 1.0))
        )
        return make(q, (kc, vc), (kt, vt), f8)

    return build


def _equal_rows(f8: bool) -> SelfAttention:
    """Equal keys: every P is 1, the result is the mean of the values."""
    g = torch.Generator().manual_seed(1)
    q, v = random_tokens(g, 2, 40), random_tokens(g, 2, 200)
    k = random_tokens(g, 2, 1).expand(2, 200, HEAD_DIM).contiguous()
    return make(q, (k[:, :72], v[:, :72]), (k[:, 72:], v[:, 72:]), f8)


def _one_hot(f8: bool) -> SelfAttention:
    """Query i sees key (7i) mod T alone: P is 1 there and underflows elsewhere."""
    g = torch.Generator().manual_seed(2)
    keys = torch.nn.functional.normalize(torch.randn(2, 150, HEAD_DIM, generator=g), dim=2)
    q = keys[:, torch.arange(60) * 7 % 150] * 20000.0
    v = random_tokens(g, 2, 150)
    return make(q, (keys[:, :50], v[:, :50]), (keys[:, 50:], v[:, 50:]), f8)


def _negative_logits(f8: bool) -> SelfAttention:
    """All logits near -11 and one key short of whole tiles: a zero that is not masked would win."""
    g = torch.Generator().manual_seed(3)
    direction = torch.randn(2, 1, HEAD_DIM, generator=g)
    q, kc, kt = (
        sign * direction + 0.1 * torch.randn(2, n, HEAD_DIM, generator=g)
        for sign, n in ((1, 127), (-1, 127), (-1, 255))
    )
    return make(q, (kc, random_tokens(g, 2, 127)), (kt, random_tokens(g, 2, 255)), f8)


def _extreme_scales(f8: bool) -> SelfAttention:
    """Heads whose v_scale is 1e-30 and 1e30, rows of zeros (scale 1e-12/448), a head of large keys
    and one without any (gain 0)."""
    case = _random(30, 20, 140)(f8)
    case.q[:, 3] = 0
    if f8:
        case.q_scale[:, 3] = 1e-12 / 448
        case.k_scale *= torch.tensor([1000.0, 0.0])
        case.k_scale.clamp_(min=1e-12 / 448)
        case.q_scale *= 1e-3
        case.v_scale = torch.tensor([1e-30, 1e30])
    return case


CASES: dict[str, Callable[[bool], SelfAttention]] = {
    "block_0_small": _random(6 * 12, 0, 6 * 12),
    "steady_small": _random(8 * 12, 6 * 12, 8 * 12),
    "frame_of_13": _random(8 * 13, 6 * 13, 8 * 13),
    "frame_of_5": _random(8 * 5, 6 * 5, 8 * 5),
    "one_query": _random(1, 30, 40),
    "one_key": _random(3, 0, 1),
    "one_key_each": _random(3, 1, 1),
    "whole_tiles": _random(128, 256, 128),
    "ragged_tiles": _random(300, 333, 450),
    "one_over": _random(129, 129, 129),
    "negative_logits": _negative_logits,
    "huge_logits": _random(50, 100, 150, size=300.0),
    "equal_rows": _equal_rows,
    "one_hot": _one_hot,
    "extreme_scales": _extreme_scales,
}
