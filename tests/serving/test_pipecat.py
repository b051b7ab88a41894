"""The service in a real pipeline, with a real output transport whose wire is a list."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    CancelFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    MetricsFrame,
    OutputAudioRawFrame,
    OutputImageRawFrame,
    StartFrame,
    TextFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.metrics.metrics import TTFBMetricsData
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams
from pipecat.workers.runner import WorkerRunner

from liveact.engine import Engine
from liveact.errors import InputError
from liveact.integrations.pipecat import LiveActVideoService
from liveact.session import pacing
from tests.support.paths import PORTRAIT
from tests.support.pipeline import speech
from tests.support.session import fail, stream_of

FPS = 20
RATE_HZ = 24_000
CHUNK_S = 4 / FPS  # an utterance ends in a frame whose chunk, of four, may end in silence
WRITE_S = 0.04  # what a transport takes at a time


def run(work: Coroutine[Any, Any, Any], limit_s: float = 60.0) -> Any:
    return asyncio.run(asyncio.wait_for(work, limit_s))


async def until(condition: Callable[[], bool], message: str, limit_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, message
        await asyncio.sleep(0.01)


class Wire(BaseOutputTransport):
    """An output transport that plays sound at its own pace, as one with a listener does.

    Attributes:
        pictures, sounds: what went out, each with its time; sound when it begins to be heard.
        sound_s: in all.
    """

    def __init__(self, params: TransportParams) -> None:
        super().__init__(params)
        self.pictures: list[tuple[float, OutputImageRawFrame]] = []
        self.sounds: list[tuple[float, bytes]] = []
        self._played_s = 0.0

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_video_frame(self, frame: OutputImageRawFrame) -> bool:
        self.pictures.append((time.monotonic(), frame))
        return True

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        now_s = time.monotonic()
        self._played_s = max(self._played_s, now_s)
        self.sounds.append((self._played_s, frame.audio))
        self._played_s += frame.num_frames / frame.sample_rate
        await asyncio.sleep(self._played_s - now_s)
        return True

    @property
    def sound_s(self) -> float:
        return sum(len(sound) for _, sound in self.sounds) / 2 / RATE_HZ

    def heard_s(self, position_s: float) -> float:
        """When so many seconds of the sound had been heard."""
        for begin_s, sound in self.sounds:
            length_s = len(sound) / 2 / RATE_HZ
            if position_s < length_s:
                return begin_s + position_s
            position_s -= length_s
        raise AssertionError("it has not been heard so far")


class Tap(FrameProcessor):
    """Remembers what flows by, each frame with its time and direction."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[float, FrameDirection, Frame]] = []

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        self.frames.append((time.monotonic(), direction, frame))
        await self.push_frame(frame, direction)

    def of(self, kind: type, direction: FrameDirection = FrameDirection.DOWNSTREAM) -> list[Any]:
        return [f for _, d, f in self.frames if d is direction and isinstance(f, kind)]


