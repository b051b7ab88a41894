"""What a device can do at most: measured in the same run, and as its datasheet says.

A share of the datasheet says how good a kernel is; a share of what a plain copy and a plain product
reached in the same minute says how much of the rest is clocks, power cap and cooling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import spread
from benchmarks.timing import Clock

# Dense tensor-core rates and memory bandwidth, NVIDIA's datasheets (SXM boards).
DATASHEET: dict[str, dict[str, float]] = {
    "H100": {"fp8_tflops": 1979.0, "bf16_tflops": 989.0, "tb_per_s": 3.35},
    "H200": {"fp8_tflops": 1979.0, "bf16_tflops": 989.0, "tb_per_s": 4.8},
}
FIELDS: dict[str, Any] = {
    "tb_per_s": float,
    "tflops": dict,  # format -> measured
    "datasheet": (dict, type(None)),
}
_GEMM = {"cuda": (8192, 8192, 8192), "cpu": (768, 1024, 1024)}
_COPY_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}


def datasheet(name: str) -> dict[str, float] | None:
    """By the name that the driver gives the GPU; None for one that is not listed."""
    return next((rates for key, rates in DATASHEET.items() if key in name), None)


def row_scales(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, k] → (fp8 [m, k], scale [m, 1]): the FP8 contract of the engine."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def product(fmt: str, m: int, n: int, k: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """A call that multiplies random [m, k] and [n, k]^T. Random: a GPU draws less power, and so
    clocks higher, on zeros."""
    a, b = (torch.randn(rows, k, device=device) for rows in (m, n))
    if fmt == "fp8":
        (qa, sa), (qb, sb) = row_scales(a), row_scales(b)
        return lambda: torch._scaled_mm(
            qa, qb.t(), scale_a=sa, scale_b=sb.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[fmt]
    a, b = a.to(dtype), b.to(dtype)
    return lambda: a @ b.t()


def measure(clock: Clock, formats: tuple[str, ...], samples: int = 5) -> dict[str, Any]:
    """FIELDS: a copy (read and written bytes both counted) and a square product per format."""
    kind = clock.device.type
    source = torch.empty(_COPY_BYTES[kind], dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    copies = clock.samples_ms(lambda: target.copy_(source), samples, cold=True)
    m, n, k = _GEMM[kind]
    tflops = {}
    for fmt in formats:
        call = product(fmt, m, n, k, clock.device)
        ms = spread.percentile(clock.samples_ms(call, samples, cold=False), 50)
        tflops[fmt] = 2 * m * n * k / ms / 1e9
    name = torch.cuda.get_device_name(clock.device) if kind == "cuda" else ""
    return {
        "tb_per_s": 2 * source.nbytes / spread.percentile(copies, 50) / 1e9,
        "tflops": tflops,
        "datasheet": datasheet(name),
    }
