"""The generator in LiveKit's own runner and audio outputs; only the network is a stand-in.

`Room` has what the runner and the data streams use of a room. What the runner hands to its sources
is recorded, and the sources are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from livekit import rtc
from livekit.agents.voice.avatar import (
    AudioSegmentEnd,
    AvatarOptions,
    AvatarRunner,
    DataStreamAudioOutput,
    DataStreamAudioReceiver,
    QueueAudioOutput,
)

from liveact.engine import Engine
from liveact.errors import InputError, SessionError
from liveact.integrations.livekit import LiveActVideoGenerator, load_of
from liveact.session.pacing import Frame, Pacer
from tests.support.livekit_room import Room, linked_rooms
from tests.support.paths import PORTRAIT
from tests.support.pipeline import speech
from tests.support.session import Gate, fail, stream_of

FPS = 20
FRAME_S = 1 / FPS
# A segment ends in a frame whose chunk, of four, may end in silence.
CHUNK_S = 4 * FRAME_S


def run(work: Coroutine[Any, Any, Any], limit_s: float = 60.0) -> Any:
    return asyncio.run(asyncio.wait_for(work, limit_s))


async def open_generator(engine: Engine, **options: Any) -> LiveActVideoGenerator:
    defaults = {"size": (32, 32), "prompt": "A person.", "image": PORTRAIT}
    return await LiveActVideoGenerator.open(engine, **(defaults | options))


def sound(seconds: float, rate_hz: int = 24_000, channels: int = 1) -> list[rtc.AudioFrame]:
    """As a TTS hands it over: frames of 100 ms."""
    pcm = (speech(seconds, rate_hz, channels) * 32_767).astype(np.int16)
    step = rate_hz // 10
    return [
        rtc.AudioFrame(part.tobytes(), rate_hz, channels, len(part))
        for part in (pcm[i : i + step] for i in range(0, len(pcm), step))
    ]


async def until(condition: Callable[[], bool], message: str, limit_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, message
        await asyncio.sleep(0.01)


# ------------------------------------------------------------------- the generator by itself


class Heard:
    """Takes what a generator hands out, with the time of each item."""

    def __init__(self, generator: LiveActVideoGenerator) -> None:
        self.items: list[tuple[float, Any]] = []
        self.task = asyncio.create_task(self._listen(generator))

    async def _listen(self, generator: LiveActVideoGenerator) -> None:
        async for item in generator:
            self.items.append((time.monotonic(), item))

    def of(self, kind: type) -> list[Any]:
        return [item for _, item in self.items if isinstance(item, kind)]

    @property
    def ends(self) -> int:
        return len(self.of(AudioSegmentEnd))

    @property
    def seconds(self) -> float:
        return sum(frame.duration for frame in self.of(rtc.AudioFrame))


@contextlib.asynccontextmanager
async def heard(engine: Engine, **options: Any) -> AsyncIterator[tuple[Any, Heard]]:
    generator = await open_generator(engine, **options)
    listener = Heard(generator)
    try:
        yield generator, listener
    finally:
        listener.task.cancel()
        await asyncio.gather(listener.task, return_exceptions=True)
        await generator.aclose()


@pytest.mark.slow
def test_a_segment_is_paced_single_frames_with_their_sound(engine: Engine) -> None:
    async def work() -> None:
        async with heard(engine) as (generator, listener):
            for frame in sound(2.0):
                await generator.push_audio(frame)
            await generator.push_audio(AudioSegmentEnd())
            await until(lambda: listener.ends == 1, "the segment does not end")
            assert 2.0 - 1e-6 <= listener.seconds <= 2.0 + CHUNK_S
            await until(lambda: len(listener.of(rtc.VideoFrame)) > 60, "idling does not go on")
            assert listener.ends == 1

            audio = listener.of(rtc.AudioFrame)
            assert {(f.sample_rate, f.num_channels) for f in audio} == {(48_000, 1)}
            assert {f.samples_per_channel for f in audio} == {2400}, "one frame of sound each"
            video = listener.of(rtc.VideoFrame)
            assert {(f.width, f.height, f.type) for f in video} == {
                (32, 32, rtc.VideoBufferType.RGB24)
            }
            # After every sound comes a picture or the end, and before it a picture.
            kinds = [type(item) for _, item in listener.items]
            for i, kind in enumerate(kinds[:-1]):
                if kind is rtc.AudioFrame:
                    assert kinds[i - 1] is rtc.VideoFrame
                    assert kinds[i + 1] in (rtc.VideoFrame, AudioSegmentEnd)
            # On a clock: where this machine was late, it goes on from there and hurries nothing.
            shown_s = [at for at, item in listener.items if isinstance(item, rtc.VideoFrame)]
            for i in range(len(shown_s) - 8):
                assert shown_s[i + 8] - shown_s[i] > 6 * FRAME_S, "a burst"

    run(work())


def test_idling_has_no_sound(engine: Engine) -> None:
    async def work() -> None:
        async with heard(engine) as (_, listener):
            await until(lambda: len(listener.items) >= 40, "no idling")
            assert {type(item) for _, item in listener.items} == {rtc.VideoFrame}

    run(work())


def test_every_segment_ends_also_an_empty_one(engine: Engine) -> None:
    async def work() -> None:
        async with heard(engine) as (generator, listener):
            await generator.push_audio(AudioSegmentEnd())
            for frame in sound(0.3):
                await generator.push_audio(frame)
            await generator.push_audio(AudioSegmentEnd())
            await generator.push_audio(AudioSegmentEnd())
            for frame in sound(0.2, rate_hz=44_100, channels=2):  # another rate, and stereo
                await generator.push_audio(frame)
            await generator.push_audio(AudioSegmentEnd())
            await until(lambda: listener.ends == 4, "a segment does not end")
            assert {f.sample_rate for f in listener.of(rtc.AudioFrame)} == {48_000}
            assert listener.seconds <= 0.5 + 2 * CHUNK_S
            await asyncio.sleep(0.3)
            assert listener.ends == 4

    run(work())


def test_the_rate_may_change_within_a_segment(engine: Engine) -> None:
    async def work() -> None:
        async with heard(engine) as (generator, listener):
            for frame in [*sound(0.3), *sound(0.3, rate_hz=16_000)]:
                await generator.push_audio(frame)
            await generator.push_audio(AudioSegmentEnd())
            await until(lambda: listener.ends == 1, "the segment does not end")
            assert 0.6 - 1e-6 <= listener.seconds <= 0.6 + 2 * CHUNK_S

    run(work())


@pytest.mark.slow
@pytest.mark.parametrize("end_first", [False, True])
def test_nothing_of_a_cleared_segment_follows(engine: Engine, end_first: bool) -> None:
    async def work() -> None:
        async with heard(engine) as (generator, listener):
            for frame in sound(2.5):
                await generator.push_audio(frame)
            if end_first:
                await generator.push_audio(AudioSegmentEnd())
            await until(lambda: len(listener.of(rtc.AudioFrame)) >= 5, "it does not speak")
            clearing = asyncio.create_task(generator.clear_buffer())
            await asyncio.sleep(0)
            already = len(listener.of(rtc.AudioFrame))
            await clearing
            assert listener.ends == 1, "expected the end with the clear"
            if not end_first:
                await generator.push_audio(AudioSegmentEnd())  # of the segment that was cleared
            await asyncio.sleep(1.0)
            assert len(listener.of(rtc.AudioFrame)) == already
            assert listener.ends == 1
            for frame in sound(0.3):
                await generator.push_audio(frame)
            await generator.push_audio(AudioSegmentEnd())
            await until(lambda: listener.ends == 2, "the session does not go on")
            assert len(listener.of(rtc.AudioFrame)) > already

    run(work())


def test_back_pressure_holds_up_nobody_else(engine: Engine) -> None:
    async def work() -> None:
        async with heard(engine) as (generator, listener):
            gate = Gate(stream_of(generator.session), "denoise")

            async def push() -> None:
                for frame in sound(10.0):
                    await generator.push_audio(frame)

            pushing = asyncio.create_task(push())
            await asyncio.sleep(0.5)
            longest_s = 0.0
            for _ in range(50):
                begin_s = time.thread_time()
                await asyncio.sleep(0.002)
                longest_s = max(longest_s, time.thread_time() - begin_s)
            assert not pushing.done() and generator.session.backlog_s <= 3.01
            assert longest_s < 0.05, f"the loop computed for {longest_s:.3f} s"
            await generator.clear_buffer()
            await asyncio.sleep(0.05)
            assert not listener.of(rtc.AudioFrame)
            gate.open()
            pushing.cancel()

    run(work())


def test_a_session_that_fails_ends_its_segments_first(engine: Engine) -> None:
    async def work() -> None:
        async with heard(engine) as (generator, listener):
            await until(lambda: bool(listener.items), "no idling")
            for frame in sound(0.3):
                await generator.push_audio(frame)
            await generator.push_audio(AudioSegmentEnd())
            await generator.push_audio(sound(0.1)[0])
            stream_of(generator.session).denoise = fail
            with pytest.raises(SessionError):
                await listener.task
            assert listener.ends == 2

    run(work())


def test_load(engine: Engine) -> None:
    async def work() -> None:
        load = load_of(engine, 2)
        assert load() == 0.0
        first = await open_generator(engine)
        assert load() == 0.5
        second = await open_generator(engine)
        third = await open_generator(engine)
        assert load() == 1.0
        for generator in (first, second, third):
            await generator.aclose()
        assert load() == 0.0

    run(work())
    with pytest.raises(InputError, match="max_sessions: expected a whole number from 1"):
        load_of(engine, 0)


def test_a_picture_that_was_handed_out_loses_its_sound_to_a_clearing(engine: Engine) -> None:
    async def work() -> None:
        async with contextlib.aclosing(await open_generator(engine)) as generator:
            for frame in sound(2.5):
                await generator.push_audio(frame)
            async with contextlib.aclosing(aiter(generator)) as items:
                while not isinstance(await anext(items), rtc.AudioFrame):
                    pass
                assert isinstance(await anext(items), rtc.VideoFrame)  # its sound is next
                clearing = asyncio.create_task(generator.clear_buffer())
                await asyncio.sleep(0)
                assert isinstance(await anext(items), AudioSegmentEnd)
                assert isinstance(await anext(items), rtc.VideoFrame)
                await clearing

    run(work())


def test_a_frame_that_came_right_before_a_clearing_is_not_handed_out(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there, but nobody has taken it when the clearing begins."""
    original = Pacer.next_frame

    async def work() -> None:
        async with heard(engine) as (generator, listener):
            clearing: list[asyncio.Task[None]] = []

            async def next_frame(self: Pacer) -> Frame | None:
                frame = await original(self)
                if frame is not None and frame.speech and not clearing:
                    clearing.append(asyncio.create_task(generator.clear_buffer()))
                return frame

            monkeypatch.setattr(Pacer, "next_frame", next_frame)
            for part in sound(2.5):
                await generator.push_audio(part)
            await until(lambda: bool(clearing) and clearing[0].done(), "it does not speak")
            await asyncio.sleep(2 * FRAME_S)
            assert listener.ends == 1
            assert not listener.of(rtc.AudioFrame)

    run(work())


