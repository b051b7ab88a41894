"""Samples to numbers: percentiles, and medians of ratios that noise of the machine leaves alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

FIELDS = {"n": int, "median": float, "p10": float, "p90": float, "min": float, "max": float}


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. Raises ValueError for no samples."""
    if not samples:
        raise ValueError("percentile: expected samples, found none")
    return float(np.percentile(samples, percent))


def spread(samples: Sequence[float], *percents: int) -> dict[str, Any]:
    """FIELDS of the samples, and `p<percent>` for each further percent asked for."""
    result: dict[str, Any] = {"n": len(samples), "median": percentile(samples, 50)}
    for percent in sorted({10, 90, *percents}):
        result[f"p{percent}"] = percentile(samples, percent)
    return result | {"min": min(samples), "max": max(samples)}


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of ratios of neighbours in time: what slows both down cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
