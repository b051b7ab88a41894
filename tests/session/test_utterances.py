"""A conversation: ends of utterances, idling, back-pressure, and what an interruption leaves."""

from __future__ import annotations

import itertools
import resource
import threading
import time

import numpy as np
import pytest

from liveact.engine import Engine
from liveact.errors import BacklogFull, InputError, SessionError
from liveact.session.chunk import Chunk
from liveact.session.session import Session
from tests.support.pipeline import Background, in_time, speech
from tests.support.session import (
    RATE_HZ,
    Gate,
    decoder_of,
    open_session,
    stream_of,
    take,
    wait_until,
)


def frames_of(chunks: list[Chunk]) -> int:
    return sum(len(chunk.frames) for chunk in chunks)


def take_utterance(session: Session) -> list[Chunk]:
    """Chunks up to the last of the block in which an utterance ends."""
    chunks = [in_time(session.next_chunk)]
    while not any(chunk.last_of_utterance for chunk in chunks) or not chunks[-1].last_of_block:
        chunks.append(in_time(session.next_chunk))
    return chunks


def said_in(chunks: list[Chunk], number: int) -> np.ndarray:
    return np.concatenate([c.pcm for c in chunks if c.utterance == number and c.speech])


# ------------------------------------------------------------------------- ends of utterances


@pytest.mark.parametrize("seconds", [0.01, 1.05, 1.06, 2.0, 2.65, 3.2])
def test_an_utterance_comes_out_to_its_end_and_the_session_goes_on(
    engine: Engine, seconds: float
) -> None:
    with open_session(engine) as session:
        heard: list[Chunk] = []
        for number in range(3):
            sound = speech(seconds, seed=number)
            session.push_audio(sound, RATE_HZ)
            assert session.end_of_utterance() == number
            chunks = take_utterance(session)
            heard += chunks
            assert {chunk.utterance for chunk in chunks} == {number}
            assert sum(chunk.last_of_utterance for chunk in chunks) == 1
            said = said_in(chunks, number)
            assert np.array_equal(said[: len(sound)], sound) and not said[len(sound) :].any()
            spoken = [chunk for chunk in chunks if chunk.speech]
            assert spoken[-1].last_of_utterance
            # Rounded up to a latent frame; before it comes less than one.
            assert seconds * 20 <= frames_of(spoken) < seconds * 20 + 4
        with pytest.raises(TimeoutError):
            session.next_chunk(0.2)
        blocks = [chunk.block for chunk in heard]
        assert blocks == sorted(blocks) and set(blocks) == set(range(blocks[-1] + 1))
    for before, after in itertools.pairwise(heard):
        assert after.pts == pytest.approx(before.pts + len(before.frames) / 20)


def test_utterances_may_be_pushed_ahead(engine: Engine) -> None:
    """Each keeps to itself, in its own format; nothing is lost between them."""
    formats = [(16_000, 1), (44_100, 2), (8_000, 1)]
    with open_session(engine, sample_rate=16_000, channels=1) as session:
        for number, (rate_hz, channels) in enumerate(formats):
            tone = np.full((round(rate_hz * 1.3), channels), (number + 1) / 8, np.float32)
            session.push_audio(tone, rate_hz)
            assert session.end_of_utterance() == number
        assert session.end_of_utterance() is None, "nothing was said"
        session.end_of_audio()
        chunks = take(session)
    for number in range(len(formats)):
        said = said_in(chunks, number)
        assert len(said) >= 1.3 * 16_000
        inner = said[400 : round(1.3 * 16_000) - 400]
        assert np.abs(inner - (number + 1) / 8).max() < 2e-3
    assert [c.utterance for c in chunks if c.last_of_utterance] == [0, 1, 2]


def test_after_the_end_there_is_no_utterance(engine: Engine) -> None:
    with open_session(engine) as session:
        session.push_audio(speech(1.0), RATE_HZ)
        session.end_of_utterance()
        session.end_of_audio()
        chunks = take(session)
        assert chunks[-1].last_of_block and frames_of(chunks) == 21, "to the end of its block"
        for call in (session.end_of_utterance, lambda: session.push_audio(speech(0.1), RATE_HZ)):
            with pytest.raises(InputError, match="end_of_audio"):
                call()


@pytest.mark.slow
@pytest.mark.parametrize("fps", [20, 24, 30])
@pytest.mark.parametrize("seconds", [1.55, 2.0, 3.15, 5.0])
def test_a_film_is_as_long_as_its_sound(engine: Engine, seconds: float, fps: float) -> None:
    with open_session(engine, fps=fps) as session:
        session.push_audio(speech(seconds), RATE_HZ)
        session.end_of_audio()
        chunks = take(session)
    frames = int(np.ceil(round(seconds * fps, 6)))
    assert frames_of(chunks) == frames
    assert sum(len(chunk.pcm) for chunk in chunks) == round(frames * RATE_HZ / fps)
    assert chunks[-1].last_of_utterance and chunks[-1].last_of_block
    assert chunks[-1].timings.block is not None


