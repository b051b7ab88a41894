"""Every kind of product that the layers ask cuBLASLt for, on a GPU: `pytest -m gpu`.

Which of them cuBLASLt has an algorithm for, only a GPU can say: a bias, a sum into the output and
scales per row are each documented, not all of them together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases import make_values
from benchmarks.peaks import row_scales
from liveact import _core, _core_dev
from liveact.device import kernels
from liveact.device.devices import cublaslt_library, cuda_obstacle
from tests.support.compare import relative_error
from tests.support.tensor_core import FAST_SUMS_ERROR

pytestmark = pytest.mark.gpu

# Rows: a few tokens of a prompt, an image, odd, less than a tile, a small and a large block.
ROWS = (1, 12, 41, 257, 1170, 6144)
SIZES = ((256, 256), (768, 256), (512, 256), (256, 512), (5120, 5120))  # N, K
# name: (operands, output, bias, sum into the output, gate)
KINDS = {
    "fp8": ("fp8", "bf16", True, False, False),
    "fp8 without bias": ("fp8", "bf16", False, False, False),
    "fp8 onto the residual": ("fp8", "bf16", True, True, False),
    "bf16": ("bf16", "bf16", True, False, False),
    "bf16 onto the residual": ("bf16", "bf16", True, True, False),
    "bf16 with a gate": ("bf16", "bf16", True, True, True),
    "head": ("bf16", "fp32", True, False, False),
}


@pytest.fixture(scope="module")
def cuda() -> _core.Device:
    if obstacle := cuda_obstacle():
        pytest.skip(f"no usable GPU: {obstacle}")
    images = kernels.load(_core.cuda_architecture(0))
    return _core.open_cuda(0, images, cublaslt=cublaslt_library())


def bits(x: Tensor) -> Any:
    views = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return x.contiguous().view(views.get(x.dtype, x.dtype)).numpy()


def operand(x: Tensor, fmt: str) -> tuple[Any, Tensor]:
    """x [rows, K] → as the op takes it, and the values that this holds."""
    if fmt == "fp8":
        codes, scale = row_scales(x)
        return (bits(codes), bits(scale[:, 0])), codes.double() * scale
    rounded = x.bfloat16()
    return bits(rounded), rounded.double()


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_product(cuda: _core.Device, kind: str, m: int, n: int, k: int) -> None:
    """Against float64: one rounding of the output, and what fp32 sums of K lose."""
    operands, output, has_bias, accumulate, gated = KINDS[kind]
    x, x_values = operand(make_values("random", m, k), operands)
    weight, w_values = operand(make_values("random", n, k, seed=1) * k**-0.5, operands)
    out_type = torch.float32 if output == "fp32" else torch.bfloat16
    # A gate comes with scale and bias in fp32; else the bias has the format of the output.
    bias = make_values("random", n, seed=2).to(torch.float32 if gated else out_type)
    gate = make_values("random", n, seed=3) if gated else torch.ones(n)
    before = make_values("random", m, n, seed=4).to(out_type)
    expected = x_values @ w_values.T * gate + before.double() * accumulate
    expected += bias.double() * has_bias
    scale = weight[1] if operands == "fp8" else bits(gate) if gated else None
    given = bits(bias) if has_bias else None
    found = _core_dev.ops.linear(
        cuda, x, weight, scale, given, bits(before), accumulate, full_sums=True
    )
    values = torch.from_numpy(np.asarray(found)).view(out_type)
    # A product that is rounded before the gate is rounded twice.
    bound = 2.0**-24 * 128 if output == "fp32" else 2.0**-8 * (2 if gated else 1)
    assert relative_error(values, expected) < bound


# Of a layer at 512×512: qkv, self_o and cross_o, ffn_up, ffn_down onto the residual.
REAL_SIZES = ((15360, 5120, False), (5120, 5120, True), (13824, 5120, False), (5120, 13824, True))
REAL_ROWS, CHECKED_ROWS = 8192, 64


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "full"])
@pytest.mark.parametrize("n, k, residual", REAL_SIZES)
def test_real_sizes(cuda: _core.Device, n: int, k: int, residual: bool, fast: bool) -> None:
    """Some rows of the products of a block, against float64. Fast sums: at most twice the error
    that emulation gives them, beside one rounding of the output.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w = (make_values("random", rows, k, seed=rows, device=device) for rows in (REAL_ROWS, n))
    (qx, sx), (qw, sw) = row_scales(x), row_scales(w * k**-0.5)
    bias = make_values("random", n, seed=2).bfloat16()
    before = make_values("random", REAL_ROWS, n, seed=4, device=device).bfloat16().cpu()
    given = (bits(qx.cpu()), bits(sx[:, 0].cpu())), (bits(qw.cpu()), bits(sw[:, 0].cpu()))
    found = _core_dev.ops.linear(
        cuda, *given, given[1][1], bits(bias), bits(before), residual, full_sums=not fast
    )
    rows = torch.arange(0, REAL_ROWS, REAL_ROWS // CHECKED_ROWS)
    values = torch.from_numpy(np.asarray(found)).view(torch.bfloat16)[rows]
    expected = (qx[rows.to(device)].double() * sx[rows.to(device)]) @ (qw.double() * sw).T
    expected = expected.cpu() + bias.double() + before[rows].double() * residual
    error = relative_error(values, expected)
    print(f"{REAL_ROWS} x {n} x {k} {'fast' if fast else 'full'}: relative error {error:.2e}")
    assert error < 2.0**-8 + (2 * FAST_SUMS_ERROR[k] if fast else 0.0)
