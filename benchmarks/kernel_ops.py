"""What each op of core/ops.h takes in the kernel benchmark: arguments, a plain torch line, peers.

`prepare(case, fmt, device)` draws the operands of a case once, in the format `fmt` that the engine
uses for it; the torch line and the peers get the same values, dequantised, on the same device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import flops
from benchmarks.kernel_cases import KernelCase, make_values
from benchmarks.peaks import row_scales
from benchmarks.peers import Peer, compiled, linear_peers

EPS = 1e-6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# Relative RMS that results in a format may differ by. fp32: 2^-24 times the roundings of a sum of
# 2^14. bf16: both sides round, each by at most 2^-9. fp8: values are off by up to 2^-4 of
# themselves, evenly distributed, which is 2^-4 / sqrt(3) RMS, in results or in P of attention.
TOLERANCE = {"fp32": 2.0**-24 * 128, "bf16": 2.0**-8, "fp8": 2.0**-4 / 3**0.5 + 2.0**-8}


@dataclass
class Prepared:
    """One op on one case."""

    op: str
    arguments: tuple[Any, ...]  # of _core_dev.ops.<op>, tensors on the CPU
    fmt: str  # decides the tolerance
    reference: Callable[[], Tensor] | None = None  # fp32 or fp64, of the same shape as `result`
    result: Callable[[Any], Tensor] = field(default=lambda out: as_float(out))
    peers: list[Peer] = field(default_factory=list)
    flop: int = 0
    # Bytes of a call where it is not all arguments read and all results written once.
    bytes_moved: int | None = None


def as_float(value: Any) -> Tensor:
    """Rows in any format → fp32: (codes, scale), or plain."""
    if isinstance(value, tuple):
        codes, scale = value[0], value[1]
        return codes.float() * scale.float().unsqueeze(-1)
    return value.float()


def stored_rows(x: Tensor, fmt: str) -> tuple[Any, Tensor]:
    """x [m, n] fp32 → as the op takes it, and the values that this holds, both on x's device."""
    if fmt == "fp8":
        codes, scale = row_scales(x)
        return (codes.cpu(), scale[:, 0].cpu()), codes.float() * scale
    rounded = x.to(DTYPES[fmt])
    return rounded.cpu(), rounded.float()


def torch_line(device: torch.device, function: Callable[..., Tensor], *operands: Any) -> list[Peer]:
    """The plain line as a peer, and compiled where that is what a GPU user does."""
    peers: list[Peer] = [("torch", lambda: lambda: function(*operands))]
    if device.type == "cuda":
        peers.append(compiled(function, *operands))
    return peers


def plain_format(fmt: str) -> str:
    """The format between sub-layers."""
    return "fp32" if fmt == "fp32" else "bf16"


