"""How relative error is measured."""

from __future__ import annotations

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over the whole tensor, in float64."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {expected.shape}"
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()