class Bot:
    """A pipeline that runs: before ─► service ─► after ─► wire."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        defaults = {"size": (32, 32), "fps": FPS, "prompt": "A person.", "image": PORTRAIT}
        self.service = LiveActVideoService(engine, **(defaults | options))
        self.params = TransportParams(
            **self.service.transport_params(), audio_out_end_silence_secs=0
        )
        self.before, self.after, self.wire = Tap(), Tap(), Wire(self.params)
        self.worker = PipelineWorker(
            Pipeline([self.before, self.service, self.after, self.wire]),
            params=PipelineParams(audio_out_sample_rate=RATE_HZ, enable_metrics=True),
            enable_rtvi=False,
        )
        self.running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        runner = WorkerRunner(handle_sigint=False)
        await runner.add_workers(self.worker)
        await runner.run()

    async def say(self, seconds: float, rate_hz: int = RATE_HZ, stop: bool = True) -> None:
        """As a TTS does: all at once, 20 ms a frame."""
        pcm = (speech(seconds, rate_hz) * 32_767).astype(np.int16)
        step = rate_hz // 50
        frames: list[Frame] = [TTSStartedFrame()]
        frames += [
            TTSAudioRawFrame(pcm[i : i + step].tobytes(), rate_hz, 1)
            for i in range(0, len(pcm), step)
        ]
        await self.worker.queue_frames([*frames, *[TTSStoppedFrame()] * stop])


@contextlib.asynccontextmanager
async def bot(engine: Engine, **options: Any) -> AsyncIterator[Bot]:
    found = Bot(engine, **options)
    try:
        await until(lambda: bool(found.wire.pictures) or found.running.done(), "no picture")
        yield found
    finally:
        await found.worker.cancel()
        await asyncio.wait_for(found.running, 20)


@pytest.mark.slow
def test_speech_comes_out_with_its_pictures(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.say(2.0)
            await until(
                lambda: bool(found.after.of(BotStoppedSpeakingFrame, FrameDirection.UPSTREAM)),
                "the bot does not stop",
            )
            sound = found.after.of(TTSAudioRawFrame)
            assert {(f.sample_rate, f.num_channels, f.num_frames) for f in sound} == {
                (RATE_HZ, 1, RATE_HZ // FPS)
            }
            seconds = sum(f.num_frames for f in sound) / RATE_HZ
            assert 2.0 - 1e-6 <= seconds <= 2.0 + CHUNK_S
            # The transport fills its last piece up with silence.
            assert seconds - 1e-6 <= found.wire.sound_s <= seconds + 2 * WRITE_S
            pictures = found.after.of(OutputImageRawFrame)
            assert {(f.size, f.format, len(f.image)) for f in pictures} == {
                ((32, 32), "RGB", 3 * 32 * 32)
            }
            # Each sound directly follows its picture.
            flow = [
                type(f)
                for _, _, f in found.after.frames
                if isinstance(f, (TTSAudioRawFrame, OutputImageRawFrame, TTSStoppedFrame))
            ]
            for i, kind in enumerate(flow):
                if kind is TTSAudioRawFrame:
                    assert flow[i - 1] is OutputImageRawFrame
            assert flow[flow.index(TTSStoppedFrame) - 1] is TTSAudioRawFrame, "it stops early"
            assert len(found.after.of(BotStartedSpeakingFrame, FrameDirection.UPSTREAM)) == 1
            assert len(found.after.of(TTSStoppedFrame)) == 1

    run(work())


@pytest.mark.slow
def test_every_picture_goes_out_with_its_sound(engine: Engine) -> None:
    """Through the transport: no picture is left out or shown twice, and while it speaks,
    picture and sound are within two frames of each other."""

    async def work() -> None:
        async with bot(engine) as found:
            await found.say(2.0)
            await until(lambda: found.wire.sound_s >= 2.0, "it is not heard to its end")
            pushed = found.after.of(OutputImageRawFrame)
            shown = [frame.id for _, frame in found.wire.pictures]
            assert shown == [f.id for f in pushed][: len(shown)]
            assert len(pushed) - len(shown) <= 3
            order = [f for _, _, f in found.after.frames]
            spoken = [
                before.id
                for before, f in itertools.pairwise(order)
                if isinstance(f, TTSAudioRawFrame)
            ]
            shown_s = {frame.id: at for at, frame in found.wire.pictures}
            offsets_s = [
                shown_s[picture] - found.wire.heard_s(i / FPS)
                for i, picture in enumerate(spoken)
                if picture in shown_s
            ]
            assert len(offsets_s) >= 2 * FPS - 3
            offset_s = statistics.median(offsets_s)  # the machine may do something else meanwhile
            assert abs(offset_s) <= 2 / FPS, f"pictures come {offset_s:.3f} s after their sound"

    run(work())


def test_idling_has_no_sound(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await until(lambda: len(found.wire.pictures) >= 40, "no idling")
            assert not found.wire.sounds
            assert not found.after.of(OutputAudioRawFrame)

    run(work())


def test_everything_else_passes(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.worker.queue_frames([TTSStartedFrame(), TextFrame("hello")])
            await found.worker.queue_frames([TTSStoppedFrame()])  # nothing was said
            await until(lambda: bool(found.after.of(TTSStoppedFrame)), "its end is held back")
            assert len(found.after.of(TTSStartedFrame)) == len(found.after.of(TextFrame)) == 1

    run(work())


def test_rates_may_change(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.say(0.4, rate_hz=16_000, stop=False)
            await found.say(0.4, rate_hz=48_000)  # in the middle of an answer
            await found.say(0.4, rate_hz=22_050)
            await until(lambda: len(found.after.of(TTSStoppedFrame)) == 2, "it does not end")
            sound = found.after.of(TTSAudioRawFrame)
            assert {f.sample_rate for f in sound} == {RATE_HZ}
            seconds = sum(f.num_frames for f in sound) / RATE_HZ
            assert 1.2 - 1e-3 <= seconds <= 1.2 + 3 * CHUNK_S

    run(work())


@pytest.mark.slow
def test_nothing_old_follows_an_interruption(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.say(6.0)  # more than the session takes at once: the rest waits in frames
            await until(lambda: found.wire.sound_s > 0.2, "it does not speak")
            await found.worker.queue_frame(InterruptionFrame())
            await until(lambda: bool(found.after.of(InterruptionFrame)), "it does not pass")
            await asyncio.sleep(1.5)
            order = [f for _, _, f in found.after.frames]
            cut = next(i for i, f in enumerate(order) if isinstance(f, InterruptionFrame))
            later = {type(f) for f in order[cut + 1 :]}
            assert OutputImageRawFrame in later, "the picture stands still"
            assert not later & {TTSAudioRawFrame, TTSStoppedFrame}
            assert len(found.after.of(BotStoppedSpeakingFrame, FrameDirection.UPSTREAM)) == 1
            await found.say(0.4)
            await until(lambda: bool(found.after.of(TTSStoppedFrame)), "it does not go on")
            order = [f for _, _, f in found.after.frames][cut:]
            sound = [f for f in order if isinstance(f, TTSAudioRawFrame)]
            assert 0.4 - 1e-6 <= sum(f.num_frames for f in sound) / RATE_HZ <= 0.4 + CHUNK_S

    run(work())


def test_a_frame_that_waits_for_its_turn_is_dropped_by_an_interruption(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.say(2.0)
            await until(lambda: found.wire.sound_s > 0.2, "it does not speak")
            async with found.service._order:
                await until(lambda: bool(found.service._order._waiters), "no frame comes")
                spoken = len(found.after.of(TTSAudioRawFrame))
                await found.worker.queue_frame(InterruptionFrame())
                await until(lambda: found.service._epoch == 1, "it does not arrive")
            await until(lambda: bool(found.after.of(InterruptionFrame)), "it does not pass")
            assert len(found.after.of(TTSAudioRawFrame)) == spoken

    run(work())


def test_speech_that_comes_right_after_an_interruption_is_whole(engine: Engine) -> None:
    async def work() -> list[pacing.Frame]:
        service = LiveActVideoService(engine, image=PORTRAIT, prompt="A person.", size=(32, 32))
        pushed: list[pacing.Frame] = []

        class Next:
            async def next_frame(self) -> pacing.Frame | None:
                if service._epoch:
                    return None
                service._epoch = 1  # an interruption, while nothing was there
                picture, pcm = np.zeros((32, 32, 3), np.uint8), np.zeros((1200, 1), np.float32)
                return pacing.Frame(0, picture, pcm, RATE_HZ, 0.0, 1, True, False)

        async def push(frame: pacing.Frame) -> None:
            pushed.append(frame)

        service._push = push
        await asyncio.wait_for(service._push_frames(Next()), 5)
        return pushed

    assert len(run(work())) == 1


@pytest.mark.slow
def test_the_end_waits_until_all_is_said(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.say(1.5)
            await found.worker.queue_frame(EndFrame())
            await asyncio.wait_for(asyncio.shield(found.running), 30)
            assert found.wire.sound_s >= 1.5 - 1e-6
            order = [f for _, _, f in found.after.frames]
            kinds = [type(f) for f in order if isinstance(f, (TTSStoppedFrame, EndFrame))]
            assert kinds == [TTSStoppedFrame, EndFrame]
            assert not engine.stats().sessions

    run(work())


def test_cancelling_does_not_wait(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.say(2.5)
            await until(lambda: bool(found.wire.sounds), "it does not speak")
            begin_s = time.monotonic()
            await found.worker.cancel()
            await asyncio.wait_for(asyncio.shield(found.running), 20)
            assert time.monotonic() - begin_s < 5  # what is being computed, on a busy machine
            assert found.wire.sound_s < 2.0
            assert found.before.of(CancelFrame) and not engine.stats().sessions

    run(work())


def test_a_failed_session_is_an_error_of_the_service(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            assert found.service._session is not None
            stream_of(found.service._session).denoise = fail
            await found.say(0.4)
            await until(
                lambda: bool(found.before.of(ErrorFrame, FrameDirection.UPSTREAM)), "no error"
            )
            (error,) = found.before.of(ErrorFrame, FrameDirection.UPSTREAM)
            assert "out of luck" in repr(error.exception.__cause__)
            assert error.processor is found.service and not found.service.is_usable
            await until(lambda: bool(found.after.of(TTSStoppedFrame)), "the bot never stops")

    run(work())


def test_a_session_that_cannot_be_opened(engine: Engine) -> None:
    async def work() -> None:
        found = Bot(engine, prompt=3)
        await until(lambda: bool(found.before.of(ErrorFrame, FrameDirection.UPSTREAM)), "no error")
        (error,) = found.before.of(ErrorFrame, FrameDirection.UPSTREAM)
        assert error.error == "prompt: expected text, found 3"
        await found.say(0.2)  # is heard, without a picture
        await until(lambda: bool(found.wire.sounds), "the speech is lost as well")
        await found.worker.cancel()
        await asyncio.wait_for(found.running, 20)

    run(work())


@pytest.mark.parametrize("options", [{"fps": 23.5}, {"fps": 0}, {"size": 512}])
def test_bad_options(engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        LiveActVideoService(engine, **options)


def test_bad_sound_is_an_error_that_passes(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.worker.queue_frame(TTSAudioRawFrame(b"\0\0" * 10, 7, 1))
            await until(
                lambda: bool(found.before.of(ErrorFrame, FrameDirection.UPSTREAM)), "no error"
            )
            assert found.service.is_usable
            await found.say(0.2)
            await until(lambda: bool(found.after.of(TTSStoppedFrame)), "it does not go on")

    run(work())


def test_time_to_the_first_frame_is_a_metric(engine: Engine) -> None:
    async def work() -> None:
        async with bot(engine) as found:
            await found.say(0.4)
            await until(lambda: bool(found.after.of(TTSStoppedFrame)), "it does not end")
            values = [
                data.value
                for frame in found.after.of(MetricsFrame)
                for data in frame.data
                if isinstance(data, TTFBMetricsData) and data.processor == found.service.name
            ]
            measured = [value for value in values if value > 0]
            assert len(measured) == 1 and measured[0] < 20

    run(work())
