"""What a film shows, in numbers: it is compared with drawings of the same person.

For the mouth, a rectangle around it is compared with drawings whose mouth has every combination of
some shapes; the one that differs least says how far it is open. For the expression, each frame is
compared with what it would be with each of the expressions. On frames that were drawn, and not
generated, this gives the ceiling of what a model can reach.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.espeak import Phoneme
from training.data.expressions import EXPRESSIONS
from training.data.identity import Identity
from training.data.motion import COLUMNS, motion_of
from training.data.portrait import draw, mouth_geometry

CLOSED = 0.15  # an opening below this is a closed mouth: 2 pixels of 128
_OPENINGS = tuple(i / 12 for i in range(13))
_WIDTHS = (-0.8, 0.0, 0.6)
_TEETH = (0.0, 0.7)
_NODS = (0.0, 0.15, 0.3, 0.45)
_BOBS = (0.0, 0.25, 0.5, 0.75, 1.0)  # only of somebody who nods
_RESTING: dict[str, dict[str, float]] = {
    "smiling": {"smile": 1.0},
    "sad": {"sad": 1.0},
}


@dataclass(frozen=True)
class Sync:
    """How the opening of a mouth follows what it should be.

    correlation: at no lag. lag: frames by which the picture is late where the correlation is
    largest, and best: what it is there. closed: of frames in the middle of a p, b or m, the share
    in which the mouth is closed; None where there are none.
    """

    correlation: float
    lag: int
    best: float
    closed: float | None


def mouth_openings(person: Identity, pictures: Tensor, expression: str = "neutral") -> Tensor:
    """Pictures [T, 3, S, S], 0 to 1 -> how far each mouth is open, [T], 0 to 1.

    expression: what the person does in them; a smile has another mouth.
    """
    bobs = _BOBS if expression == "nodding" else (0.0,)
    names = ("opening", "width", "teeth", "nod", "bob")
    shapes = list(itertools.product(_OPENINGS, _WIDTHS, _TEETH, _NODS, bobs))
    motion = torch.zeros(len(shapes), len(COLUMNS))
    for name, values in zip(names, torch.tensor(shapes).T, strict=True):
        motion[:, COLUMNS.index(name)] = values
    for name, value in _RESTING.get(expression, {}).items():
        motion[:, COLUMNS.index(name)] = value
    size = pictures.shape[-1]
    part = around_mouth(person, size, below=0.38 if len(bobs) > 1 else 0.3)
    # Drawn in pieces: all frames of somebody who nods would be a gigabyte.
    drawn = torch.cat([draw(person, some, size)[part].flatten(1) for some in motion.split(256)])
    nearest = torch.cdist(pictures[part].flatten(1), drawn).topk(5, largest=False)
    weight = torch.softmax(-(nearest.values.square()) / 0.5, dim=1)
    return (weight * motion[nearest.indices, 0]).sum(1)


def around_mouth(
    person: Identity, size: int, below: float = 0.3
) -> tuple[slice, slice, slice, slice]:
    """The index of what of pictures [T, 3, size, size] a mouth is in, in all its shapes."""
    mouth = mouth_geometry(person, torch.zeros(1, len(COLUMNS)))
    x, y = float(mouth.x), float(mouth.y)
    edges = [(x - 0.27, x + 0.3), (y - 0.12, y + below)]
    (left, right), (top, bottom) = (
        tuple(round((edge + 1) / 2 * size) for edge in pair) for pair in edges
    )
    return slice(None), slice(None), slice(top, bottom), slice(left, right)


def synchronisation(found: Tensor, motion: Tensor, reach: int = 5) -> Sync:
    """Openings [T] found in pictures, and the motion [T, 12] of the phonemes."""
    expected, press = (motion[:, COLUMNS.index(name)] for name in ("opening", "press"))
    correlations = {}
    for lag in range(-reach, reach + 1):
        late = found[max(lag, 0) : len(found) + min(lag, 0)]
        true = expected[max(-lag, 0) : len(expected) + min(-lag, 0)]
        correlations[lag] = float(torch.corrcoef(torch.stack([late, true]))[0, 1])
    best = max(correlations, key=lambda lag: correlations[lag])
    together = (press > 0.8) & (expected < 0.02)
    closed = float((found[together] < CLOSED).float().mean()) if together.any() else None
    return Sync(correlations[0], best, correlations[best], closed)


def expression_errors(
    person: Identity, pictures: Tensor, phonemes: tuple[Phoneme, ...], first_frame: int = 0
) -> Tensor:
    """How far each frame is from what it would be with each expression: [5, T] in the order of
    `EXPRESSIONS`, mean squared differences.

    pictures [T, 3, S, S]: of a film from its frame `first_frame` on. phonemes: said in it. The blur
    of a model counts the same for all of them, so that only their differences decide.
    """
    last = first_frame + len(pictures)
    errors = []
    for expression in EXPRESSIONS:
        motion = torch.from_numpy(motion_of(phonemes, last, [expression]).values)[first_frame:]
        drawn = draw(person, motion, pictures.shape[-1])
        errors.append((drawn - pictures).square().mean((1, 2, 3)))
    return torch.stack(errors)


def shown_expressions(errors: Tensor, window: int = 20) -> Sequence[str]:
    """Errors [5, T] of `expression_errors` -> what is shown in each whole window of so many frames:
    the expression with the least error in it."""
    windows = errors.unfold(1, window, window).mean(2)  # [5, windows]
    return [EXPRESSIONS[int(index)] for index in windows.argmin(0)]
