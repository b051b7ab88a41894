"""What the ops compute, in float64, and how far fp32 arithmetic may be from it.

Functions are named like the ops of core/ops.h and return (exact, error): the result before it is
rounded to its format, and a bound on the error of any fp32 evaluation of the same formula. An fp8
or bf16 result is right if it lies between the roundings of exact − error and exact + error: for all
but the rare value that close to a rounding boundary, that is one value, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-24  # half an ulp of 1 in fp32
SUM_DEPTH = 20  # roundings that a term of a row sum goes through: 5 tiles, 10 tree levels, spare
F8_MAX, AMAX_FLOOR, HEADROOM = 448.0, 1e-12, 8.0

Bounded = tuple[Tensor, Tensor]


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Bounded:
    x, gain, bias = x.double(), gain.double(), bias.double()
    centred = x - x.mean(1, keepdim=True)
    inverse = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    normed = centred * inverse * gain
    of_mean = gain.abs() * inverse * SUM_DEPTH * x.abs().mean(1, keepdim=True)
    return normed + bias, U * (of_mean + (SUM_DEPTH + 8) * normed.abs() + 2 * bias.abs())


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Bounded:
    x = x.double()
    result = x * (x.square().mean(1, keepdim=True) + eps).rsqrt() * gain.double()
    return result, U * (SUM_DEPTH + 6) * result.abs()


def activate(x: Tensor, activation: str) -> Bounded:
    """The exponent of gelu_tanh is off by a few U of itself, which is an absolute error of exp."""
    x = x.double()
    if activation == "relu":
        return x.clamp(min=0), torch.zeros_like(x)
    if activation == "gelu_erf":
        # 1 + erf cancels where x is negative: an error of 1 ulp of 1, and erf's own 4 ulps.
        return torch.nn.functional.gelu(x), U * (10 * x.abs())
    u = 0.7978845608028654 * (x + 0.044715 * x**3)
    result = x / (1 + torch.exp(-2 * u))
    slope = (2 * u).abs() * torch.sigmoid(-2 * u)  # of log(result) in a relative change of u
    # Where exp(−2u) > 2^126 the kernels bound it: |result| is then under |x| · 2^-126 either way.
    return result, U * result.abs() * (12 + 8 * slope) + x.abs() * 2.0**-126


def split_qkv(
    qkv: Tensor,
    gains: tuple[Tensor, Tensor],
    eps: float,
    rope: tuple[Tensor, Tensor, Tensor],
    first_position: int,
    heads: int,
) -> tuple[Bounded, Bounded, Tensor]:
    """q, k [H, M, hd] with their errors, and v [H, M, hd]."""
    m, dim = qkv.shape[0], qkv.shape[1] // 3
    frame_tokens = rope[1].shape[0] * rope[2].shape[0]
    token = torch.arange(m)
    angles = rotation(rope, first_position + token // frame_tokens, token % frame_tokens)

    def rotated(part: Tensor, gain: Tensor) -> Bounded:
        normed, error = (_heads(t, heads) for t in rms_norm(part, gain, eps))
        return rotate(normed, angles), rotate_bound(error + 3 * U * normed.abs(), angles)

    q, k, v = qkv.split(dim, 1)
    return rotated(q, gains[0]), rotated(k, gains[1]), _heads(v.double(), heads)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[M, D] -> [H, M, hd]"""
    return rows.unflatten(1, (heads, -1)).transpose(0, 1)


