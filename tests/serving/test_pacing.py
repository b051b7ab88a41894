"""Frames on a wall clock: exact sound, no burst, no hole, nothing after an interruption."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from liveact.engine import Engine
from liveact.session.chunk import Chunk, Interruption
from liveact.session.pacing import Frame, Pacer
from tests.session.test_aio import aopen
from tests.support.pipeline import speech
from tests.support.session import RATE_HZ, run_whole


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


class Script:
    """A session that hands out chunks when the test says so."""

    def __init__(self, fps: Fraction, rate_hz: int) -> None:
        self.fps, self.rate_hz, self.lag_s = fps, rate_hz, 0.0
        self.queue: deque[Chunk | None] = deque()
        self.changed = asyncio.Event()
        self.made = 0

    def make(self, frames: int, **fields: Any) -> None:
        bounds = [int(n * self.rate_hz / self.fps) for n in (self.made, self.made + frames)]
        pcm = np.arange(*bounds, dtype=np.float32)[:, None]
        pictures = np.full((frames, 2, 2, 3), self.made % 256, np.uint8)
        self.made += frames
        self.queue.append(Chunk(pictures, pcm, self.rate_hz, 0.0, 0, False, **fields))
        self.changed.set()

    def end(self) -> None:
        self.queue.append(None)
        self.changed.set()

    async def anext_chunk(self, timeout_s: float | None) -> Chunk | None:
        async with asyncio.timeout(timeout_s):
            while not self.queue:
                self.changed.clear()
                await self.changed.wait()
        return self.queue.popleft()

    async def ainterrupt(self) -> Interruption:
        self.queue.clear()
        await asyncio.sleep(0)
        return Interruption(0, 0.0)


@pytest.mark.parametrize(
    ("fps", "rate_hz"), [(Fraction(200), 44_100), (Fraction(24_000, 101), 48_000)]
)
def test_sound_is_exact_and_frames_are_on_their_clock(fps: Fraction, rate_hz: int) -> None:
    async def work() -> tuple[list[Frame], list[float]]:
        script = Script(fps, rate_hz)
        for _ in range(6):
            script.make(4)
        script.end()
        frames, shown_s = [], []
        async for frame in Pacer(script):
            frames.append(frame)
            shown_s.append(asyncio.get_running_loop().time())
        return frames, shown_s

    frames, shown_s = run(work())
    assert [frame.number for frame in frames] == list(range(24))
    pcm = np.concatenate([frame.pcm for frame in frames])[:, 0]
    assert np.array_equal(pcm, np.arange(int(24 * rate_hz / fps)))
    assert all(shown >= frame.due_s for frame, shown in zip(frames, shown_s, strict=True))
    steps = np.diff([frame.due_s for frame in frames])
    assert steps.min() >= 1 / fps - 1e-6  # later where this machine was late, never sooner


def test_the_picture_stands_still_while_nothing_is_there() -> None:
    async def work() -> None:
        script = Script(Fraction(100), 44_100)
        pacer = Pacer(script)
        script.make(2)
        frames = [await pacer.next_frame() for _ in range(2)]
        frames += [await pacer.next_frame() for _ in range(100)]
        assert all(frame is not None and frame.repeated for frame in frames[2:])
        assert sum(len(frame.pcm) for frame in frames[2:] if frame) == 44_100
        assert not any(frame.pcm.any() for frame in frames[2:] if frame)
        assert (pacer.repeated, pacer.underruns) == (100, 0)
        script.lag_s = 0.1  # now it is making something
        await pacer.next_frame()
        assert pacer.underruns == 0  # it stood still before already
        script.make(1)
        while (frame := await pacer.next_frame()) is not None and frame.repeated:
            pass
        for _ in range(3):
            await pacer.next_frame()
        assert pacer.underruns == 1

    run(work())


def test_a_consumer_that_comes_back_late_gets_no_burst() -> None:
    async def work() -> list[Frame]:
        script = Script(Fraction(50), 16_000)
        script.make(8)
        script.end()
        pacer = Pacer(script)
        frames = []
        async for frame in pacer:
            frames.append(frame)
            if frame.number == 2:
                await asyncio.sleep(0.5)
        return frames

    frames = run(work())
    steps = np.diff([frame.due_s for frame in frames])
    assert steps[2] >= 0.5 - 1e-3
    assert steps.min() >= 0.02 - 1e-6


def test_a_consumer_within_its_limit_catches_up() -> None:
    async def work() -> list[Frame]:
        script = Script(Fraction(50), 16_000)
        script.make(40)
        script.end()
        frames = []
        async for frame in Pacer(script, late_s=5):
            frames.append(frame)
            if frame.number == 2:
                await asyncio.sleep(0.3)
        return frames

    frames = run(work())
    np.testing.assert_allclose(np.diff([frame.due_s for frame in frames]), 0.02, atol=1e-6)
    assert not any(frame.repeated for frame in frames)


def test_after_an_interruption_nothing_of_it_comes() -> None:
    async def work() -> None:
        script = Script(Fraction(100), 16_000)
        pacer = Pacer(script)
        script.make(4, utterance=0)
        script.make(4, utterance=0)
        first = await pacer.next_frame()
        waiting = asyncio.create_task(pacer.next_frame())
        await asyncio.sleep(0)
        await pacer.interrupt()
        frame = await waiting
        assert first and frame and frame.repeated and np.array_equal(frame.picture, first.picture)
        script.make(4, utterance=1)
        while (frame := await pacer.next_frame()) is not None and frame.repeated:
            pass
        assert frame and frame.utterance == 1

    run(work())


def test_a_cancelled_caller_loses_no_frame() -> None:
    async def work() -> list[int]:
        script = Script(Fraction(50), 16_000)
        script.make(4)
        script.end()
        pacer = Pacer(script)
        numbers = []
        while True:
            try:
                frame = await asyncio.wait_for(pacer.next_frame(), 0.007)
            except TimeoutError:
                continue
            if frame is None:
                return numbers
            numbers.append(frame.number)

    assert run(work()) == [0, 1, 2, 3]


@pytest.mark.slow
def test_frames_of_a_real_session_are_its_chunks(engine: Engine) -> None:
    expected = run_whole(engine, speech(2.0), fps=40)

    async def work() -> list[Frame]:
        async with await aopen(engine, fps=40) as session:
            await session.apush_audio(speech(2.0), RATE_HZ, timeout_s=None)
            await session.aend_of_audio()
            return [frame async for frame in Pacer(session) if not frame.repeated]

    frames = run(work())
    assert np.array_equal(
        np.stack([frame.picture for frame in frames]),
        np.concatenate([chunk.frames for chunk in expected]),
    )
    assert np.array_equal(
        np.concatenate([frame.pcm for frame in frames]),
        np.concatenate([chunk.pcm for chunk in expected]),
    )
