"""What a face does while it speaks, as numbers per video frame.

All of it follows from the speech, from what was heard in the last second and at most two frames
ahead: a regression on the audio blurs whatever it cannot predict. Blinks follow the end of a
phrase; head and brows follow how open the mouth was in the last moments. What the prompt asks for
(`expressions`) comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.data.espeak import FloatArray, Phoneme
from training.data.expressions import expression_track
from training.data.visemes import mouth_track

SPOKEN = ("opening", "width", "press", "teeth", "blink", "brow", "nod")  # follow from the speech
COLUMNS = (*SPOKEN, "smile", "sad", "bob", "hand", "wave")
FPS = 20
_BLINK = (0.6, 1.0, 0.55, 0.1)  # lids over four frames: 0.2 s


@dataclass(frozen=True)
class Motion:
    """values [frames, 12] in the order of `COLUMNS`, about 0 to 1 (width, wave: -1 to 1)."""

    values: FloatArray

    def column(self, name: str) -> FloatArray:
        """[frames]"""
        return self.values[:, COLUMNS.index(name)]


def motion_of(
    phonemes: tuple[Phoneme, ...], frames: int, expressions: Sequence[str] = ("neutral",)
) -> Motion:
    """The motion of `frames` frames at 20 per second, from phonemes timed in seconds.

    A frame shows the middle of its 50 ms. expressions: of each block; the last one lasts.
    """
    times_s = ((np.arange(frames) + 0.5) / FPS).astype(np.float32)
    mouth = mouth_track(phonemes, times_s)
    spoken = _spoken(phonemes, times_s)
    effort = _smoothed(mouth[:, 0], 6.0)
    values = np.zeros((frames, len(COLUMNS)), np.float32)
    values[:, :4] = mouth
    values[:, 4] = _blinks(spoken)
    values[:, 5] = np.clip(2.0 * _smoothed(mouth[:, 0], 4.0) - 0.2, 0.0, 1.0)
    values[:, 6] = effort
    values[:, len(SPOKEN) :] = expression_track(expressions, frames)
    return Motion(values)


def _spoken(phonemes: tuple[Phoneme, ...], times_s: FloatArray) -> np.ndarray:
    """[n] bool: whether a sound is spoken at each time."""
    spoken = np.zeros(len(times_s), bool)
    for phoneme in phonemes:
        if phoneme.symbol:
            spoken |= (times_s >= phoneme.start_s) & (times_s < phoneme.stop_s)
    return spoken


def _blinks(spoken: np.ndarray) -> FloatArray:
    """A blink two frames into a pause of at least 0.15 s, none within 0.8 s of the one before."""
    lids = np.zeros(len(spoken), np.float32)
    last = -100
    for frame in range(1, len(spoken)):
        pause = spoken[frame : frame + 3]
        if spoken[frame - 1] and len(pause) == 3 and not pause.any() and frame - last >= 16:
            part = lids[frame + 2 : frame + 2 + len(_BLINK)]
            part[:] = _BLINK[: len(part)]
            last = frame
    return lids


def _smoothed(track: FloatArray, frames: float) -> FloatArray:
    """A decaying mean of the past, `frames` long; the future is not looked at."""
    taps = np.exp(-np.arange(int(4 * frames)) / frames)
    padded = np.concatenate([np.zeros(len(taps) - 1, np.float32), track])
    return np.convolve(padded, taps / taps.sum(), mode="valid").astype(np.float32)
