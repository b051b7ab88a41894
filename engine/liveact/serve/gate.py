"""Which part of a microphone is speech: an energy gate with a hangover."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

QUIET_DBFS = -50.0  # softer is never speech
ABOVE_NOISE_DB = 10.0  # than the noise of the room
NOISE_RISE_DB_S = 3.0  # what stays this loud becomes noise; what is softer, at once
ATTACK_S = 0.04  # a click is shorter
PRE_ROLL_S = 0.2  # soft consonants before the first loud sound
HANGOVER_S = 0.7  # a pause between words is shorter

Samples = npt.NDArray[np.float32]


class Gated(NamedTuple):
    """What came through.

    Attributes:
        pcm: float32 [n, channels], empty while nobody speaks.
        ended: whether the utterance ends with it.
    """

    pcm: Samples
    ended: bool


class VoiceGate:
    """Takes the sound of a microphone piece by piece, of some 20 ms each, and lets speech through.

    It opens after ATTACK_S of sound that stands out from the noise, and then lets through the
    PRE_ROLL_S before it too. It closes after HANGOVER_S without such sound. Nothing between is cut
    out, so an utterance is as long as it took to say it.

    Attributes:
        open: whether somebody speaks.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        self.open = False
        self._rate_hz = sample_rate_hz
        self._noise_dbfs = QUIET_DBFS - ABOVE_NOISE_DB
        self._loud_s = 0.0  # of the last pieces, without a break
        self._soft_s = 0.0
        self._before: deque[Samples] = deque()  # the last pieces while it is closed
        self._before_s = 0.0

    def push(self, pcm: Samples) -> Gated:
        """pcm: float32 [n, channels], always with as many channels; n may differ."""
        seconds = len(pcm) / self._rate_hz
        if self._is_loud(pcm, seconds):
            self._loud_s, self._soft_s = self._loud_s + seconds, 0.0
        else:
            self._loud_s, self._soft_s = 0.0, self._soft_s + seconds
        if self.open:
            self.open = self._soft_s < HANGOVER_S
            return Gated(pcm, ended=not self.open)
        self._keep(pcm, seconds)
        if self._loud_s < ATTACK_S:
            return Gated(pcm[:0], ended=False)
        self.open = True
        spoken = np.concatenate(self._before)
        self._before.clear()
        self._before_s = 0.0
        return Gated(spoken, ended=False)

    def _is_loud(self, pcm: Samples, seconds: float) -> bool:
        """Whether it stands out from the noise, whose level follows."""
        power = float(np.mean(np.square(pcm))) if len(pcm) else 0.0
        level_dbfs = 10 * math.log10(power + 1e-12)
        self._noise_dbfs = min(level_dbfs, self._noise_dbfs + NOISE_RISE_DB_S * seconds)
        return level_dbfs > max(QUIET_DBFS, self._noise_dbfs + ABOVE_NOISE_DB)

    def _keep(self, pcm: Samples, seconds: float) -> None:
        self._before.append(pcm)
        self._before_s += seconds
        while self._before_s - len(self._before[0]) / self._rate_hz >= PRE_ROLL_S:
            self._before_s -= len(self._before.popleft()) / self._rate_hz
