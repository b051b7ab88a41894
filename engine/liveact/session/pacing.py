"""A session on a wall clock: one picture at a time, each with its sound and the moment it is due.

What a live transport needs (WebRTC, LiveKit, Pipecat, a WebSocket): no burst after a delay, no
hole in the timeline, and nothing of an interrupted utterance after the interruption.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from liveact.session.chunk import BlockTimings, Chunk, Interruption
from liveact.session.session import Session


@dataclass(frozen=True)
class Frame:
    """One picture, and the sound that plays while it is shown.

    Attributes:
        number: counts from 0, without a hole.
        picture: uint8 [H, W, 3] RGB.
        pcm: float32 [m, channels] at sample_rate_hz. Over many frames m is exactly rate/fps.
        sample_rate_hz: of `pcm`; the same for all frames of a session, as are the channels.
        due_s: when it is to be shown, of the event loop's clock.
        utterance, speech, last_of_utterance: as in `Chunk`; of the frames of a chunk, the last one
            is `last_of_utterance`.
        repeated: nothing new was there in time: the picture before, once more, and silence.
        timings: of a whole block, with its last frame; else None.
    """

    number: int
    picture: npt.NDArray[np.uint8]
    pcm: npt.NDArray[np.float32]
    sample_rate_hz: int
    due_s: float
    utterance: int
    speech: bool
    last_of_utterance: bool
    repeated: bool = False
    timings: BlockTimings | None = None

    def ends(self, utterance: int) -> bool:
        """Whether nothing of an utterance comes after it."""
        return utterance < self.utterance or (
            utterance == self.utterance and self.last_of_utterance
        )


@dataclass(frozen=True)
class _Piece:
    """A frame that has no moment yet."""

    picture: npt.NDArray[np.uint8]
    pcm: npt.NDArray[np.float32]
    chunk: Chunk
    last_of_utterance: bool
    timings: BlockTimings | None


class Pacer:
    """Hands the frames of a session out when they are due: frame n at start + n/fps.

    The clock starts with the first frame. Where its caller comes back more than `late_s` late, it
    begins anew there, so that nothing is hurried afterwards. Where the session has nothing in time,
    the last picture is repeated with silence. A chunk is taken at most a frame before it is due.

    One task at a time may ask for frames; `interrupt` may be called by another task of the loop.

    Attributes:
        repeated: frames so far that were repeated.
        underruns: how often that began although the session was making something.
    """

    def __init__(self, session: Session, *, late_s: float | None = None) -> None:
        """late_s: a caller that is no later catches up, for receivers that have a buffer; None for
        one frame, which is hardly noticed."""
        self._session = session
        self._period_s = float(1 / session.fps)
        self._late_s = self._period_s if late_s is None else late_s
        self._number = 0
        self._start_s: float | None = None  # when frame 0 was due
        self._pieces: deque[_Piece] = deque()
        self._last: _Piece | None = None  # handed out last
        self._repeating = False
        self._interrupting = 0
        self.repeated = 0
        self.underruns = 0

    def __aiter__(self) -> AsyncIterator[Frame]:
        return self

    async def __anext__(self) -> Frame:
        frame = await self.next_frame()
        if frame is None:
            raise StopAsyncIteration
        return frame

    async def next_frame(self) -> Frame | None:
        """The next frame, when it is due; None after the last. A caller that is cancelled has lost
        none. Raises SessionError as `Session.next_chunk`."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._pieces and not await self._take():
                return None
            due_s = self._due_s(loop.time())
            await asyncio.sleep(due_s - loop.time())
            # An interruption may have come meanwhile; then the picture stands still for now.
            if self._pieces:
                return self._shown(self._pieces.popleft(), due_s)
            if loop.time() >= due_s and (frame := self._still(due_s)) is not None:
                return frame

    async def interrupt(self) -> Interruption:
        """`Session.ainterrupt`; of what was interrupted no frame is handed out from now on.

        `delivered_s` counts what was taken: a chunk more than was handed out, at most.
        """
        self._pieces.clear()
        self._interrupting += 1
        try:
            return await self._session.ainterrupt()
        finally:
            self._interrupting -= 1

    async def _take(self) -> bool:
        """Waits for a chunk until the next frame is due, for ever where nothing was shown yet;
        False when there is none any more."""
        loop = asyncio.get_running_loop()
        left_s = None
        if self._last is not None:
            left_s = max(0.0, self._due_s(loop.time()) - loop.time())
        try:
            chunk = await self._session.anext_chunk(left_s)
        except TimeoutError:
            return True
        if chunk is None:
            return False
        if not (self._interrupting and chunk.speech):  # taken in the moment of an interruption
            self._pieces.extend(_cut(chunk))
        return True

    def _due_s(self, now_s: float) -> float:
        """When the next frame is due; begins the clock, anew where it is too late."""
        if self._start_s is None:
            self._start_s = now_s
        due_s = self._start_s + self._number * self._period_s
        if now_s > due_s + self._late_s:
            self._start_s += now_s - due_s
            return now_s
        return due_s

    def _shown(self, piece: _Piece, due_s: float) -> Frame:
        self._last, self._repeating = piece, False
        self._number += 1
        return Frame(
            self._number - 1,
            piece.picture,
            piece.pcm,
            piece.chunk.sample_rate_hz,
            due_s,
            piece.chunk.utterance,
            piece.chunk.speech,
            piece.last_of_utterance,
            timings=piece.timings,
        )

    def _still(self, due_s: float) -> Frame | None:
        """The last picture with silence; None before the first."""
        last = self._last
        if last is None:
            return None
        if not self._repeating and self._session.lag_s > 0:
            self.underruns += 1
        self._repeating = True
        rate_hz = last.chunk.sample_rate_hz
        before, after = (int((self.repeated + i) * rate_hz / self._session.fps) for i in (0, 1))
        self.repeated += 1
        self._number += 1
        return Frame(
            self._number - 1,
            last.picture,
            np.zeros((after - before, last.pcm.shape[1]), np.float32),
            rate_hz,
            due_s,
            last.chunk.utterance,
            speech=False,
            last_of_utterance=False,
            repeated=True,
        )


def _cut(chunk: Chunk) -> Iterator[_Piece]:
    """The frames of a chunk; together they have its sound."""
    count, samples = len(chunk.frames), len(chunk.pcm)
    for i, picture in enumerate(chunk.frames):
        pcm = chunk.pcm[i * samples // count : (i + 1) * samples // count]
        last = i == count - 1
        timings = chunk.timings.block if last else None
        yield _Piece(picture, pcm, chunk, chunk.last_of_utterance and last, timings)