@pytest.mark.slow
@pytest.mark.parametrize("slots", [(2, 2, 2, 6), (2, 4, 2, 8), (2, 2, 2, 4), (1, 0, 1, 3)])
def test_other_slots(engine: Engine, slots: tuple[int, int, int, int]) -> None:
    """The block sizes of the paper's Table 5 among them: memory and block 6/6 and 8/8."""
    from liveact.dit.dit import MemoryPolicy

    sound = speech(4.0)
    with open_session(engine, memory=MemoryPolicy(slots=slots)) as session:
        session.push_audio(sound, RATE_HZ)
        session.end_of_utterance()
        first = take_utterance(session)
        session.push_audio(sound, RATE_HZ)
        session.end_of_audio()
        chunks = first + take(session)
    context, current = sum(slots[:3]), slots[3]
    blocks = [sum(len(c.frames) for c in chunks if c.block == b) for b in range(4)]
    assert blocks[:2] == [4 * context - 3, 4 * current]
    for number in (0, 1):
        assert np.array_equal(said_in(chunks, number)[: len(sound)], sound)


# ---------------------------------------------------------------------------------- idling


class Player(threading.Thread):
    """Plays at pace from the first chunk on; notes when it had each."""

    def __init__(self, session: Session) -> None:
        super().__init__(daemon=True)
        self.session = session
        self.had: list[tuple[float, Chunk]] = []
        self.late_s = 0.0

    def run(self) -> None:
        start_s = None
        try:
            while (chunk := self.session.next_chunk()) is not None:
                now_s = time.monotonic()
                start_s = start_s or now_s
                self.had.append((now_s, chunk))
                due_s = start_s + chunk.pts
                self.late_s = max(self.late_s, now_s - due_s)
                time.sleep(max(0.0, due_s + len(chunk.frames) / 20 - now_s - 0.05))
        except SessionError:
            pass


@pytest.mark.slow
def test_a_silent_person_lives_on_and_speaks_at_once(engine: Engine) -> None:
    with open_session(engine, idle="silence") as session:
        player = Player(session)
        player.start()
        time.sleep(2.5)
        made = session._state.next_block
        assert 2 <= made <= 3, "idling is made just in time, not ahead"
        said_s = time.monotonic()
        session.push_audio(speech(1.0), RATE_HZ)
        session.end_of_utterance()
        wait_until(lambda: player.had[-1][1].last_of_utterance, "it was never said")
        wait_until(lambda: player.had[-1][0] > said_s + 3.5, "it does not live on")
    chunks = [chunk for _, chunk in player.had]
    first = next(i for i, chunk in enumerate(chunks) if chunk.speech)
    assert all(not chunk.pcm.any() for chunk in chunks[:first]) and not chunks[-1].speech
    assert {(c.sample_rate_hz, c.pcm.shape[1]) for c in chunks} == {(48_000, 1)}
    assert chunks[first].block <= made + 1, "speech waits for the block that idles, not for another"
    assert player.had[first][0] - said_s < 5.0
    assert player.late_s < 5.0
    for before, after in itertools.pairwise(chunks):
        assert after.pts == pytest.approx(before.pts + len(before.frames) / 20)
        assert len(before.pcm) == pytest.approx(len(before.frames) * 2_400, abs=1)


def test_idling_waits_for_its_player(engine: Engine) -> None:
    """Nobody takes a chunk: one block is made, and no more."""
    with open_session(engine, idle="silence") as session:
        wait_until(lambda: len(session._state.chunks) == 6, "no first picture")
        time.sleep(0.5)
        assert session._state.next_block == 1


def test_idling_that_was_not_taken_goes_when_speech_is_there(engine: Engine) -> None:
    with open_session(engine, idle="silence") as session:
        assert not in_time(session.next_chunk).speech
        wait_until(lambda: len(session._state.chunks) == 5, "no first block")
        gate = Gate(decoder_of(session), "decode")
        session.push_audio(speech(2.0), RATE_HZ)
        gate.wait()
        chunk = in_time(session.next_chunk)
        assert not chunk.speech and chunk.pts == 1 / 20, "nothing else is there to be looked at"
        gate.open()
        wait_until(lambda: session._state._spoken_from >= 1, "speech does not arrive")
        chunk = in_time(session.next_chunk)
        assert chunk.speech and chunk.pts == 5 / 20