def row_op(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    """layer_norm, rms_norm, quantize, activate: [rows, cols] of the plain format → fmt."""
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    given, x = stored_rows(make_values(case.values, rows, cols, device=device), plain_format(fmt))
    gain, bias = (make_values("random", cols, seed=s, device=device) for s in (1, 2))
    typed, low = x.to(DTYPES[plain_format(fmt)]), DTYPES[plain_format(fmt)]
    lines: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], tuple[Any, ...]]] = {
        "layer_norm": (
            lambda x, g, b: F.layer_norm(x.float(), (cols,), g, b, EPS).to(x.dtype),
            (gain, bias),
            (gain.cpu(), bias.cpu(), EPS, fmt),
        ),
        "rms_norm": (
            lambda x, g: F.rms_norm(x.float(), (cols,), g, EPS).to(x.dtype),
            (gain,),
            (gain.cpu(), EPS, fmt),
        ),
        "activate": (lambda x: F.gelu(x, approximate="tanh"), (), ("gelu_tanh", fmt)),
        "quantize": (lambda x: x.to(low), (), (fmt,)),
    }
    line, operands, tail = lines[case.op]

    def quantised(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return row_scales(line(x, *rest))

    function: Any = quantised if fmt == "fp8" else line
    return Prepared(
        case.op,
        (given, *tail),
        fmt,
        reference=lambda: line(x, *operands),
        peers=torch_line(device, function, typed, *operands),
    )


def linear(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    m, n, k = (case.sizes[s] for s in ("rows", "cols", "inner"))
    plain = plain_format(fmt)
    given, x = stored_rows(make_values("random", m, k, device=device), fmt)
    weight, w = stored_rows(make_values("random", n, k, seed=1, device=device) * k**-0.5, fmt)
    bias = make_values("random", n, seed=2, device=device)
    # Both devices take the bias in the format of the output, fp32 on the CPU.
    stored = bias if device.type == "cpu" else bias.to(DTYPES[plain])
    out = torch.zeros(m, n, dtype=DTYPES[plain])
    low = DTYPES[plain]
    return Prepared(
        "linear",
        # The epilogue's scale is the weight's, as Linear in csrc/core/weights.h has it.
        (given, weight, weight[1] if fmt == "fp8" else None, stored.cpu(), out, False),
        plain,
        reference=lambda: F.linear(x, w, bias),
        peers=linear_peers(x.to(low), w.to(low), bias.to(low)),
        flop=flops.product(m, n, k),
        bytes_moved=(m * k + n * k) * DTYPES[fmt].itemsize + m * n * low.itemsize,
    )


# ---------------------------------------------------------------------------- latents


def latent_op(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    """sampler_step and guide: elementwise in fp32 on the latent."""
    size = case.sizes["size"]
    z, v, noise = (make_values("random", size, seed=s, device=device) for s in range(3))
    sigma, next_sigma, guidance = 0.9375, 0.75, 1.5

    def step(z: Tensor, v: Tensor, noise: Tensor) -> Tensor:
        return (1 - next_sigma) * (z - sigma * v) + next_sigma * noise

    def guide(v: Tensor, silent: Tensor) -> Tensor:
        return silent + guidance * (v - silent)

    if case.op == "guide":
        arguments: tuple[Any, ...] = (v.cpu(), z.cpu(), guidance)
        peers, reference = torch_line(device, guide, v, z), lambda: guide(v, z)
    else:
        arguments = (z.cpu(), v.cpu(), noise.cpu(), sigma, next_sigma)
        peers, reference = torch_line(device, step, z, v, noise), lambda: step(z, v, noise)
    return Prepared(case.op, arguments, "fp32", reference=reference, peers=peers)


def patches(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    """patchify (latent and conditioning → tokens) and unpatchify (tokens → velocity)."""
    n, h, w = (case.sizes[s] for s in ("n", "h", "w"))
    low = DTYPES[fmt]

    def to_tokens(z: Tensor, y: Tensor) -> Tensor:
        x = torch.cat([z, y]).unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # [c, n, h, 2, w, 2]
        return x.permute(1, 2, 4, 0, 3, 5).reshape(n * h * w // 4, -1).to(low)

    def to_velocity(tokens: Tensor) -> Tensor:
        x = tokens.view(n, h // 2, w // 2, 2, 2, 16).permute(5, 0, 1, 3, 2, 4)
        return x.reshape(16, n, h, w)

    if case.op == "unpatchify":
        tokens = make_values("random", n * h * w // 4, 64, device=device)
        return Prepared(
            case.op,
            (tokens.cpu(), 16, n, h, w),
            "fp32",
            reference=lambda: to_velocity(tokens),
            peers=torch_line(device, to_velocity, tokens),
        )
    z, y = (make_values("random", c, n, h, w, seed=c, device=device) for c in (16, 20))
    return Prepared(
        case.op,
        (z.cpu(), y.cpu(), 0, fmt),
        fmt,
        reference=lambda: to_tokens(z, y).float(),
        peers=torch_line(device, to_tokens, z, y),
    )


def all_finite(case: KernelCase, fmt: str, device: torch.device) -> Prepared:
    x = make_values("random", case.sizes["size"], device=device)
    return Prepared(
        case.op,
        (x.cpu(),),
        "fp32",
        reference=lambda: torch.ones(1),
        result=lambda out: torch.tensor([float(out)]),
        peers=torch_line(device, lambda x: x.isfinite().all(), x),
    )


BUILDERS: dict[str, Callable[[KernelCase, str, torch.device], Prepared]] = {
    **dict.fromkeys(("layer_norm", "rms_norm", "quantize", "activate"), row_op),
    "linear": linear,
    **dict.fromkeys(("sampler_step", "guide"), latent_op),
    **dict.fromkeys(("patchify", "unpatchify"), patches),
    "all_finite": all_finite,
}
