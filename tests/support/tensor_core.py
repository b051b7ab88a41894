"""How a Hopper tensor core sums FP8 products, emulated: what fast and full sums cost.

A step multiplies 32 pairs and adds the products to the accumulator. All 33 terms are aligned to the
largest one and cut, towards zero, to BITS bits below its exponent; so measurements of others say
(docs/attention.md). Fast sums stay in that accumulator for all of K. Full sums leave it for fp32
every PROMOTION steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP, BITS, PROMOTION = 32, 13, 4
# Relative RMS error of fast sums of normal values, by K: what `product` gives, see
# tests/unit/test_fast_sums.py. Full sums: 1.3e-4. Quantisation of the operands: 3.7e-2.
FAST_SUMS_ERROR = {5120: 1.6e-3, 13824: 2.9e-3}


def product(x: Tensor, w: Tensor, *, full: bool) -> Tensor:
    """x [m, k], w [n, k], values that fp8 holds → x wᵀ [m, n] float64, as it sums them."""
    acc = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    total = torch.zeros_like(acc)
    for step, first in enumerate(range(0, x.shape[1], STEP)):
        part = slice(first, first + STEP)
        terms = x[:, None, part].double() * w[None, :, part].double()  # [m, n, STEP]
        terms = torch.cat([terms, acc[..., None]], dim=-1)
        largest = terms.abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-100)
        unit = torch.exp2(torch.floor(torch.log2(largest)) - BITS)
        acc = (torch.trunc(terms / unit) * unit).sum(dim=-1)
        if full and step % PROMOTION == PROMOTION - 1:
            total = (total + acc).float().double()
            acc = torch.zeros_like(acc)
    return total + acc
