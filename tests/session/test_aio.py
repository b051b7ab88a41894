"""A session in an event loop: the same chunks, nothing lost, and the loop is never held up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest

from liveact.engine import Engine
from liveact.errors import BacklogFull, InputError, SessionError
from liveact.session.chunk import Chunk
from liveact.session.session import Session
from liveact.session.state import SessionState
from liveact.session.workers import Workers
from tests.support.paths import PORTRAIT
from tests.support.pipeline import speech
from tests.support.session import (
    RATE_HZ,
    Gate,
    open_session,
    pictures,
    run_whole,
    stream_of,
    wait_until,
    workers,
)

LIMIT_S = 60.0


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, LIMIT_S))


async def aopen(engine: Engine, **options: Any) -> Session:
    defaults = {"size": (32, 32), "prompt": "A person.", "image": PORTRAIT, "max_backlog_s": 600}
    return await engine.aopen_session(**(defaults | options))


async def said(session: Session, samples: np.ndarray) -> list[Chunk]:
    await session.apush_audio(samples, RATE_HZ, timeout_s=None)
    await session.aend_of_audio()
    return [chunk async for chunk in session]


def equal(found: list[Chunk], expected: list[Chunk]) -> bool:
    sounds = [np.concatenate([chunk.pcm for chunk in chunks]) for chunks in (found, expected)]
    return np.array_equal(pictures(found), pictures(expected)) and np.array_equal(*sounds)


def test_chunks_are_those_of_a_thread(engine: Engine) -> None:
    async def work() -> list[list[Chunk]]:
        async with await aopen(engine) as first, await aopen(engine, seed=3) as second:
            return await asyncio.gather(said(first, speech(4.0)), said(second, speech(3.0, seed=1)))

    found = run(work())
    assert equal(found[0], run_whole(engine, speech(4.0)))
    assert equal(found[1], run_whole(engine, speech(3.0, seed=1), seed=3))
    assert workers() == []


def test_a_cancelled_wait_loses_no_chunk(engine: Engine) -> None:
    async def work() -> tuple[list[Chunk], int]:
        chunks: list[Chunk] = []
        given_up = 0
        async with await aopen(engine) as session:
            await session.apush_audio(speech(4.0), RATE_HZ)
            await session.aend_of_audio()
            while True:
                try:
                    # Both ways of giving up: of the session, and from outside.
                    waiting = session.anext_chunk(0.002 if given_up % 2 else None)
                    chunk = await asyncio.wait_for(waiting, 0.004)
                except TimeoutError:
                    given_up += 1
                    continue
                if chunk is None:
                    return chunks, given_up
                chunks.append(chunk)

    found, given_up = run(work())
    assert given_up > 10, "expected waits that were given up"
    assert equal(found, run_whole(engine, speech(4.0)))


def test_back_pressure(engine: Engine) -> None:
    async def work() -> None:
        async with await aopen(engine, max_backlog_s=3.0) as session:
            gate = Gate(stream_of(session), "denoise")  # nothing is used
            await session.apush_audio(speech(2.5), RATE_HZ)
            with pytest.raises(BacklogFull):
                await session.apush_audio(speech(2.0), RATE_HZ)
            begin = time.monotonic()
            with pytest.raises(BacklogFull):
                await session.apush_audio(speech(4.0), RATE_HZ, timeout_s=0.3)
            assert 0.25 < time.monotonic() - begin < 5
            assert session.backlog_s <= 3.0
            pushing = asyncio.create_task(
                session.apush_audio(speech(5.0, seed=2), RATE_HZ, timeout_s=None)
            )
            await asyncio.sleep(0.1)
            assert not pushing.done()
            await session.ainterrupt()  # the rest of what is being pushed goes with it
            await pushing
            assert session.backlog_s == 0
            gate.open()
            await session.apush_audio(speech(1.0, seed=3), RATE_HZ)
            await session.aend_of_audio()
            heard = np.concatenate([chunk.pcm async for chunk in session])
            assert np.array_equal(heard[: RATE_HZ // 1], speech(1.0, seed=3))

    run(work())


def test_a_cancelled_opening_is_closed_again(engine: Engine) -> None:
    before = engine.stats().sessions_opened
    gate = Gate(engine, "_encode_prompt")
    try:

        async def work() -> None:
            opening = asyncio.create_task(aopen(engine))
            await asyncio.to_thread(gate.wait)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            gate.open()

        run(work())
        wait_until(lambda: engine.stats().sessions_opened == before + 1, "it was not opened")
        wait_until(lambda: engine.stats().sessions == () and workers() == [], "it is still open")
    finally:
        gate.open()
        del engine._encode_prompt


def test_closing_wakes_whoever_waits(engine: Engine) -> None:
    async def work() -> None:
        session = await aopen(engine)
        waiting = asyncio.create_task(session.anext_chunk())
        await asyncio.sleep(0.05)
        await session.aclose()
        with pytest.raises(SessionError, match="closed"):
            await waiting

    run(work())


def test_an_error_in_the_loop_closes_the_session(engine: Engine) -> None:
    async def work() -> None:
        async with await aopen(engine) as session:
            await session.apush_audio(speech(2.0), RATE_HZ)
            async for _ in session:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(work())
    assert workers() == []


def test_a_loop_that_ends_first_harms_nothing(engine: Engine) -> None:
    with open_session(engine) as session:

        async def work() -> None:
            asyncio.create_task(session.anext_chunk())  # noqa: RUF006
            await asyncio.sleep(0.05)

        run(work())
        session.push_audio(speech(2.0), RATE_HZ)
        session.end_of_audio()
        assert equal(list(session), run_whole(engine, speech(2.0)))


@pytest.mark.parametrize("pcm", [np.array(0.5, "f4"), np.zeros((5, 65), "f4"), "sound", None])
def test_bad_audio(engine: Engine, pcm: Any) -> None:
    async def work() -> None:
        async with await aopen(engine) as session:
            for timeout_s in (0.0, None):
                with pytest.raises(InputError, match="pcm: expected"):
                    await session.apush_audio(pcm, RATE_HZ, timeout_s=timeout_s)

    run(work())


# ------------------------------------------------------------------------------ the loop


@contextlib.contextmanager
def steps_of_the_loop() -> Iterator[list[tuple[float, float]]]:
    """How long each one computed and how long it took, in milliseconds."""
    found: list[tuple[float, float]] = []
    plain = asyncio.events.Handle._run
    main = threading.get_ident()

    def timed(handle: asyncio.Handle) -> None:
        begin, computed = time.perf_counter(), time.thread_time()
        plain(handle)
        if threading.get_ident() == main:
            took = time.perf_counter() - begin
            found.append((1e3 * (time.thread_time() - computed), 1e3 * took))

    asyncio.events.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        asyncio.events.Handle._run = plain  # type: ignore[method-assign]


COMPUTES_MS = 5.0
SLOW_MS = 50.0  # what is slow with a real model is made so here
TRIES = 5


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a session may wait for takes its time."""
    methods = (
        *[(Engine, name) for name in ("open_session", "encode_prompt")],
        *[(SessionState, name) for name in ("push", "end_utterance", "interrupt", "end")],
        (Workers, "close"),
    )
    for owner, name in methods:
        monkeypatch.setattr(owner, name, slowly(getattr(owner, name)))


