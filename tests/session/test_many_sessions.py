"""Sessions that come and go by the hundred: nothing of them stays, whatever became of them."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from liveact.engine import Engine
from liveact.errors import SessionError
from liveact.session.session import Session
from tests.support.pipeline import speech
from tests.support.session import (
    RATE_HZ,
    decoder_of,
    fail,
    open_session,
    stream_of,
    take,
    wait_until,
    workers,
)

SESSIONS = 200
WARM = 40
# Of the whole process, over 160 sessions. A context that stayed would be 54 MB, a picture of one
# block 0.1 MB; glibc's arenas move by a few.
GROWTH_MIB = 24


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def held(engine: Engine) -> tuple[int, int, int, int]:
    """Threads, open files, sessions, bytes of the device."""
    stats = engine.stats()
    files = len(os.listdir("/proc/self/fd"))
    return threading.active_count(), files, len(stats.sessions), stats.device_bytes


def finish(session: Session) -> None:
    session.end_of_audio()
    take(session)
    session.close()


def close_in_a_block(session: Session) -> None:
    session.close()


def drop_in_a_block(session: Session) -> None:
    del session


def die_in_a_block(session: Session) -> None:
    stream_of(session).denoise = fail
    with pytest.raises(SessionError, match="out of luck"):
        session.push_audio(speech(2.0), RATE_HZ)
        session.end_of_audio()
        take(session)


ENDS = (finish, drop_in_a_block, close_in_a_block, drop_in_a_block, die_in_a_block)


@pytest.mark.slow
@pytest.mark.alone  # the memory of a process that has done much else moves by itself
def test_two_hundred_sessions_leave_nothing(engine: Engine) -> None:
    random = np.random.default_rng(0)
    gc.collect()
    before = held(engine)
    warm_mib = 0.0
    for number in range(SESSIONS):
        idle = "silence" if number % 3 == 0 else "wait"
        session = open_session(engine, idle=idle)
        session.push_audio(speech(2.0, seed=number), RATE_HZ)
        time.sleep(random.uniform(0.0, 0.05))
        end = ENDS[number % len(ENDS)]
        if end is drop_in_a_block:
            del session  # the only reference
        else:
            end(session)
            del session
        if number == WARM:
            warm_mib = settled_mib()
    late_mib = settled_mib()
    gc.collect()
    assert held(engine) == before
    assert late_mib - warm_mib < GROWTH_MIB, f"{warm_mib:.0f} MiB, then {late_mib:.0f}"


def settled_mib() -> float:
    wait_until(lambda: not workers(), "workers are left over", timeout_s=60)
    gc.collect()
    return resident_mib()


def test_a_session_that_fails_leaves_the_others_alone(engine: Engine) -> None:
    with open_session(engine) as alone:
        alone.push_audio(speech(2.0), RATE_HZ)
        alone.end_of_audio()
        expected = [chunk.frames for chunk in take(alone)]
    with open_session(engine) as good:
        good.push_audio(speech(2.0), RATE_HZ)
        for _ in range(5):
            die_in_a_block(open_session(engine))
        good.end_of_audio()
        found = [chunk.frames for chunk in take(good)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_session_freed_goes_back_to_the_system(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and when all of it is free."""
    trimmed: list[tuple[int, int]] = []
    session = open_session(engine)
    decoder = decoder_of(session)
    monkeypatch.setattr(
        "liveact.session.workers._malloc_trim",
        lambda keep: trimmed.append((keep, decoder.size_bytes)),
    )
    session.push_audio(speech(2.0), RATE_HZ)
    next(session)
    session.close()
    session.close()
    assert trimmed == [(0, 0)]
