"""A session as the video service of a Pipecat pipeline (`liveact[pipecat]`).

    … ─► TTS ─► LiveActVideoService ─► transport.output()

It stands between the TTS and the transport: speech goes into the session and comes out again with
the picture that belongs to it. What ends with the speech, its TTSStoppedFrame, is held back until
the last of it has come out, so that the bot is speaking exactly as long as it is heard.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import numpy as np
from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InterruptionFrame,
    OutputImageRawFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
from pipecat.services.ai_service import AIService
from pipecat.services.settings import ServiceSettings

from liveact import arguments
from liveact.audio.samples import as_int16
from liveact.engine import Engine
from liveact.errors import InputError, LiveActError
from liveact.session import pacing
from liveact.session.session import Session

SAMPLE_RATE_HZ = 24_000  # of Pipecat's pipelines, unless they are told otherwise
DRAIN_S = 10.0  # that the end of a pipeline waits for, beyond the length of what is to be said


class LiveActVideoService(AIService):
    """Makes video of the speech that flows by: takes TTSAudioRawFrames of any rate, and pushes them
    again at `sample_rate`, mono, each with an OutputImageRawFrame.

    Pictures also come while nobody speaks. An InterruptionFrame drops what was not pushed yet. An
    EndFrame waits until all is said, a CancelFrame does not. A failure of the session is pushed as
    an ErrorFrame, which makes the service unusable; the engine is not touched.

    Metrics: TTFB is the time from the first speech of an answer to its first frame.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        size: tuple[int, int] = (512, 512),
        fps: int = 20,
        sample_rate: int = SAMPLE_RATE_HZ,
        name: str | None = None,
        **options: Any,
    ) -> None:
        """options: `image`, `prompt` and others of `Engine.open_session`. The session is opened
        when the pipeline is set up. Raises InputError for `size` and `fps`."""
        super().__init__(settings=ServiceSettings(model=None), name=name)
        self._engine = engine
        self._width, self._height = arguments.size("size", size)
        self._fps = arguments.whole_number("fps", fps, 1)  # Pipecat's rates are whole numbers
        self._sample_rate = sample_rate
        self._options = options
        self._session: Session | None = None
        self._error: LiveActError | None = None  # of opening, which is too early to push it
        self._pacer: pacing.Pacer | None = None
        self._pushing: asyncio.Task[None] | None = None
        # One frame is pushed whole, or not at all where an interruption is pushed.
        self._order = asyncio.Lock()
        self._epoch = 0  # interruptions so far
        self._format: tuple[int, int] | None = None  # of the utterance that is being said
        self._stopped: deque[tuple[int, TTSStoppedFrame]] = deque()  # utterance, what ends with it

    def transport_params(self) -> dict[str, Any]:
        """The `TransportParams` that go with the service, for any transport. With others, pictures
        would be scaled, or shown too fast or too slow."""
        return {
            "video_out_enabled": True,
            "video_out_is_live": True,  # every picture once, when it comes
            "video_out_width": self._width,
            "video_out_height": self._height,
            "video_out_framerate": self._fps,
            "audio_out_enabled": True,
            "audio_out_sample_rate": self._sample_rate,
            "audio_out_channels": 1,
        }

    def can_generate_metrics(self) -> bool:
        """See the class."""
        return True

    # ---------------------------------------------------------------------------- its life

    # Pipecat's own processors narrow the argument in the same way.
    async def setup(self, setup: FrameProcessorSetup) -> None:  # type: ignore[override]
        """Opens the session: the slow part, beside the other processors'."""
        await super().setup(setup)
        try:
            self._session = await self._engine.aopen_session(
                size=(self._width, self._height),
                fps=self._fps,
                sample_rate=self._sample_rate,
                channels=1,
                idle="silence",
                **self._options,
            )
        except LiveActError as error:
            self._error = error

    async def start(self, frame: StartFrame) -> None:
        """Begins to show it."""
        await super().start(frame)
        if self._session is None:
            await self._fail(self._error)
            return
        self._pacer = pacing.Pacer(self._session)
        self._pushing = self.create_task(self._push_frames(self._pacer))

    async def stop(self, frame: EndFrame) -> None:
        """Waits until all is said, for a bounded time, and closes the session."""
        await super().stop(frame)
        if self._session is not None and self._pushing is not None and self.is_usable:
            try:
                limit_s = self._session.backlog_s + DRAIN_S
                await self._session.aend_of_audio()
                await asyncio.wait({self._pushing}, timeout=limit_s)
            except LiveActError as error:
                await self._fail(error)
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        """Closes the session at once."""
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        """Closes the session, if nothing has before."""
        await super().cleanup()
        await self._close()

    async def _close(self) -> None:
        pushing, self._pushing = self._pushing, None
        session, self._session = self._session, None
        if pushing is not None:
            await self.cancel_task(pushing)
        if session is not None:
            await session.aclose()

    async def _fail(self, error: LiveActError | None) -> None:
        await self.push_error(str(error), exception=error, force_treat_as_permanent=True)

    # ---------------------------------------------------------------------- what goes in

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Takes speech and its end, passes everything else on."""
        await super().process_frame(frame, direction)
        if direction is FrameDirection.DOWNSTREAM and self._session is not None:
            if isinstance(frame, TTSAudioRawFrame):
                await self._say(self._session, frame)
                return
            if isinstance(frame, TTSStoppedFrame):
                await self._end_utterance(self._session, frame)
                return
        if isinstance(frame, InterruptionFrame):
            await self._interrupt(frame, direction)
            return
        await self.push_frame(frame, direction)

    async def _say(self, session: Session, frame: TTSAudioRawFrame) -> None:
        sound = (frame.sample_rate, frame.num_channels)
        try:
            if self._format is None:
                await self.start_ttfb_metrics()
            elif self._format != sound:  # goes on as an utterance of its own
                await session.aend_of_utterance()
            self._format = sound
            whole = len(frame.audio) - len(frame.audio) % (2 * frame.num_channels)
            pcm = np.frombuffer(frame.audio[:whole], np.int16).reshape(-1, frame.num_channels)
            await session.apush_audio(pcm, frame.sample_rate, timeout_s=None)
        except InputError as error:
            await self.push_error(str(error), exception=error)
        except LiveActError:
            pass  # who shows it has it too, and reports it

    async def _end_utterance(self, session: Session, frame: TTSStoppedFrame) -> None:
        self._format = None
        try:
            number = await session.aend_of_utterance()
        except LiveActError:
            number = None
        if number is None:  # nothing was said
            await self.push_frame(frame)
        else:
            self._stopped.append((number, frame))

    async def _interrupt(self, frame: InterruptionFrame, direction: FrameDirection) -> None:
        self._epoch += 1
        self._format = None
        self._stopped.clear()
        try:
            if self._pacer is not None and self._session is not None:
                await self._pacer.interrupt()
        except LiveActError:
            pass
        async with self._order:
            await self.push_frame(frame, direction)

    # ---------------------------------------------------------------------- what comes out

    async def _push_frames(self, pacer: pacing.Pacer) -> None:
        """Every frame when it is due."""
        try:
            while True:
                frame = await pacer.next_frame()
                if frame is None:
                    break
                epoch = self._epoch  # from here on, an interruption makes it stale
                async with self._order:
                    if epoch == self._epoch or not frame.speech:
                        await self._push(frame)
        except LiveActError as error:
            await self._fail(error)
        finally:
            await self._push_stopped(None)

    async def _push(self, frame: pacing.Frame) -> None:
        height, width, _ = frame.picture.shape
        await self.push_frame(OutputImageRawFrame(frame.picture.tobytes(), (width, height), "RGB"))
        if frame.speech:
            await self.stop_ttfb_metrics()
            sound = as_int16(frame.pcm).tobytes()
            await self.push_frame(TTSAudioRawFrame(sound, frame.sample_rate_hz, 1))
        await self._push_stopped(frame)

    async def _push_stopped(self, frame: pacing.Frame | None) -> None:
        """What ends with a frame, or before it; without a frame, all that is left."""
        while self._stopped and (frame is None or frame.ends(self._stopped[0][0])):
            _, stopped = self._stopped.popleft()
            await self.push_frame(stopped)