def slowly(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        time.sleep(SLOW_MS / 1e3)
        return method(*arguments, **options)

    return call


async def life(engine: Engine, note: Callable[[str, Awaitable[Any]], Awaitable[Any]]) -> None:
    """Everything that a session can do."""
    session = await note("open", aopen(engine, max_backlog_s=3.0))
    await note("push", session.apush_audio(speech(2.8), RATE_HZ))
    await note("chunk", session.anext_chunk())
    await note("push and wait", session.apush_audio(speech(0.5), RATE_HZ, timeout_s=None))
    await note("prompt", session.aset_prompt("Laughing."))
    await note("end of utterance", session.aend_of_utterance())
    await note("interrupt", session.ainterrupt())
    await note("push again", session.apush_audio(speech(1.0), RATE_HZ))
    await note("end of audio", session.aend_of_audio())
    await note("close", session.aclose())


@pytest.mark.slow
def test_nothing_holds_up_the_loop(engine: Engine, slow: None) -> None:
    """A step computes for less than 5 ms and waits for nothing that is slow. Each also waits for
    whoever else computes on the machine, so the best of a few lives counts: what holds up the loop
    by itself does so in every one."""
    best: dict[str, tuple[float, float]] = {}

    async def work(steps: list[tuple[float, float]]) -> None:
        async def note(name: str, doing: Awaitable[Any]) -> Any:
            steps.clear()
            result = await doing
            computed, took = (max(column) for column in zip((0.0, 0.0), *steps, strict=True))
            least = best.get(name, (computed, took))
            best[name] = min(least[0], computed), min(least[1], took)
            return result

        await life(engine, note)

    for _ in range(TRIES):
        with steps_of_the_loop() as steps:
            run(work(steps))
    held_up = {
        name: (computed, took)
        for name, (computed, took) in best.items()
        if computed > COMPUTES_MS or took > SLOW_MS / 2
    }
    assert len(best) == 10 and held_up == {}, f"of {best}"
