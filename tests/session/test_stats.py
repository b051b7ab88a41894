"""What a session and its engine say of themselves."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from liveact.engine import Engine
from liveact.errors import LiveActError, SessionError
from liveact.session.playback import PlaybackClock
from liveact.session.session import Session
from tests.support.pipeline import Background, demo_checkpoint, in_time, speech
from tests.support.session import (
    RATE_HZ,
    Gate,
    decoder_of,
    fail,
    open_session,
    stream_of,
    take,
    wait_until,
)


def state_of(session: Session) -> str:
    return session.stats().state


def test_the_states_of_a_session(engine: Engine) -> None:
    with open_session(engine) as session:
        assert state_of(session) == "waiting"
        session.push_audio(speech(1.2), RATE_HZ)
        assert state_of(session) == "speaking"
        session.end_of_utterance()
        for _ in range(6 + 8):
            in_time(session.next_chunk)
        assert state_of(session) == "waiting"
        session.push_audio(speech(1.0), RATE_HZ)
        session.interrupt()
        wait_until(lambda: state_of(session) == "waiting", "it still speaks")
        session.push_audio(speech(1.0), RATE_HZ)
        session.end_of_audio()
        take(session)
        assert state_of(session) == "ended"
    found = session.stats()
    assert found.state == "closed" and found.device_bytes == 0
    assert (found.interruptions, found.backlog_s, found.lag_s) == (1, 0.0, 0.0)


def test_a_silent_person_idles_and_a_failed_one_says_so(engine: Engine) -> None:
    with open_session(engine, idle="silence") as session:
        in_time(session.next_chunk)
        assert state_of(session) == "idling"
        stream_of(session).denoise = fail
        session.push_audio(speech(2.5), RATE_HZ)
        wait_until(lambda: state_of(session) == "failed", "it has not failed")
        with pytest.raises(SessionError, match="out of luck"):
            while True:
                session.push_audio(speech(1.0), RATE_HZ, timeout_s=None)


def test_what_is_counted(engine: Engine) -> None:
    with open_session(engine) as session:
        empty = session.stats()
        assert (empty.blocks, empty.frames, empty.chunks_waiting, empty.latents_waiting) == (0,) * 4
        assert (empty.underruns, empty.stalled_s, empty.backlog_s, empty.lag_s) == (0,) * 4
        gate = Gate(decoder_of(session), "decode")
        session.push_audio(speech(6.0), RATE_HZ)
        session.end_of_utterance()
        gate.wait()
        # One is being decoded, one waits for that, the next one cannot be put beside it.
        wait_until(lambda: session.stats().blocks == 3, "three blocks are not begun")
        wait_until(lambda: session.stats().latents_waiting == 1, "no block waits")
        found = session.stats()
        assert found.frames == 0 and found.utterance == 1 and 0 < found.backlog_s < 6
        gate.open()
        wait_until(lambda: session.stats().chunks_waiting == 16, "the queue is not full")
        for _ in range(3):
            in_time(session.next_chunk)
        assert session.stats().frames == 1 + 4 + 4
        assert session.stats().device_bytes > stream_of(session).device_bytes > 0


def test_lag_and_underruns(engine: Engine) -> None:
    with open_session(engine) as session:
        gate = Gate(stream_of(session), "denoise")
        assert session.lag_s == 0
        session.push_audio(speech(6.0), RATE_HZ)
        gate.wait()
        time.sleep(0.3)
        assert session.lag_s >= 0.29, "nothing was shown since it began"
        first = Background(session.next_chunk)
        gate.open(1)
        first.result()
        # Of 21 frames, 1.05 s: there already, however long they took.
        wait_until(lambda: session.stats().chunks_waiting == 5, "no whole block")
        for _ in range(5):
            in_time(session.next_chunk)
        assert session.stats().underruns == 0, "the beginning of something follows on nothing"
        assert session.lag_s == 0, "a second is played now"
        gate.wait()
        wait_until(lambda: session.lag_s > 0.3, "nothing is overdue")
        waiting = Background(session.next_chunk)
        assert waiting.running(for_s=0.4)
        gate.open()
        waiting.result()
        found = session.stats()
        assert found.underruns == 1 and 0.3 < found.stalled_s < 20
        for _ in range(7):  # of the same block: there already, or played much longer than made
            in_time(session.next_chunk)
        assert session.stats().underruns == 1


def test_who_asks_late_has_no_underrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.2 s a chunk, on a clock of our own."""
    now_s = 100.0
    monkeypatch.setattr("liveact.session.playback.time.monotonic", lambda: now_s)
    clock = PlaybackClock(Fraction(20))
    assert clock.late_s(99.0) == 1.0, "since it is wanted"
    clock.take(4, asked_s=99.0, follows_on=False)
    assert (clock.underruns, clock.pts) == (0, 0.2)
    now_s = 101.0  # the player comes back after 0.8 s: it was there all the time
    clock.take(4, asked_s=101.0, follows_on=True)
    assert clock.underruns == 0
    now_s = 101.2  # in time to the moment
    clock.take(4, asked_s=101.1, follows_on=True)
    assert clock.underruns == 0
    now_s = 101.7  # wanted at 101.4
    clock.take(4, asked_s=101.3, follows_on=True)
    assert (clock.underruns, clock.stalled_s) == (1, pytest.approx(0.3))
    now_s = 102.5  # the same, but nobody was in the middle of anything
    clock.take(4, asked_s=102.0, follows_on=False)
    assert clock.underruns == 1


def test_an_engine() -> None:
    engine = Engine.load(demo_checkpoint(), device="cpu")
    try:
        before = engine.stats()
        assert (before.sessions, before.sessions_opened, before.cached_prompts) == ((), 0, 0)
        with open_session(engine) as first, open_session(engine, seed=1) as second:
            found = engine.stats()
            assert [s.name for s in found.sessions] == [first.name, second.name]
            assert (found.sessions_opened, found.cached_prompts, found.cached_pictures) == (2, 1, 1)
            assert found.device_bytes > before.device_bytes
            first.close()
            assert [s.name for s in engine.stats().sessions] == [second.name]
        assert engine.stats().sessions == ()
        assert engine.stats().device_bytes == before.device_bytes
    finally:
        engine.close()
    with pytest.raises(LiveActError, match="closed"):
        engine.stats()
