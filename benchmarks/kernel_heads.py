"""The ops on queries, keys and values of the kernel benchmark: see kernel_ops.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import flops
from benchmarks.kernel_cases import KernelCase, make_values
from benchmarks.kernel_ops import (
    DTYPES,
    EPS,
    Prepared,
    as_float,
    plain_format,
    stored_rows,
    torch_line,
)
from benchmarks.peaks import row_scales
from benchmarks.peers import attention_peers
from liveact import _core_dev
from reference.dit_layers import rotation_table

HEAD_DIM = 128
VALUE_STRIDE = 128  # kValueStride of csrc/cuda/cuda_backend.h
RELEASED_SLOTS = (2, 2, 2, 8)


def rope_tables(grid_rows: int, grid_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin by latent frame, row and column, [positions, pairs, 2] fp32."""
    frame, row, col = rotation_table(HEAD_DIM, max(64, grid_rows, grid_cols))
    tables = (frame[:64], row[:grid_rows], col[:grid_cols])
    a, b, c = (torch.view_as_real(t).float().contiguous() for t in tables)
    return a, b, c


def _heads(rows: int, heads: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, rows, HEAD_DIM, generator=generator).to(device)


Scales = tuple[Tensor, Tensor]  # [H] of keys and of values, fp8 only


def _segment(
    k: Tensor, v: Tensor, fmt: str, scales: Scales | None, on_gpu: bool
) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """k, v [H, tokens, hd] → the op's segment in the device's layout, and the values it holds."""
    if scales is not None:
        (stored_k, held_k), (stored_v, held_v) = (
            _encode(x, scale) for x, scale in zip((k, v), scales, strict=True)
        )
    else:
        stored_k, stored_v = k.to(DTYPES[fmt]), v.to(DTYPES[fmt])
        held_k, held_v = stored_k.float(), stored_v.float()
    if on_gpu:  # K-major
        heads, tokens, width = v.shape
        columns = -(-tokens // VALUE_STRIDE) * VALUE_STRIDE
        padded = torch.zeros(heads, width, columns, dtype=torch.float32, device=v.device)
        padded[..., :tokens] = stored_v.float().transpose(1, 2)
        stored_v = padded.to(stored_v.dtype)
    of_both = (None, None) if scales is None else tuple(scale.cpu() for scale in scales)
    return (stored_k.cpu(), stored_v.cpu(), *of_both), held_k, held_v


def _encode(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [H, tokens, hd] as fp8 with a scale per head, and what it then is."""
    codes = (x / scale[:, None, None]).clamp(-448, 448).to(DTYPES["fp8"])
    return codes, codes.float() * scale[:, None, None]


def _value_scale(v: Tensor) -> Tensor:
    """[H]: kValueHeadroom = 8 in csrc/core/ops.h."""
    return 8 * v.abs().amax(dim=(1, 2)).clamp(min=1e-12) / 448


def _key_scale(gain: Tensor, heads: int) -> Tensor:
    """[H] of keys behind a norm with this gain [D] (csrc/core/ops.h)."""
    return gain.numel() ** 0.5 * gain.abs().view(heads, -1).amax(1).clamp(min=1e-12) / 448


def _scales(fmt: str, *values: Tensor) -> Scales | None:
    """Those of keys behind a norm without a gain, and of these values [H, tokens, hd]."""
    if fmt != "fp8":
        return None
    v = torch.cat(values, dim=1)
    return _key_scale(torch.ones(v.shape[0] * HEAD_DIM, device=v.device), len(v)), _value_scale(v)


def split_qkv(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    heads = case.sizes["heads"]
    grid = case.sizes["grid_rows"], case.sizes["grid_cols"]
    m, dim = case.sizes["n"] * grid[0] * grid[1], heads * HEAD_DIM
    qkv, _ = stored_rows(make_values("random", m, 3 * dim), plain_format(fmt))
    gains = [make_values("random", dim, seed=s) for s in (1, 2)]
    tables = rope_tables(*grid)
    v = qkv[:, 2 * dim :].float().view(m, heads, HEAD_DIM).transpose(0, 1)
    v_scale = _value_scale(v) if fmt == "fp8" else None
    columns = -(-m // VALUE_STRIDE) * VALUE_STRIDE
    shape = [heads, HEAD_DIM, columns] if device.type == "cuda" else [heads, m, HEAD_DIM]
    k_scale = _key_scale(gains[1], heads) if fmt == "fp8" else None
    arguments = (qkv, *gains, EPS, tables, 6, heads, k_scale, v_scale, shape, fmt)
    operands = [t.to(device) for t in (qkv, *gains, *tables)]
    key_scale, value_scale = _key_scale(operands[2], heads), _value_scale(v.to(device))
    low = DTYPES[plain_format(fmt)]

    def line(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, *rope: Tensor) -> Any:
        angle = torch.cat(
            [
                rope[0][6 : 6 + case.sizes["n"]].repeat_interleave(grid[0] * grid[1], 0),
                rope[1].repeat_interleave(grid[1], 0).repeat(case.sizes["n"], 1, 1),
                rope[2].repeat(case.sizes["n"] * grid[0], 1, 1),
            ],
            dim=1,
        )
        cos, sin = angle[:, None, :, 0], angle[:, None, :, 1]
        parts = []
        for x, gain in zip(qkv.split(dim, 1)[:2], (q_gain, k_gain), strict=True):
            x = F.rms_norm(x.float(), (dim,), gain, EPS).view(m, heads, -1, 2)
            even, odd = x[..., 0], x[..., 1]
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(2)
            parts.append(turned.transpose(0, 1))
        q, k = parts
        v = qkv[:, 2 * dim :].reshape(m, heads, HEAD_DIM).transpose(0, 1)
        if fmt == "fp8":
            return row_scales(q), _encode(k, key_scale)[0], _encode(v, value_scale)[0]
        return q.to(low), k.to(low), v.contiguous()

    def queries() -> Tensor:
        found = line(*operands)[0]
        return found[0].float() * found[1] if fmt == "fp8" else found.float()

    return Prepared(
        "split_qkv",
        arguments,
        fmt,
        reference=queries,
        result=lambda out: as_float((out[0], out[1])) if fmt == "fp8" else out[0].float(),
        peers=torch_line(device, line, *operands),
    )


def update_memory(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    """The ConvKV update; its check is the CPU op (see kernels.check), its peer is the released way:
    a depthwise Conv1d over unrotated keys and over values, then the moves."""
    heads = case.sizes["heads"]
    grid = case.sizes["grid_rows"], case.sizes["grid_cols"]
    frame = grid[0] * grid[1]
    on_gpu = device.type == "cuda"
    names = {"block_0": "sequential"}
    table = _core_dev.update_table(
        RELEASED_SLOTS,
        names.get(case.options["table"], case.options["table"]),
        0 if case.options["table"] == "block_0" else 2,
    )
    context, current = (
        [_heads(n * frame, heads, seed + s, device) for s in (0, 1)]
        for n, seed in ((6, 10), (case.sizes["n"], 20))
    )
    scales = _scales(fmt, context[1], current[1])
    stored = [_segment(k, v, fmt, scales, on_gpu)[0] for k, v in (context, current)]
    dim = heads * HEAD_DIM
    taps = [make_values("random", dim, 5, seed=s) * 0.2 for s in (1, 2)]
    own = case.options["taps"] == "own"
    given: tuple[Any, Any] = (taps[0], taps[1] if own else taps[0])
    if case.options["taps"] == "mean":
        given = (None, None)
    elif on_gpu:
        given = (given[0].t().contiguous(), given[1].t().contiguous())
    first_slot = 0 if case.options["table"] == "block_0" else 6
    arguments = (
        [(target, list(sources)) for target, sources in table.items()],
        *given,
        case.options["axis"],
        rope_tables(*grid),
        first_slot,
        stored[1],
        stored[0],
    )
    weight = taps[0].view(dim, 1, 5).to(device, DTYPES[plain_format(fmt)])
    five = torch.randn(2, 2, dim, 5 * frame, device=device).to(weight.dtype)

    def line(five: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([F.conv1d(x, weight, stride=5, groups=dim) for x in five])

    sources = {s for entry in table.values() for s in entry}
    itemsize = DTYPES[fmt].itemsize
    return Prepared(
        "update_memory",
        arguments,
        fmt,
        result=lambda out: (
            out[0].float() * scales[0].cpu()[:, None, None] if scales else out[0].float()
        ),
        peers=torch_line(device, line, five, weight),
        bytes_moved=2 * (len(sources) + len(table)) * frame * dim * itemsize,
    )


# ---------------------------------------------------------------------------- attention


def self_attention(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    heads, frame, n = case.sizes["heads"], case.sizes["frame_tokens"], case.sizes["n"]
    on_gpu = device.type == "cuda"
    q = _heads(n * frame, heads, 1, device)
    context, current = (
        [_heads(frames * frame, heads, seed + s, device) for s in (0, 1)]
        for frames, seed in ((case.sizes["context"], 2), (n, 4))
    )
    scales = _scales(fmt, context[1], current[1])
    q_scale = None
    if fmt == "fp8":
        codes, scale = row_scales(q)
        given, q_scale, q = codes.cpu(), scale[..., 0].cpu(), codes.float() * scale
    else:
        given = q.to(DTYPES[fmt])
        given, q = given.cpu(), given.float()
    segments, keys, values = zip(
        *(_segment(k, v, fmt, scales, on_gpu) for k, v in (context, current)), strict=True
    )
    k, v = (torch.cat(parts, dim=1) for parts in (keys, values))
    low = DTYPES[plain_format(fmt)]
    tokens = n * frame

    def reference() -> Tensor:
        heads_at_once = [
            F.scaled_dot_product_attention(a[None], b[None], c[None])[0]
            for a, b, c in zip(q, k, v, strict=True)
        ]
        return torch.stack(heads_at_once, dim=1).reshape(tokens, -1)

    return Prepared(
        "self_attention",
        (given, q_scale, *segments, plain_format(fmt)),
        fmt,
        reference=reference,
        peers=attention_peers(*(t[None].to(low) for t in (q, k, v))),
        flop=flops.attention(tokens, k.shape[1], heads * HEAD_DIM),
    )


def cross_attention(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    """Two softmaxes, text and image; no padding here, so that the torch line is two SDPAs."""
    heads, m = case.sizes["heads"], case.sizes["rows"]
    fmt = plain_format(fmt)
    q = _heads(m, heads, 1, device).to(DTYPES[fmt])
    pairs = [
        [_heads(case.sizes[name], heads, seed + s, device) for s in (0, 1)]
        for name, seed in (("text", 2), ("image", 4))
    ]
    # Text and image are token-major on every device; the last text key is the padding's.
    segments = [_segment(k, v, fmt, None, on_gpu=False)[0] for k, v in pairs]
    (tk, tv), (ik, iv) = ([t.to(DTYPES[fmt]) for t in pair] for pair in pairs)
    tk, tv = tk[:, :-1], tv[:, :-1]

    def line(q: Tensor, tk: Tensor, tv: Tensor, ik: Tensor, iv: Tensor) -> Tensor:
        attend = F.scaled_dot_product_attention
        out = attend(q[None], tk[None], tv[None]) + attend(q[None], ik[None], iv[None])
        return out[0].transpose(0, 1).reshape(m, -1)

    operands = (q, tk, tv, ik, iv)
    return Prepared(
        "cross_attention",
        (q.transpose(0, 1).reshape(m, -1).cpu(), segments[0], 0, segments[1], fmt),
        fmt,
        reference=lambda: line(*(t.float() for t in operands)),
        peers=torch_line(device, line, *operands),
        flop=flops.attention(m, case.sizes["text"] - 1 + case.sizes["image"], heads * HEAD_DIM),
    )


def audio_attention(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    heads, n, tokens = case.sizes["heads"], case.sizes["n"], case.sizes["audio"]
    fmt, frame, dim = plain_format(fmt), case.sizes["frame_tokens"], heads * HEAD_DIM
    q = make_values("random", n * frame, dim, device=device).to(DTYPES[fmt])
    kv = make_values("random", n * tokens, 2 * dim, seed=1, device=device).to(DTYPES[fmt])

    def line(q: Tensor, kv: Tensor) -> Tensor:
        heads_of = kv.view(n, tokens, 2, heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
        queries = q.view(n, frame, heads, HEAD_DIM).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, heads_of[0], heads_of[1])
        return out.transpose(1, 2).reshape(n * frame, dim)

    return Prepared(
        "audio_attention",
        (q.cpu(), kv.cpu(), n, n, heads, fmt),
        fmt,
        reference=lambda: line(q.float(), kv.float()),
        peers=torch_line(device, line, q, kv),
        flop=flops.attention(n * frame, tokens, dim),
    )


def head_op(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    """value_scale and store_kv: what turns rows into heads without arithmetic."""
    heads = case.sizes["heads"]
    dim, low = heads * HEAD_DIM, DTYPES[fmt]
    if case.op == "value_scale":
        qkv = make_values(case.values, case.sizes["rows"], 3 * dim, device=device).to(low)

        def line(qkv: Tensor) -> Tensor:
            values = qkv[:, 2 * dim :].float().abs().view(-1, heads, HEAD_DIM)
            return 8 * values.amax(dim=(0, 2)).clamp(min=1e-12) / 448

        return Prepared(
            case.op,
            (qkv.cpu(), heads),
            "fp32",
            reference=lambda: line(qkv),
            peers=torch_line(device, line, qkv),
            bytes_moved=qkv.nbytes // 3,
        )
    tokens = case.sizes["tokens"]
    k, v = (make_values("random", tokens, dim, seed=s, device=device).to(low) for s in (1, 2))

    def split(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (t.view(-1, heads, HEAD_DIM).transpose(0, 1).contiguous() for t in (k, v))
        return a, b

    return Prepared(
        case.op,
        (k.cpu(), v.cpu(), heads),
        fmt,
        reference=lambda: split(k, v)[0].float(),
        result=lambda out: out[0].float(),
        peers=torch_line(device, lambda k, v: split(k, v)[0], k, v),
    )


BUILDERS = {
    "split_qkv": split_qkv,
    "update_memory": update_memory,
    "self_attention": self_attention,
    "cross_attention": cross_attention,
    "audio_attention": audio_attention,
    **dict.fromkeys(("value_scale", "store_kv"), head_op),
}
