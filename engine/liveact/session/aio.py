"""What blocks, off the event loop: the other half of the methods of `Session` that begin with `a`.

Chunks and space for audio are awaited without a thread; what computes or waits for a worker runs in
one of a few threads of its own, so that neither the loop nor its default executor is held up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from liveact.audio.samples import as_float
from liveact.errors import BacklogFull
from liveact.session.chunk import Chunk
from liveact.session.state import SessionState

MAX_THREADS = 32  # calls at a time, of all sessions; more wait for their turn
PIECE_S = 0.1  # of audio that are pushed at once where space is waited for

_threads = ThreadPoolExecutor(MAX_THREADS, "liveact-async")

P = ParamSpec("P")
T = TypeVar("T")


class _Closes(Protocol):
    def close(self) -> None: ...


S = TypeVar("S", bound=_Closes)


async def off_loop(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """The result of a call in a thread. Once begun it runs to its end, also when the caller is
    cancelled."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, functools.partial(call, *arguments, **options))


async def opened(open_session: Callable[[], S]) -> S:
    """What a call opens in a thread; it is closed again where the caller is cancelled meanwhile."""
    opening = _threads.submit(open_session)
    try:
        return await asyncio.wrap_future(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_result)
        raise


def _close_result(opening: Future[Any]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        _threads.submit(opening.result().close)


async def take(state: SessionState, timeout_s: float | None) -> Chunk | None:
    """`SessionState.take`. A caller that is cancelled has lost no chunk."""
    asked_s = time.monotonic()
    with _changes(state) as changed:
        async with asyncio.timeout(timeout_s):
            while True:
                changed.clear()
                try:
                    return state.take(0, asked_s)
                except TimeoutError:
                    await changed.wait()


async def push(
    state: SessionState, pcm: npt.NDArray[Any], sample_rate_hz: int, timeout_s: float | None
) -> None:
    """`SessionState.push`. Of a caller that is cancelled a part was pushed."""
    if timeout_s == 0:
        await off_loop(state.push, pcm, sample_rate_hz, 0.0)
        return
    pcm = await off_loop(as_float, pcm)
    pieces = np.array_split(pcm, max(1, -(-len(pcm) // int(PIECE_S * sample_rate_hz))))
    epoch, deadline_s = state.epoch, None
    if timeout_s is not None:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
    with _changes(state) as changed:
        for piece in pieces:
            while True:
                changed.clear()
                try:
                    await off_loop(state.push, piece, sample_rate_hz, 0.0, epoch)
                    break
                except BacklogFull:
                    if not await _changed_by(deadline_s, changed):
                        raise


async def _changed_by(deadline_s: float | None, changed: asyncio.Event) -> bool:
    """Waits for a change; False when `deadline_s`, of the loop's clock, came first."""
    try:
        async with asyncio.timeout_at(deadline_s):
            return await changed.wait()
    except TimeoutError:
        return False


@contextmanager
def _changes(state: SessionState) -> Iterator[asyncio.Event]:
    """An event that is set whenever something of a session changes."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(changed.set)

    with state.listening(wake):
        yield changed