def rotation(rope: tuple[Tensor, Tensor, Tensor], position: Tensor, token: Tensor) -> Bounded:
    """(cos, sin) [tokens, hd / 2] of tokens of a latent frame at latent-frame positions."""
    frame, row, col = rope
    grid_cols = col.shape[0]
    tables = (frame[position], row[token // grid_cols], col[token % grid_cols])
    angles = torch.cat(tables, dim=1).double()
    return angles[..., 0], angles[..., 1]


def rotate(heads: Tensor, angles: Bounded, direction: float = 1.0) -> Tensor:
    """[H, tokens, hd] rotated by (cos, sin) [tokens, hd / 2]; direction −1 un-rotates."""
    cos, sin = angles[0], angles[1] * direction
    even, odd = heads[..., 0::2], heads[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rotate_bound(error: Tensor, angles: Bounded) -> Tensor:
    """A bound on what becomes of `error` in rotate."""
    cos, sin = angles[0].abs(), angles[1].abs()
    even, odd = error[..., 0::2], error[..., 1::2]
    return torch.stack((even * cos + odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def update_memory(
    table: list[tuple[int, list[int]]],
    taps: tuple[Tensor, Tensor],
    along_tokens: bool,
    rope: tuple[Tensor, Tensor, Tensor],
    slots: tuple[Tensor, Tensor],
) -> dict[int, tuple[Bounded, Bounded]]:
    """Target slot → its keys and values [H, F, hd] with their errors.

    taps: of keys and values, [D, 5]; slots: dequantised keys (rotated for their slots) and values
    of all slots, [H, slots · F, hd].
    """
    keys, values = (t.double() for t in slots)
    frame_tokens = rope[1].shape[0] * rope[2].shape[0]
    token = torch.arange(frame_tokens)
    result = {}
    for target, sources in table:
        unrotated, moved = [], []
        for slot in sources:
            at = slice(slot * frame_tokens, (slot + 1) * frame_tokens)
            angles = rotation(rope, torch.full_like(token, slot), token)
            unrotated.append(rotate(keys[:, at], angles, -1.0))
            moved.append(values[:, at])
        k, k_size = _compress(unrotated, taps[0], along_tokens)
        v, v_size = _compress(moved, taps[1], along_tokens)
        angles = rotation(rope, torch.full_like(token, target), token)
        # Roundings on the way of a key: decoding 1, un-rotation 3, tap 1, sum 5, rotation 3. A
        # pair may be longer than either component, so the bound takes the pair's.
        k_error = 16 * U * rotate_bound(_pair_size(k_size), angles)
        result[target] = (rotate(k, angles), k_error), (v, 8 * U * v_size)
    return result


def _pair_size(size: Tensor) -> Tensor:
    pairs = size.unflatten(-1, (-1, 2)).sum(-1, keepdim=True)
    return pairs.expand(*pairs.shape[:-1], 2).flatten(-2)


def _compress(frames: list[Tensor], taps: Tensor, along_tokens: bool) -> Bounded:
    """One source: itself. Five [H, F, hd]: their filtered sum, and the sum of magnitudes."""
    if len(frames) == 1:
        return frames[0], frames[0].abs()
    heads, frame_tokens, head_dim = frames[0].shape
    sequence = torch.cat(frames, dim=1)  # [H, 5F, hd]
    if along_tokens:
        grouped = sequence.unflatten(1, (frame_tokens, 5)).transpose(1, 2)  # [H, 5, F, hd]
    else:
        grouped = sequence.unflatten(1, (5, frame_tokens))
    weights = taps.double().view(heads, head_dim, 5).permute(0, 2, 1).unsqueeze(2)
    return (grouped * weights).sum(1), (grouped * weights).abs().sum(1)


# ----------------------------------------------------------------------------- judging results


def decode(codes: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """fp8 codes as float64, times their scale."""
    return codes.view(torch.float8_e4m3fn).double() * scale


def ordinal(codes: Tensor) -> Tensor:
    """Codes numbered in the order of their values; NaN has none."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def encode(values: Tensor) -> Tensor:
    """float64 → fp8. By way of fp32, whose rounding is inside every error bound used here."""
    return values.clamp(-F8_MAX, F8_MAX).float().to(torch.float8_e4m3fn)


def check_codes(codes: Tensor, exact: Tensor, error: Tensor) -> None:
    """codes are roundings of values within `error` of `exact` (both in units of the scale)."""
    nan = exact.isnan()
    assert torch.equal(codes.float().isnan(), nan), "NaN is where it should not be, or hidden"
    low, high = (ordinal(encode(torch.where(nan, 0.0, exact + s * error))) for s in (-1, 1))
    found = ordinal(codes)
    wrong = ((found < low) | (found > high)) & ~nan
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} codes, first {wrong.nonzero()[0]}"
    )


def check_f8(codes: Tensor, scale: Tensor, bounded: Bounded) -> None:
    """Codes [.., n] and scales [..] of rows: the contract of include/liveact/dtype.h."""
    exact, error = bounded
    bound = exact.abs().nan_to_num(nan=0.0).amax(-1)
    expected = bound.clamp(min=AMAX_FLOOR) / F8_MAX
    allowed = error.nan_to_num(nan=0.0).amax(-1) / F8_MAX + 2 * U * expected
    assert ((scale.double() - expected).abs() <= allowed).all(), "scale"
    in_units = exact / scale.double().unsqueeze(-1)
    check_codes(codes, in_units, error / scale.double().unsqueeze(-1) + 4 * U * in_units.abs())


def check_bf16(values: Tensor, bounded: Bounded) -> None:
    """bf16 values are roundings of values within the error of exact."""
    exact, error = bounded
    error = error + 2 * U * exact.abs()
    low, high = ((exact + sign * error).float().bfloat16() for sign in (-1, 1))
    assert ((low <= values) & (values <= high)).all()


def check_same_codes(codes: Tensor, others: Tensor) -> None:
    """Two evaluations in fp32: NaN at the same places, codes equal but where the order of a sum
    decides a rounding. A relative difference of 1e-5 does that for 32 · 1e-5 of the values (codes
    are 1/16 apart or more), and then by one step."""
    codes, others = codes.view(torch.float8_e4m3fn), others.view(torch.float8_e4m3fn)
    nan = codes.float().isnan()
    assert torch.equal(nan, others.float().isnan())
    steps = (ordinal(codes) - ordinal(others)).abs()[~nan]
    if steps.numel() == 0:
        return
    assert steps.max() <= 1
    assert (steps > 0).sum() <= max(1, 1e-3 * steps.numel())
