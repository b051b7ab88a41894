"""A microphone that is left open: what is said into it becomes utterances of a session."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt

from liveact.errors import BacklogFull
from liveact.serve.gate import Gated, VoiceGate
from liveact.serve.live import LiveSession

PIECE_S = 0.02  # the gate looks at


class Microphone:
    """Feeds a session with what is said. What the session cannot take is lost, and an event says
    so."""

    def __init__(self, live: LiveSession, sample_rate_hz: int) -> None:
        self._live, self._sample_rate_hz = live, sample_rate_hz
        self._gate = VoiceGate(sample_rate_hz)
        self._is_full = False  # the session could not take what is being said

    async def hear(self, pcm: npt.NDArray[np.float32]) -> None:
        """What comes next: float32 [n, channels], always with as many channels. Raises
        SessionError."""
        step = max(1, round(PIECE_S * self._sample_rate_hz))
        for start in range(0, len(pcm), step):
            await self._feed(self._gate.push(pcm[start : start + step]))

    async def _feed(self, said: Gated) -> None:
        try:
            if len(said.pcm) and not self._is_full:
                await self._live.feed(said.pcm, self._sample_rate_hz)
        except BacklogFull as error:
            self._is_full = True  # until the next utterance
            self._live.tell({"type": "error", "code": "backlog_full", "message": str(error)})
        if said.ended:
            self._is_full = False
            with contextlib.suppress(BacklogFull):
                self._live.end_of_utterance()
