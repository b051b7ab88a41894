"""What the encoders compute with: the tensors of a file by their released names, and the products
and norms that name them.

The encoders are written out on the functions of torch. Their implementations in `transformers` are
what the tests compare with; importing those would take longer than everything else a start does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F


class Weights(dict[str, torch.Tensor]):
    """Tensors of one device and dtype, by name; those that had both already stay mapped."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(
            {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
        )
        self.device = torch.device(device)
        self.dtype = dtype

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]; with a bias where there is one."""
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def layer_norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., n] → same shape."""
        weight = self[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self[f"{name}.bias"], eps)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """q, k, v [1, n, heads · head_dim] → the same shape.

    bias [1, heads, n, n] is added to the logits; scale: 1/√head_dim where not given.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).flatten(2)
