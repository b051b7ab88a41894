"""Interruptions of a session at any moment: what comes out before and after."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest

from liveact.engine import Engine
from liveact.errors import InputError, SessionError
from liveact.session.chunk import Chunk
from liveact.session.session import Session
from liveact.session.state import CHUNK_QUEUE_LENGTH
from tests.support.pipeline import (
    Background,
    in_time,
    speech,
)
from tests.support.session import (
    RATE_HZ,
    Gate,
    decoder_of,
    open_session,
    stream_of,
    take,
    wait_until,
    workers,
)

# ------------------------------------------------------------------------------ interruptions


NEW = 0.5  # what is said after an interruption; before it there is speech, which has no such runs


def speak_on(session: Session, seconds: float = 2.0) -> list[Chunk]:
    """New audio after an interruption, to the end; checks where and how it comes out."""
    said = np.full((round(seconds * RATE_HZ), 1), NEW, np.float32)
    session.push_audio(said, RATE_HZ)
    session.end_of_audio()
    chunks = take(session)
    assert chunks, "nothing came out"
    for before, after in itertools.pairwise(chunks):
        assert after.pts == pytest.approx(before.pts + len(before.frames) / 20)
    sound = np.concatenate([chunk.pcm for chunk in chunks])
    assert (sound[: len(said)] == NEW).all() and not sound[len(said) :].any()
    frames = sum(len(chunk.frames) for chunk in chunks)
    assert frames == max(1, round(np.ceil(seconds * 20))), "as long as what was said, to a frame"
    assert {chunk.utterance for chunk in chunks} == {chunks[0].utterance}
    assert [chunk.last_of_utterance for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return chunks


def test_interrupt_before_any_audio(engine: Engine) -> None:
    with open_session(engine) as session:
        session.interrupt()
        session.interrupt()
        assert speak_on(session)[0].block == 0


def test_interrupt_after_a_little_audio(engine: Engine) -> None:
    with open_session(engine) as session:
        session.push_audio(speech(0.5), RATE_HZ)
        session.interrupt()
        assert speak_on(session)[0].block == 0


def test_interrupt_while_waiting_for_audio(engine: Engine) -> None:
    with open_session(engine) as session:
        session.push_audio(speech(2.0), RATE_HZ)
        first = [in_time(session.next_chunk) for _ in range(6)]
        waiting = Background(session.next_chunk)
        assert waiting.running(0.1)
        session.interrupt()
        session.interrupt()
        assert waiting.running(0.1), "an interruption is no end"
        said = np.full(RATE_HZ * 2, NEW, np.float32)
        session.push_audio(said, RATE_HZ)
        chunk = waiting.result()
        assert (first[-1].block, chunk.block, chunk.pts) == (0, 1, 21 / 20)
        assert (chunk.pcm == NEW).all()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["encoder", "denoise", "decode", "pcm"])
@pytest.mark.parametrize("block", [0, 1])
def test_interrupt_while_a_worker_works(engine: Engine, where: str, block: int) -> None:
    with open_session(engine) as session:
        audio = session._state.utterance.audio
        target, name = {
            "encoder": (audio, "block_features"),
            "denoise": (stream_of(session), "denoise"),
            "decode": (decoder_of(session), "decode"),
            "pcm": (audio, "pcm"),
        }[where]
        gate = Gate(target, name)
        session.push_audio(speech(8.0), RATE_HZ)
        gate.wait()
        if block:  # everything of block 0 goes through, taken; block 1 comes to the gate
            gate.open(6 if where == "pcm" else 1)
            for _ in range(6):
                assert in_time(session.next_chunk).block == 0
            while gate.entered.acquire(timeout=0.5):
                pass
        session.interrupt()
        gate.open()
        chunks = speak_on(session)
    # In front of the gate one block is at work, behind it up to two more are.
    at_least = block + 1
    assert at_least <= chunks[0].block <= at_least + 3


def test_interrupt_with_full_queues(engine: Engine) -> None:
    with open_session(engine) as session:
        state = session._state
        session.push_audio(speech(20.0), RATE_HZ)
        wait_until(lambda: len(state.chunks) == CHUNK_QUEUE_LENGTH, "the queue never filled")
        wait_until(lambda: state.next_block == 5, "the queues never filled")
        time.sleep(0.3)  # the decode worker waits to put one more
        session.interrupt()
        assert len(state.chunks) <= 1, "only what it had in its hands"
        assert speak_on(session)[0].block == 5


def test_interrupt_while_push_audio_waits(engine: Engine) -> None:
    with open_session(engine, fps=100, max_backlog_s=4) as session:
        gate = Gate(stream_of(session), "denoise")

        def push() -> None:
            while True:
                session.push_audio(piece, RATE_HZ, timeout_s=None)

        piece = speech(1.0)
        pushing = Background(push)
        gate.wait()
        assert pushing.running(0.2), "expected it to wait for room"
        session.interrupt()
        # The piece it waited with is dropped, those after it are new speech.
        gate.open()
        consuming = Background(lambda: [session.next_chunk() for _ in range(40)])
        consuming.result()
        session.close()
        with pytest.raises(SessionError, match="closed"):
            pushing.result()


def test_interrupt_after_the_end_of_audio(engine: Engine) -> None:
    with open_session(engine) as session:
        gate = Gate(stream_of(session), "denoise")
        session.push_audio(speech(8.0), RATE_HZ)
        session.end_of_audio()
        gate.wait()
        session.interrupt()
        gate.open()
        assert take(session) == []
        session.interrupt()
        assert take(session) == []
        with pytest.raises(InputError, match="end_of_audio"):
            session.push_audio(speech(1.0), RATE_HZ)


def test_interrupt_after_everything_was_made(engine: Engine) -> None:
    with open_session(engine) as session:
        session.push_audio(speech(1.0), RATE_HZ)
        session.end_of_audio()
        wait_until(lambda: len(session._state.chunks) == 6, "it never finished")
        wait_until(lambda: not workers(), "it never finished")
        assert session.next_chunk() is not None
        session.interrupt()
        assert take(session) == [], "what was not taken yet is dropped"


def test_end_of_audio_after_an_interruption_without_a_word(engine: Engine) -> None:
    with open_session(engine) as session:
        session.interrupt()
        session.end_of_audio()
        session.end_of_audio()
        assert take(session) == []
    with open_session(engine) as session:
        session.push_audio(speech(1.4), RATE_HZ)
        assert in_time(session.next_chunk).block == 0
        session.interrupt()
        session.push_audio(speech(0), RATE_HZ)
        session.end_of_audio()
        assert take(session) == []


@pytest.mark.parametrize("seconds", [0.01, 0.3, 0.54, 1.59, 1.6])
def test_a_word_after_an_interruption_is_heard_whole(engine: Engine, seconds: float) -> None:
    with open_session(engine) as session:
        session.push_audio(speech(1.4), RATE_HZ)
        assert in_time(session.next_chunk).block == 0
        session.interrupt()
        chunks = speak_on(session, seconds)
        assert len(np.concatenate([c.pcm for c in chunks])) >= seconds * RATE_HZ


def test_an_utterance_brings_its_own_format(engine: Engine) -> None:
    """What comes out keeps that of the session, which is that of its first sound."""
    with open_session(engine) as session:
        session.push_audio(speech(1.4), RATE_HZ)
        with pytest.raises(InputError, match="began with 16000 Hz, 1"):
            session.push_audio(speech(1.0, channels=2), RATE_HZ)
        assert in_time(session.next_chunk).block == 0
        session.interrupt()
        with pytest.raises(InputError, match="sample rate"):
            session.push_audio(speech(0.1), 10**12)
        with pytest.raises(InputError, match="float32"):
            session.push_audio(speech(0.1).astype("f8"), RATE_HZ)
        said = (np.full((12_000, 2), NEW) * 32_768).astype("i2")
        session.push_audio(said, 24_000)
        session.end_of_audio()
        chunks = take(session)
        assert {(c.sample_rate_hz, c.pcm.shape[1]) for c in chunks} == {(16_000, 1)}
        sound = np.concatenate([c.pcm for c in chunks])
        assert len(sound) == 8_000 and np.abs(sound[400:-400] - NEW).max() < 1e-3


@pytest.mark.slow
def test_interruptions_at_random_moments(engine: Engine) -> None:
    """200 ms of noise is told from the next by its level; none may come out after its time."""
    rng = np.random.default_rng(0)
    with open_session(engine) as session:
        level = 0.0
        lock = threading.Lock()
        got: list[tuple[float, Chunk]] = []

        def consume() -> None:
            while (chunk := session.next_chunk()) is not None:
                with lock:
                    got.append((level, chunk))

        consuming = Background(consume)
        for i in range(1, 9):
            said = np.full(RATE_HZ * 4, i / 10, np.float32)
            session.push_audio(said, RATE_HZ)
            time.sleep(rng.uniform(0, 0.4))
            session.interrupt()
            with lock:
                level = (i + 0.5) / 10
        session.push_audio(np.full(RATE_HZ * 4, 0.9, np.float32), RATE_HZ)
        session.end_of_audio()
        consuming.result()
    # One chunk may have been on its way to the caller while it interrupted.
    late = [chunk for then, chunk in got if chunk.pcm.any() and chunk.pcm.max() < then - 0.06]
    assert len(late) == 0
    times = [chunk.pts for _, chunk in got]
    assert times == sorted(set(times))
    assert got[-1][1].pcm.max() in (np.float32(0.9), 0.0)