# ------------------------------------------------------------------- in LiveKit's own runner


class Played:
    """What an agent learns of its segments."""

    def __init__(self, output: Any) -> None:
        self.finished: list[tuple[float, bool]] = []
        self.started = 0
        output.on(
            "playback_finished",
            lambda event: self.finished.append((event.playback_position, event.interrupted)),
        )
        output.on("playback_started", self._on_started)

    def _on_started(self, _: Any) -> None:
        self.started += 1


async def say(output: Any, frames: list[rtc.AudioFrame]) -> None:
    for frame in frames:
        await output.capture_frame(frame)
    output.flush()


@pytest.mark.slow
def test_in_the_runner_of_one_process(engine: Engine) -> None:
    async def work() -> None:
        generator = await open_generator(engine)
        output = QueueAudioOutput(wait_playback_start=True)
        played = Played(output)
        room = Room("avatar")
        runner = await generator.start(room, output)
        assert isinstance(runner, AvatarRunner)
        assert generator.options == AvatarOptions(32, 32, 20.0, 48_000, 1)
        await until(lambda: len(room.published) == 2, "no tracks")
        assert (played.started, played.finished) == (0, [])

        await say(output, sound(1.0))
        event = await asyncio.wait_for(output.wait_for_playout(), 20)
        assert not event.interrupted and 1.0 - 1e-6 <= event.playback_position <= 1.0 + CHUNK_S
        assert played.started == 1

        await say(output, sound(2.5))
        await until(lambda: played.started == 2, "it does not speak")
        await asyncio.sleep(0.4)
        output.clear_buffer()
        event = await asyncio.wait_for(output.wait_for_playout(), 5)
        assert event.interrupted and 0 < event.playback_position < 2.5

        await say(output, sound(0.3))  # at once, while the cleared block is still being made
        event = await asyncio.wait_for(output.wait_for_playout(), 20)
        assert not event.interrupted
        assert 0.3 - 1e-6 <= event.playback_position <= 0.3 + CHUNK_S
        assert len(played.finished) == 3 and played.started == 3
        await generator.aclose()
        await generator.aclose()

    run(work())


