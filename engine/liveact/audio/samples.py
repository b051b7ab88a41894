"""Samples of a stream by their absolute index, and the check of what a caller pushes."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from liveact.audio.tempo import FloatArray
from liveact.errors import InputError

MAX_CHANNELS = 64
PEAK_LIMIT = 32_768.0  # 16-bit samples handed over as float are let through; beyond is garbage


class SampleStore:
    """Samples [n, *shape] by absolute index, appended at the back and dropped at the front.

    Attributes:
        start: index of the oldest sample still held.
        stop: index after the newest.
    """

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        self._pieces: deque[FloatArray] = deque()
        self.start = 0
        self.stop = 0

    def append(self, piece: FloatArray) -> None:
        """piece [n, *shape]; kept, not copied."""
        self._pieces.append(piece)
        self.stop += len(piece)

    def drop_before(self, index: int) -> None:
        """Forgets the pieces that end at or before `index`."""
        while self._pieces and self.start + len(self._pieces[0]) <= index:
            self.start += len(self._pieces.popleft())

    def read(self, start: int, stop: int) -> FloatArray:
        """A copy of [start, stop), start ≥ self.start; zeros where nothing was appended yet."""
        out = np.zeros((stop - start, *self._shape), np.float32)
        at = self.start
        for piece in self._pieces:
            if at >= stop:
                break
            if at + len(piece) > start:
                part = piece[max(0, start - at) : stop - at]
                first = max(0, at - start)
                out[first : first + len(part)] = part
            at += len(piece)
        return out


def as_float(pcm: np.ndarray) -> FloatArray:
    """PCM [n] or [n, channels], float32 or int16 → float32 [n, channels]. Raises InputError."""
    if pcm.dtype not in (np.float32, np.int16) or pcm.ndim not in (1, 2):
        raise InputError(
            "pcm: expected float32 or int16 of shape [n] or [n, channels], "
            f"found {pcm.dtype} of shape {list(pcm.shape)}"
        )
    samples = pcm[:, None] if pcm.ndim == 1 else pcm
    if not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise InputError(
            f"pcm: expected [n, channels] with 1 to {MAX_CHANNELS} channels, "
            f"found {list(pcm.shape)}"
        )
    if pcm.dtype == np.int16:
        return samples.astype(np.float32) / np.float32(32_768)
    if samples.size and not np.abs(samples).max() <= PEAK_LIMIT:  # also catches NaN
        raise InputError(f"pcm: expected finite samples within ±{PEAK_LIMIT:g}, found others")
    return samples


def as_int16(pcm: FloatArray) -> npt.NDArray[np.int16]:
    """float32 in [−1, 1], of any shape → int16; the inverse of what `as_float` does with int16.
    Louder sound is clipped."""
    return np.rint(pcm * 32_768.0).clip(-32_768, 32_767).astype(np.int16)
