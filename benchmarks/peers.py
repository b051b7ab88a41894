"""What others offer for the same call: torch, cuDNN and flash-attn, on the same inputs.

A peer that is not installed or refuses is named with the reason, never left out. None of them is a
dependency: what is there is imported when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peaks import row_scales

Call = Callable[[], Any]
COMPILED = "torch.compile"  # the name of that peer
# (name, what makes the call; it raises where the peer is missing or refuses)
Peer = tuple[str, Callable[[], Call]]


def open_peers(peers: list[Peer]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that work, and of the others why not. Each runs once."""
    calls, missing = {}, {}
    for name, make in peers:
        try:
            call = make()
            call()
        except Exception as error:  # whatever a foreign library throws
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            calls[name] = call
    return calls, missing


def compiled(function: Callable[..., Any], *arguments: Any) -> Peer:
    """torch.compile of a plain line, for the GPU."""
    return COMPILED, lambda: _bind(torch.compile(function, dynamic=False), *arguments)


def _bind(function: Callable[..., Any], *arguments: Any) -> Call:
    return lambda: function(*arguments)


# ---------------------------------------------------------------------------- products


def linear_peers(x: Tensor, weight: Tensor, bias: Tensor) -> list[Peer]:
    """x [m, k], weight [n, k], bias [n], all bf16 or fp32: the plain product first."""
    name = f"torch {str(x.dtype).removeprefix('torch.')}"
    peers: list[Peer] = [(name, lambda: _bind(F.linear, x, weight, bias))]
    if x.device.type == "cuda":
        peers += [
            ("torch._scaled_mm, row-wise", lambda: _scaled_mm(x, weight, bias, per_row=True)),
            # As the engine does: sums leave the tensor core's short accumulator every few products.
            (
                "torch._scaled_mm, row-wise, full sums",
                lambda: _scaled_mm(x, weight, bias, per_row=True, fast=False),
            ),
            ("torch._scaled_mm, per tensor", lambda: _scaled_mm(x, weight, bias, per_row=False)),
        ]
    return peers


def _scaled_mm(
    x: Tensor, weight: Tensor, bias: Tensor, *, per_row: bool, fast: bool = True
) -> Call:
    """The product alone: x is quantised beforehand, as it comes out of the op before it."""
    if per_row:
        (qx, sx), (qw, sw) = row_scales(x), row_scales(weight)
        sw = sw.t()
    else:
        (qx, sx), (qw, sw) = (row_scales(t.reshape(1, -1)) for t in (x, weight))
        qx, qw, sx, sw = qx.view_as(x), qw.view_as(weight), sx[0, 0], sw[0, 0]
    return lambda: torch._scaled_mm(
        qx, qw.t(), scale_a=sx, scale_b=sw, bias=bias, out_dtype=x.dtype, use_fast_accum=fast
    )


# ---------------------------------------------------------------------------- attention


def attention_peers(q: Tensor, k: Tensor, v: Tensor) -> list[Peer]:
    """q [B, H, M, hd], k and v [B, H, S, hd], bf16 or fp32, no mask."""
    peers: list[Peer] = [("torch SDPA", lambda: _bind(F.scaled_dot_product_attention, q, k, v))]
    if q.device.type != "cuda":
        return peers
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        name = f"torch SDPA, {backend.removesuffix('_ATTENTION').lower()}"
        peers.append((name, _Backend(getattr(SDPBackend, backend), q, k, v)))
    return [
        *peers,
        ("cuDNN FP8", lambda: _cudnn_fp8(q, k, v)),
        ("flash-attn 2", lambda: _flash_attention_2(q, k, v)),
        ("flash-attn 3", lambda: _flash_attention_3(q, k, v, fp8=False)),
        ("flash-attn 3 FP8", lambda: _flash_attention_3(q, k, v, fp8=True)),
    ]


class _Backend:
    """SDPA restricted to one of its backends."""

    def __init__(self, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._backend, self._operands = backend, (q, k, v)

    def __call__(self) -> Call:
        return self.run

    def run(self) -> Tensor:
        with sdpa_kernel(self._backend):
            return F.scaled_dot_product_attention(*self._operands)


def _tensor_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all of x, which is what these libraries take."""
    codes, scale = row_scales(x.reshape(1, -1))
    return codes.view(x.shape), scale.view(1)


def _flash_attention_2(q: Tensor, k: Tensor, v: Tensor) -> Call:
    attend = import_module("flash_attn").flash_attn_func
    operands = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    return lambda: attend(*operands)


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor, *, fp8: bool) -> Call:
    attend = import_module("flash_attn_interface").flash_attn_func
    operands = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    if not fp8:
        return lambda: attend(*operands)
    codes, scales = zip(*(_tensor_fp8(t) for t in operands), strict=True)
    batch, heads = q.shape[:2]
    names = ("q_descale", "k_descale", "v_descale")
    named = {n: s.expand(batch, heads).contiguous() for n, s in zip(names, scales, strict=True)}
    return lambda: attend(*codes, **named)


def _cudnn_fp8(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """cuDNN through nvidia-cudnn-frontend: one scale per tensor, FP8 output as Hopper needs it."""
    cudnn = import_module("cudnn")
    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32)
    quantised = [_tensor_fp8(t.contiguous()) for t in (q, k, v)]
    inputs = [
        graph.tensor(dim=list(t.shape), stride=list(t.stride()), data_type=fp8)
        for t, _ in quantised
    ]
    scalar: dict[str, Any] = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1], "data_type": fp32}
    scales = [graph.tensor(**scalar) for _ in range(6)]
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    out, _, *amax = graph.sdpa_fp8(
        q=inputs[0],
        k=inputs[1],
        v=inputs[2],
        **dict(zip(names, scales, strict=True)),
        attn_scale=1.0 / math.sqrt(q.shape[-1]),
        use_causal_mask=False,
        generate_stats=False,
    )
    result = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    out.set_output(True).set_dim(list(q.shape)).set_stride(list(result.stride()))
    for tensor in amax:
        tensor.set_output(False).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    one = torch.ones(1, 1, 1, 1, device=q.device)
    given = [s.view(1, 1, 1, 1) for _, s in quantised] + [one] * 3
    pack = dict(zip(inputs, (t for t, _ in quantised), strict=True))
    pack |= dict(zip(scales, given, strict=True)) | {out: result}
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
    return lambda: graph.execute(pack, workspace)
