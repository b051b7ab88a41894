"""A session as the avatar of a LiveKit agent (`liveact[livekit]`).

    AudioReceiver ─► AvatarRunner ─► push_audio ─► session ─► Pacer ─► AvatarRunner ─► room

A segment of LiveKit, what an agent says without a pause, is an utterance of the session. The runner
counts what was heard from the audio frames it is given, and tells the agent that a segment is over
when it is given an AudioSegmentEnd. So idling comes as pictures alone, and every segment gets its
AudioSegmentEnd, also one that is empty, was interrupted, or was lost with the session.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import numpy as np
from livekit import rtc
from livekit.agents.voice.avatar import (
    AudioReceiver,
    AudioSegmentEnd,
    AvatarOptions,
    AvatarRunner,
    VideoGenerator,
)

from liveact import arguments
from liveact.audio.samples import as_int16
from liveact.engine import Engine
from liveact.errors import LiveActError
from liveact.session.pacing import Frame, Pacer
from liveact.session.session import Session

SAMPLE_RATE_HZ = 48_000  # WebRTC's own
CLEARED_S = 0.5  # a consumer that takes longer to come back is not waited for

Item = rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd


class LiveActVideoGenerator(VideoGenerator):
    """What an `AvatarRunner` takes its pictures and its sound from. Made by `open`.

    All methods belong to the event loop that opened it, and none holds it up: where
    `max_backlog_s` of sound wait, `push_audio` waits for space, and the runner with it.

    Attributes:
        session: belongs to the generator, which closes it.
        options: what the runner has to be told of it.
    """

    def __init__(self, session: Session, options: AvatarOptions) -> None:
        """options: as the session was opened, with `idle="silence"`."""
        self.session = session
        self.options = options
        self._pacer = Pacer(session)
        self._runner: AvatarRunner | None = None
        self._segments: deque[int] = deque()  # ended, and not heard to their end: utterances
        self._ends = 0  # AudioSegmentEnds that are to go out before anything else
        self._open = False  # a segment has begun, and has not ended
        self._cleared = False  # it was cleared, and its end has not been pushed yet
        self._format: tuple[int, int] | None = None  # sample rate and channels of the utterance
        self._epoch = 0  # how often it was cleared
        self._waiting: asyncio.Task[Frame | None] | None = None  # for the next frame
        self._wake = asyncio.Event()  # there are ends to hand out
        self._settled = asyncio.Event()  # there are none, and the consumer waits for a frame
        self._settled.set()

    @classmethod
    async def open(
        cls,
        engine: Engine,
        *,
        size: tuple[int, int] = (512, 512),
        fps: float = 20,
        sample_rate: int = SAMPLE_RATE_HZ,
        channels: int = 1,
        **options: Any,
    ) -> LiveActVideoGenerator:
        """A session that idles, as `Engine.aopen_session` opens it, and its generator.

        sample_rate, channels: of the sound that comes out; what goes in may differ.
        """
        session = await engine.aopen_session(
            size=size,
            fps=fps,
            sample_rate=sample_rate,
            channels=channels,
            idle="silence",
            **options,
        )
        width, height = size
        return cls(session, AvatarOptions(width, height, float(fps), sample_rate, channels))

    async def start(self, room: rtc.Room, audio_recv: AudioReceiver) -> AvatarRunner:
        """Shows the session in a room: a runner with the right options, which `aclose` closes."""
        self._runner = AvatarRunner(
            room, audio_recv=audio_recv, video_gen=self, options=self.options
        )
        await self._runner.start()
        return self._runner

    async def aclose(self) -> None:
        """Closes the runner, where `start` made one, and the session. Any number of times."""
        runner, self._runner = self._runner, None
        try:
            if runner is not None:
                await runner.aclose()
        finally:
            await self.session.aclose()

    # ------------------------------------------------------------------------ what goes in

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """The next sound of a segment, or its end. Raises SessionError."""
        if isinstance(frame, AudioSegmentEnd):
            await self._end_segment()
            return
        epoch, sound = self._epoch, (frame.sample_rate, frame.num_channels)
        if self._open and sound != self._format:  # goes on as an utterance of its own
            await self.session.aend_of_utterance()
        if epoch != self._epoch:
            return
        self._open, self._cleared, self._format = True, False, sound
        pcm = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
        await self.session.apush_audio(pcm, frame.sample_rate, timeout_s=None)

    async def clear_buffer(self) -> None:
        """Stops speaking. Of the segments so far only their ends are handed out from this call on;
        it returns when the consumer has those, and is done with the frame that it was given."""
        self._epoch += 1
        if self._waiting is not None and self._waiting.done():
            self._waiting = None  # it came just before
        ended = len(self._segments) + self._open
        self._segments.clear()
        self._cleared = self._cleared or self._open
        self._open = False
        self._end_now(ended)
        await self._pacer.interrupt()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), CLEARED_S)

    async def _end_segment(self) -> None:
        epoch, was_open, was_cleared = self._epoch, self._open, self._cleared
        self._open = self._cleared = False
        if not was_open and was_cleared:
            return  # its end has gone out when it was cleared
        number = await self.session.aend_of_utterance() if was_open else None
        if was_open and epoch != self._epoch:
            self._end_now(1)  # cleared meanwhile, when it was neither open nor ended
        elif number is None:
            self._end_now(1)
        else:
            self._segments.append(number)

    def _end_now(self, segments: int) -> None:
        """That so many segments are over goes out next."""
        if segments:
            self._ends += segments
            self._settled.clear()
            self._wake.set()

    # ------------------------------------------------------------------------ what comes out

    def __aiter__(self) -> AsyncIterator[Item]:
        return self._items()

    async def _items(self) -> AsyncGenerator[Item, None]:
        """Each frame when it is due: its picture, then its sound if it speaks."""
        try:
            while (frame := await self._next_frame_or_end()) is not None:
                self._settled.clear()
                if isinstance(frame, AudioSegmentEnd):
                    yield frame
                    continue
                epoch = self._epoch
                yield self._video(frame)
                if frame.speech and epoch == self._epoch:
                    yield self._audio(frame)
                while self._segments and frame.ends(self._segments[0]):
                    self._segments.popleft()
                    yield AudioSegmentEnd()
        finally:
            if self._waiting is not None:
                self._waiting.cancel()

    async def _next_frame_or_end(self) -> Frame | AudioSegmentEnd | None:
        """What is handed out next; None when nothing comes any more. Raises SessionError, but only
        after the ends of all segments."""
        while not self._ends:
            self._wake.clear()
            self._settled.set()
            if self._waiting is None:
                self._waiting = asyncio.ensure_future(self._pacer.next_frame())
            waking = asyncio.ensure_future(self._wake.wait())
            try:
                await asyncio.wait({self._waiting, waking}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waking.cancel()
            if self._waiting is None or not self._waiting.done():
                continue
            lost = len(self._segments) + self._open
            if lost and (self._waiting.exception() or self._waiting.result() is None):
                self._segments.clear()
                self._open = False
                self._end_now(lost)
                break
            frame, self._waiting = self._waiting, None
            return frame.result()
        self._ends -= 1
        return AudioSegmentEnd()

    def _video(self, frame: Frame) -> rtc.VideoFrame:
        height, width, _ = frame.picture.shape
        data = frame.picture.tobytes()
        return rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, data)

    def _audio(self, frame: Frame) -> rtc.AudioFrame:
        samples, channels = frame.pcm.shape
        data = as_int16(frame.pcm).tobytes()
        return rtc.AudioFrame(data, frame.sample_rate_hz, channels, samples)


def load_of(engine: Engine, max_sessions: int) -> Callable[[], float]:
    """The `load_fnc` of an `AgentServer` whose jobs open their sessions on `engine`: the share of
    `max_sessions` that is open; 1 also where the engine is closed."""
    most = arguments.whole_number("max_sessions", max_sessions, 1)

    def load() -> float:
        try:
            return min(1.0, len(engine.stats().sessions) / most)
        except LiveActError:
            return 1.0

    return load