@pytest.mark.slow
def test_in_the_runner_of_another_participant(engine: Engine) -> None:
    """The agent and the avatar in two rooms that are one, over byte streams and RPC."""

    async def work() -> None:
        agent_room, avatar_room = linked_rooms("agent", "avatar")
        generator = await open_generator(engine)
        output = DataStreamAudioOutput(
            agent_room,
            destination_identity="avatar",
            wait_playback_start=True,
        )
        played = Played(output)
        receiver = DataStreamAudioReceiver(
            avatar_room,
            sender_identity="agent",
        )
        await generator.start(avatar_room, receiver)

        await say(output, sound(1.0))
        event = await asyncio.wait_for(output.wait_for_playout(), 20)
        assert not event.interrupted and 1.0 - 1e-6 <= event.playback_position <= 1.0 + CHUNK_S

        for frame in sound(2.5, rate_hz=16_000):  # another rate, and no end yet
            await output.capture_frame(frame)
        await until(lambda: played.started == 2, "it does not speak")
        await asyncio.sleep(0.4)
        output.clear_buffer()
        event = await asyncio.wait_for(output.wait_for_playout(), 5)
        assert event.interrupted and 0 < event.playback_position < 2.5
        output.flush()

        await say(output, sound(0.3))
        event = await asyncio.wait_for(output.wait_for_playout(), 20)
        assert not event.interrupted
        assert 0.3 - 1e-6 <= event.playback_position <= 0.3 + CHUNK_S
        assert len(played.finished) == 3
        await generator.aclose()

    run(work())
