"""Lip synchronisation in numbers: the mouth of each picture, found by drawing it.

A picture is compared, in a rectangle around the mouth, with drawings of the same person whose mouth
has every combination of some shapes; the one that differs least says how far it is open. On frames
that were drawn, and not generated, this gives the ceiling of what a model can reach.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.identity import Identity
from training.data.motion import COLUMNS
from training.data.portrait import draw, mouth_geometry

_OPENINGS = tuple(i / 12 for i in range(13))
_WIDTHS = (-0.8, 0.0, 0.6)
_TEETH = (0.0, 0.7)
_NODS = (0.0, 0.15, 0.3, 0.45)


@dataclass(frozen=True)
class Sync:
    """How the opening of a mouth follows what it should be.

    correlation: at no lag. lag: frames by which the picture is late where the correlation is
    largest, and best: what it is there. closed: of frames in which the lips should touch
    (p, b, m and silence), the share whose opening is below 0.15.
    """

    correlation: float
    lag: int
    best: float
    closed: float


def mouth_openings(person: Identity, pictures: Tensor, smile: float = 0.0) -> Tensor:
    """Pictures [T, 3, S, S], 0 to 1 -> how far each mouth is open, [T], 0 to 1."""
    shapes = list(itertools.product(_OPENINGS, _WIDTHS, _TEETH, _NODS))
    motion = torch.zeros(len(shapes), len(COLUMNS))
    for row, values in zip(motion, shapes, strict=True):
        for name, value in zip(("opening", "width", "teeth", "nod"), values, strict=True):
            row[COLUMNS.index(name)] = value
        row[COLUMNS.index("smile")] = smile
    size = pictures.shape[-1]
    rows, columns = _around_mouth(person, size)
    drawn = draw(person, motion, size)[:, :, rows, columns].flatten(1)
    seen = pictures[:, :, rows, columns].flatten(1)
    nearest = torch.cdist(seen, drawn).topk(5, largest=False)
    weight = torch.softmax(-(nearest.values.square()) / 0.5, dim=1)
    return (weight * motion[nearest.indices, 0]).sum(1)


def _around_mouth(person: Identity, size: int) -> tuple[slice, slice]:
    """The rows and columns of a mouth in all its shapes."""
    mouth = mouth_geometry(person, torch.zeros(1, len(COLUMNS)))
    x, y = float(mouth.x), float(mouth.y)
    edges = [(x - 0.27, x + 0.3), (y - 0.12, y + 0.3)]
    (left, right), (top, bottom) = (
        tuple(round((edge + 1) / 2 * size) for edge in pair) for pair in edges
    )
    return slice(top, bottom), slice(left, right)


def synchronisation(found: Tensor, expected: Tensor, reach: int = 5) -> Sync:
    """Openings [T] found in pictures and those of the phonemes."""
    correlations = {}
    for lag in range(-reach, reach + 1):
        late = found[max(lag, 0) : len(found) + min(lag, 0)]
        true = expected[max(-lag, 0) : len(expected) + min(-lag, 0)]
        correlations[lag] = float(torch.corrcoef(torch.stack([late, true]))[0, 1])
    best = max(correlations, key=lambda lag: correlations[lag])
    together = expected < 0.02
    closed = float((found[together] < 0.15).float().mean()) if together.any() else float("nan")
    return Sync(correlations[0], best, correlations[best], closed)
