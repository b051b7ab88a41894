"""From phonemes to the shape of a mouth: targets, co-articulation, smoothing.

A shape has four numbers. `opening` 0 (lips together) to 1 (as wide as a loud "a"); `width` -1 (as
round as "u") to 1 (as broad as "i"); `press` 0 to 1, how firmly the lips are pressed together
(p, b, m); `teeth` 0 to 1, how much of the upper teeth shows.

The classes are the usual ones of lip synchronisation (Preston Blair's chart, and the dominance of
labials over their neighbours in Cohen and Massaro's "Modeling coarticulation in synthetic visual
speech", 1993); the numbers are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.data.espeak import FloatArray, Phoneme

SHAPE = ("opening", "width", "press", "teeth")
LIPS_TOGETHER = frozenset("pbm")
_REST = (0.0, 0.0, 0.0, 0.0)

# First character of the IPA symbol -> shape.
_SHAPES: dict[str, tuple[float, float, float, float]] = {}
for _symbols, _shape in (
    ("pbm", (0.0, -0.1, 1.0, 0.0)),
    ("fvɱʋ", (0.14, 0.15, 0.3, 1.0)),
    ("sz", (0.16, 0.5, 0.0, 0.9)),
    ("ʃʒɕʑ", (0.24, -0.55, 0.0, 0.8)),
    ("θð", (0.26, 0.2, 0.0, 0.6)),
    ("tdnɾɲ", (0.24, 0.25, 0.0, 0.5)),
    ("lɫʎ", (0.34, 0.2, 0.0, 0.4)),
    ("kgɡŋxɣçχʁhɦʔq", (0.34, 0.1, 0.0, 0.2)),
    ("rɹɻʀ", (0.28, -0.35, 0.0, 0.2)),
    ("wʍɥ", (0.16, -0.95, 0.0, 0.0)),
    ("j", (0.26, 0.7, 0.0, 0.4)),
    ("iɪɨ", (0.34, 0.9, 0.0, 0.5)),
    ("yʏ", (0.22, -0.8, 0.0, 0.0)),
    ("eɛ", (0.58, 0.65, 0.0, 0.4)),
    ("æ", (0.85, 0.6, 0.0, 0.4)),
    ("aɐɑ", (1.0, 0.2, 0.0, 0.2)),
    ("ʌəɜɚɝɤ", (0.56, 0.05, 0.0, 0.2)),
    ("øœɵ", (0.46, -0.6, 0.0, 0.0)),
    ("oɔɒ", (0.70, -0.7, 0.0, 0.0)),
    ("uʊɯ", (0.30, -0.95, 0.0, 0.0)),
):
    _SHAPES |= dict.fromkeys(_symbols, _shape)

_LABIAL_PULL = 4.0  # weight of sounds that the lips make, against 1 of the others
_REACH_S = 0.035  # deviation of the window in which neighbours blend


def shapes_of(symbol: str) -> list[tuple[float, float, float, float]]:
    """The mouth of one phoneme, from its beginning to its end; a diphthong has two.

    At rest for a pause and for a sound that is not known.
    """
    return [_SHAPES[character] for character in symbol if character in _SHAPES] or [_REST]


def mouth_track(phonemes: Sequence[Phoneme], times_s: FloatArray) -> FloatArray:
    """Shape of the mouth at each time: [n] seconds -> [n, 4] in the order of `SHAPE`.

    Each time sees the phonemes around it, weighted by a Gaussian and by how much a sound insists on
    its shape. Lips that a p, b or m closes are closed in the middle of it, whatever is beside it.
    """
    step_s = 0.005
    grid = np.arange(0.0, float(times_s.max(initial=0.0)) + 0.3, step_s)
    target = np.zeros((len(grid), len(SHAPE)))
    pull = np.full(len(grid), 0.7)
    for phoneme in phonemes:
        inside = (grid >= phoneme.start_s) & (grid < phoneme.stop_s)
        shapes = np.array(shapes_of(phoneme.symbol))
        passed = (grid[inside] - phoneme.start_s) / (phoneme.stop_s - phoneme.start_s)
        target[inside] = shapes[(passed * len(shapes)).astype(int).clip(0, len(shapes) - 1)]
        if phoneme.symbol[:1] in "pbmfvw" and phoneme.symbol:
            pull[inside] = _LABIAL_PULL
        elif phoneme.symbol:
            pull[inside] = 1.0
    taps = np.arange(-30, 31) * step_s
    kernel = np.exp(-0.5 * (taps / _REACH_S) ** 2)
    weight = np.convolve(pull, kernel, mode="same")
    smooth = np.stack(
        [np.convolve(target[:, i] * pull, kernel, mode="same") / weight for i in range(len(SHAPE))],
        axis=1,
    )
    _close_lips(smooth, phonemes, grid)
    return np.stack(
        [np.interp(times_s, grid, smooth[:, i]) for i in range(len(SHAPE))], axis=1
    ).astype(np.float32)


def _close_lips(smooth: np.ndarray, phonemes: Sequence[Phoneme], grid: np.ndarray) -> None:
    """Takes the opening to zero around the middle of each p, b, m; in place."""
    for phoneme in phonemes:
        if phoneme.symbol[:1] not in LIPS_TOGETHER or not phoneme.symbol:
            continue
        middle = (phoneme.start_s + phoneme.stop_s) / 2
        reach = max(phoneme.stop_s - phoneme.start_s, 0.06) / 2
        # A frame is 50 ms, so that lips closed for less would often not be seen.
        distance = np.abs(grid - middle) / (reach + 0.02)
        openness = np.clip((distance - 0.8) / 0.8, 0.0, 1.0)
        smooth[:, 0] *= openness
        smooth[:, 3] *= openness
        smooth[:, 2] = np.maximum(smooth[:, 2], 1 - openness)
