"""Gradients against central differences, for tests of what a trainer differentiates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def slopes(loss: Callable[[], Tensor], tensor: Tensor, step: float) -> tuple[float, float]:
    """Slope of the loss along one direction: by the gradient, by central differences.

    tensor: float64, with its gradient of `loss()` in `grad`; it is moved and put back. The
    direction is random and leans towards the gradient, so that the slope is not small by chance.
    The differences are off by step^2 times the third derivative, by 2^-53 / step times the loss.
    """
    assert tensor.grad is not None and tensor.grad.norm() > 0
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm() + tensor.grad / tensor.grad.norm()
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            tensor += sign * step * direction
            losses.append(loss().item())
            tensor -= sign * step * direction
    slope = (tensor.grad * direction).sum().item()
    return slope, (losses[0] - losses[1]) / (2 * step)
