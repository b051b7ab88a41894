"""What fast sums of FP8 products cost, by emulation: little beside what quantising costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peaks import row_scales
from tests.support.compare import relative_error
from tests.support.tensor_core import FAST_SUMS_ERROR, product


@pytest.mark.parametrize("k", FAST_SUMS_ERROR)
@pytest.mark.parametrize("values", ["normal", "after GELU"])
def test_fast_sums(k: int, values: str) -> None:
    """The figures of docs/precision.md. Sums that are cut towards zero lose a little every time;
    values of mean 0 and those behind an activation lose about as much."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, k, generator=generator) for rows in (16, 32))
    if values != "normal":
        x = F.gelu(x, approximate="tanh")
    (codes_x, scale_x), (codes_w, scale_w) = row_scales(x), row_scales(w)
    held_x, held_w = codes_x.double(), codes_w.double()
    exact = held_x @ held_w.T
    wanted = (x.double() / scale_x) @ (w.double() / scale_w).T
    fast, full = (product(held_x, held_w, full=full) for full in (False, True))
    assert relative_error(fast, exact) == pytest.approx(FAST_SUMS_ERROR[k], rel=0.25)
    assert relative_error(full, exact) < 2e-4
    # Beside the rounding of the operands they are nothing to see.
    assert relative_error(fast, wanted) < 1.01 * relative_error(exact, wanted)
