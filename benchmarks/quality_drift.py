"""Whether a person changes while it speaks for long: the row `drift` of `benchmarks.quality`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality_rows import PEOPLE, Lines, open_engine, psnr
from training.data.espeak import Utterance
from training.data.identity import identity
from training.data.motion import FPS, motion_of
from training.data.portrait import draw
from training.data.texts import random_text
from training.films import SIZE, VOICES, joined, spoken, talk
from training.measure import mouth_openings, synchronisation

WINDOW_S = 30  # of a value
LOOKED_AT = 40  # frames of a window that are compared with drawings


def drift(options: argparse.Namespace) -> Lines:
    """Each value in windows of half a minute: at the beginning, at the end, and its slope."""
    person = PEOPLE[0]
    said = speech(60 * options.minutes, options.seed)
    whole = joined(said)
    frames = int(whole.seconds * FPS)
    motion = torch.from_numpy(motion_of(whole.phonemes, frames).values)
    found = Windows(person, motion)
    with open_engine(options) as engine:
        for pictures, _ in talk(engine, person, said):
            found.take(pictures)
    return found.lines()


def speech(seconds: float, seed: int) -> list[Utterance]:
    """Sentences of one held-out voice."""
    generator = np.random.default_rng(seed)
    said: list[Utterance] = []
    while sum(one.seconds for one in said) < seconds:
        said.append(spoken(VOICES[0], random_text(generator, "en"), pause_s=0.25))
    return said


@dataclass
class Windows:
    """Values of a film that is not kept: what was taken of the window that is not over yet."""

    person: int
    motion: Tensor
    values: dict[str, list[float]] = field(default_factory=dict)
    _taken: list[Tensor] = field(default_factory=list)
    _first: int = 0

    def take(self, pictures: Tensor) -> None:
        """The next pictures [t, 3, S, S]."""
        self._taken.append(pictures)
        length = WINDOW_S * FPS
        if sum(map(len, self._taken)) < length:
            return
        whole = torch.cat(self._taken)
        self._taken = [whole[length:]]
        motion = self.motion[self._first : self._first + length]
        self._first += length
        if len(motion) == length:
            for name, value in values_of(self.person, whole[:length], motion).items():
                self.values.setdefault(name, []).append(value)

    def lines(self) -> Lines:
        """A line for each value."""
        hours = WINDOW_S / 3600
        lines = []
        for name, values in self.values.items():
            slope, interval = trend(values)
            ends = max(1, 60 // WINDOW_S)
            lines.append(
                {
                    "value": name,
                    "first_minute": float(np.mean(values[:ends])),
                    "last_minute": float(np.mean(values[-ends:])),
                    "slope_per_hour": slope / hours,
                    "interval_95": interval / hours,
                    "trend": "none" if abs(slope) <= interval else "TREND",
                    "windows": len(values),
                }
            )
        return lines


def values_of(person: int, pictures: Tensor, motion: Tensor) -> dict[str, float]:
    """Of a window: lips, likeness, colour, sharpness, and what is left of the details."""
    openings = mouth_openings(identity(person), pictures)
    chosen = torch.arange(0, len(pictures), max(1, len(pictures) // LOOKED_AT))
    made, drawn = pictures[chosen], draw(identity(person), motion[chosen], SIZE)
    shirt = slice(int(0.9 * SIZE), None)
    ears = slice(int(0.54 * SIZE), int(0.66 * SIZE))  # where ear-rings are
    return {
        "correlation": synchronisation(openings, motion).correlation,
        "psnr_db": psnr(made, drawn),
        **{f"{c}_of_255": float(255 * (made - drawn)[:, i].mean()) for i, c in enumerate("rgb")},
        "sharpness": edges(made) / edges(drawn),
        "shirt": contrast(made[:, :, shirt], drawn[:, :, shirt]),
        "ears": contrast(made[:, :, ears], drawn[:, :, ears]),
    }


def edges(pictures: Tensor) -> float:
    """How much pixels differ from their neighbours."""
    return float((pictures - F.avg_pool2d(pictures, 3, 1, 1)).abs()[..., 1:-1, 1:-1].mean())


def contrast(made: Tensor, drawn: Tensor) -> float:
    """How much of what a pixel differs from the mean is there: 1 all, 0 nothing."""
    made, drawn = made - made.mean((2, 3), keepdim=True), drawn - drawn.mean((2, 3), keepdim=True)
    return float((made * drawn).sum() / drawn.square().sum())


def trend(values: list[float]) -> tuple[float, float]:
    """Least squares: the slope per value, and half its 95 % confidence interval."""
    if len(values) < 3:
        return 0.0, float("inf")
    x = np.arange(len(values)) - (len(values) - 1) / 2
    y = np.array(values) - np.mean(values)
    slope = float((x * y).sum() / (x * x).sum())
    spread = float(np.sqrt(((y - slope * x) ** 2).sum() / (len(values) - 2) / (x * x).sum()))
    return slope, student_95(len(values) - 2) * spread


def student_95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by the Cornish-Fisher expansion (1 % off at 3)."""
    z = 1.959964
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3