@pytest.mark.slow
def test_a_person_lives_on_while_speech_comes_at_its_pace(engine: Engine) -> None:
    """A block of 1.6 s waits for its sound, and what idles would last for less."""
    with open_session(engine, idle="silence", max_backlog_s=None) as session:
        player = Player(session)
        player.start()
        wait_until(lambda: session.stats().frames > 40, "it does not idle")
        said = speech(2.5)
        late_s, said_s = player.late_s, time.monotonic()
        for start in range(0, len(said), RATE_HZ // 50):
            due_s = said_s + start / RATE_HZ
            time.sleep(max(0.0, due_s - time.monotonic()))
            session.push_audio(said[start : start + RATE_HZ // 50], RATE_HZ, timeout_s=None)
        session.end_of_utterance()
        wait_until(lambda: player.had[-1][1].last_of_utterance, "it was never said")
        chunks = [(at_s, chunk) for at_s, chunk in player.had if at_s > said_s]
        first_s = next(at_s for at_s, chunk in chunks if chunk.speech)
        idled = sum(len(chunk.frames) for at_s, chunk in chunks if at_s < first_s)
        assert first_s - said_s > 1.6, "before it was said"
        assert idled / 20 > 1.0, "a face that stands still"
        assert player.late_s - late_s < first_s - said_s - 1.6, "no longer than a block is made"
        heard = [chunk.pcm for _, chunk in chunks if chunk.speech]
        assert sum(map(len, heard)) == pytest.approx(2.5 * 48_000, abs=4 / 20 * 48_000)


@pytest.mark.alone
def test_a_waiting_session_costs_nothing(engine: Engine) -> None:
    with open_session(engine) as session:
        session.push_audio(speech(1.5), RATE_HZ)
        session.end_of_utterance()
        take_utterance(session)
        waiting = Background(session.next_chunk)
        before_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        assert waiting.running(2.0)
        used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before_s
        assert used_s < 0.01 * 2.0, "1 % of a core"
        session.close()
        with pytest.raises(SessionError):
            waiting.result()


# ------------------------------------------------------------------------------ back-pressure


def test_a_session_holds_a_few_seconds(engine: Engine) -> None:
    with open_session(engine, max_backlog_s=None) as session:
        denoise = stream_of(session).denoise
        go_on = threading.Event()
        stream_of(session).denoise = lambda *inputs: (go_on.wait(30), denoise(*inputs))[1]
        session.push_audio(speech(2.0), RATE_HZ)
        wait_until(lambda: session._state.next_block == 1, "block 0 never began")
        assert session.backlog_s == pytest.approx(2.0 - 21 / 20)
        with pytest.raises(BacklogFull, match=r"at most 3 s .* found 2\.5 s on top of"):
            session.push_audio(speech(2.5), RATE_HZ)
        assert session.backlog_s == pytest.approx(2.0 - 21 / 20), "nothing of it was taken"
        started_s = time.monotonic()
        with pytest.raises(BacklogFull):
            session.push_audio(speech(2.5), RATE_HZ, timeout_s=0.3)
        assert 0.3 <= time.monotonic() - started_s < 5
        assert session.backlog_s == pytest.approx(3.0, abs=1e-3), "what had space was taken"
        pushing = Background(session.push_audio, speech(6.0), RATE_HZ, timeout_s=None)
        assert pushing.running(0.2)
        go_on.set()
        consuming = Background(lambda: [session.next_chunk() for _ in range(30)])
        pushing.result()
        consuming.result()


def test_a_backlog_that_no_block_would_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"max_backlog_s: expected 1\.9 to 1e\+09, found 1"):
        open_session(engine, max_backlog_s=1)


# ------------------------------------------------------------------------------ interruptions


def test_an_interruption_says_what_was_delivered(engine: Engine) -> None:
    with open_session(engine) as session:
        assert session.interrupt() == (0, 0.0)
        session.push_audio(speech(4.0), RATE_HZ)
        for _ in range(8):
            in_time(session.next_chunk)
        assert session.interrupt() == (0, 29 / 20)
        assert session.interrupt() == (1, 0.0)
        session.push_audio(speech(1.0), RATE_HZ)
        session.end_of_utterance()
        chunks = take_utterance(session)
        assert chunks[0].utterance == 1 and chunks[0].pts == pytest.approx(29 / 20)
        assert session.interrupt() == (2, 0.0), "it was delivered to its end"
        session.push_audio(speech(1.0), RATE_HZ)
        session.end_of_audio()
        assert {chunk.utterance for chunk in take(session)} == {2}


@pytest.mark.slow
def test_nothing_of_what_was_interrupted_comes_out_afterwards(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    with open_session(engine, idle="silence") as session:
        player = Player(session)
        player.start()
        for i in range(1, 7):
            session.push_audio(np.full(RATE_HZ * 2, i / 10, np.float32), RATE_HZ)
            session.end_of_utterance()
            time.sleep(rng.uniform(0, 0.5))
            session.interrupt()
            time.sleep(0.06)  # what the player had in its hands
            count = len(player.had)
            time.sleep(0.3)
            assert not any(chunk.pcm.any() for _, chunk in player.had[count:])
