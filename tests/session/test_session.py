"""A session under use and misuse: what it delivers, prompts, ends and errors at any moment."""

from __future__ import annotations

import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from liveact.engine import Engine
from liveact.errors import InputError, SessionError
from liveact.session.state import CHUNK_QUEUE_LENGTH
from liveact.session.turn import PromptEdit
from tests.support.paths import PORTRAIT
from tests.support.pipeline import ONE_THREAD, Background, demo_checkpoint, in_time, speech
from tests.support.session import (
    BLOCK_S,
    RATE_HZ,
    Gate,
    decoder_of,
    fail,
    open_session,
    pictures,
    run_whole,
    stream_of,
    take,
    wait_until,
    workers,
)

# ------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize(("fps", "blocks"), [(20, 3), (25, 3), (29.97, 2)])
def test_chunks_cover_the_audio_without_gap(engine: Engine, fps: float, blocks: int) -> None:
    rate_hz = 22_050
    seconds = (21 + 32 * (blocks - 2) + 5.5) / fps
    samples = speech(seconds, rate_hz, channels=2)
    with open_session(engine, fps=fps) as session:
        session.push_audio(samples, rate_hz)
        session.end_of_audio()
        chunks = take(session)
        assert session.next_chunk() is None, "and again, not an error"
    # As long as the sound: the last block has 6 of its 32 frames.
    counts = [1] + [4] * 5 + [4] * 8 * (blocks - 2) + [4, 2]
    assert [len(chunk.frames) for chunk in chunks] == counts
    starts = [0, *itertools.accumulate(counts)]
    assert [chunk.pts for chunk in chunks] == [float(f / session.fps) for f in starts[:-1]]
    assert {(chunk.utterance, chunk.speech) for chunk in chunks} == {(0, True)}
    assert [chunk.last_of_utterance for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk.frames.shape[1:] == (32, 32, 3) for chunk in chunks)
    assert all(chunk.frames.dtype == np.uint8 for chunk in chunks)
    expected_blocks = [0] * 6 + [b for b in range(1, blocks - 1) for _ in range(8)]
    expected_blocks += [blocks - 1] * 2
    assert [chunk.block for chunk in chunks] == expected_blocks
    last = [i for i, chunk in enumerate(chunks) if chunk.last_of_block]
    assert last == [5 + 8 * b for b in range(blocks - 1)] + [len(chunks) - 1]

    sound = np.concatenate([chunk.pcm for chunk in chunks])
    assert len(sound) == round(starts[-1] * rate_hz / session.fps)
    heard = min(len(sound), len(samples))
    assert np.array_equal(sound[:heard], samples[:heard])
    assert not sound[heard:].any()

    for i in last:
        timings = chunks[i].timings.block
        assert timings is not None and timings.wait_ms >= 0 and timings.audio_ms > 0
        assert len(timings.step_ms) == 3 and 0 < sum(timings.step_ms) <= timings.denoise_ms
        assert 0 <= timings.overlap_ms <= timings.decode_ms
        of_block = [c.timings.decode_ms for c in chunks if c.block == chunks[i].block]
        assert timings.decode_ms == pytest.approx(sum(of_block)) and min(of_block) > 0
    assert not any(chunk.timings.block for chunk in chunks if not chunk.last_of_block)


def test_the_pace_of_the_audio_changes_nothing(engine: Engine) -> None:
    samples = speech(4.0)
    whole = run_whole(engine, samples)
    rng = np.random.default_rng(0)
    with open_session(engine) as session:

        def push() -> None:
            rest = samples
            while len(rest):
                count = int(rng.integers(0, 9_000))
                session.push_audio(rest[:count, 0] if count % 2 else rest[:count], RATE_HZ)
                rest = rest[count:]
                time.sleep(0.005)
            session.end_of_audio()

        pushing = Background(push)
        live = take(session)
        pushing.result()
    assert np.array_equal(pictures(whole), pictures(live))
    assert [a.pts for a in whole] == [b.pts for b in live]


def test_sessions_at_once_are_as_alone(engine: Engine) -> None:
    """Sharing weights, encoders and decoder does not mix anything, to the last bit."""
    cases: list[dict[str, Any]] = [
        {"seed": 1, "prompt": "One."},
        {"seed": 2, "prompt": "Two.", "memory": "mean", "audio_guidance": 1.5},
        {"seed": 3, "prompt": "Three.", "memory": "sharded", "vae_decode": "windowed"},
    ]
    sounds = [speech(4.0, seed=i) for i in range(3)]

    def start(i: int) -> Background:
        return Background(run_whole, engine, sounds[i], **cases[i])

    alone = [pictures(start(i).result()) for i in range(3)]
    together = [pictures(running.result()) for running in [start(i) for i in range(3)]]
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(alone[0], alone[1])


def test_the_seed_the_sound_and_the_prompt_all_matter(engine: Engine) -> None:
    base = pictures(run_whole(engine, speech(1.0)))
    assert np.array_equal(base, pictures(run_whole(engine, speech(1.0))))
    assert not np.array_equal(base, pictures(run_whole(engine, speech(1.0), seed=1)))
    assert not np.array_equal(base, pictures(run_whole(engine, speech(1.0, seed=1))))
    assert not np.array_equal(base, pictures(run_whole(engine, speech(1.0), prompt="Other.")))


def test_next_chunk_waits_as_long_as_it_is_told(engine: Engine) -> None:
    with open_session(engine) as session:
        start_s = time.monotonic()
        with pytest.raises(TimeoutError):
            session.next_chunk(0.1)
        assert 0.1 <= time.monotonic() - start_s < 10
        session.push_audio(speech(1.4), RATE_HZ)
        assert in_time(session.next_chunk, 20.0).block == 0


def test_a_consumer_that_stops_leaves_bounded_queues(engine: Engine) -> None:
    with open_session(engine) as session:
        session.push_audio(speech(20.0), RATE_HZ)
        state = session._state
        wait_until(lambda: len(state.chunks) == CHUNK_QUEUE_LENGTH, "the queue never filled")
        wait_until(lambda: len(state.latents) == 1, "the queue never filled")
        time.sleep(0.3)
        # Two blocks of chunks (6 + 8 + 2), the third being decoded, one waiting, one denoised.
        assert len(state.chunks) == CHUNK_QUEUE_LENGTH
        assert state.next_block == 5


# ------------------------------------------------------------------------------ prompts


def test_prompts_apply_to_their_blocks(engine: Engine) -> None:
    with open_session(engine) as session:
        heard: list[str] = []
        names = {id(engine.encode_prompt(p)): p for p in ("A person.", "edit", "good", "last")}
        set_prompt = stream_of(session).set_prompt
        stream_of(session).set_prompt = lambda t: (heard.append(names[id(t)]), set_prompt(t))
        gate = Gate(stream_of(session), "denoise")
        session.set_prompt("edit", 1, 2)
        session.set_prompt("good", 4)
        session.set_prompt("last", 5, 5)
        session.push_audio(speech(10.0), RATE_HZ)
        session.end_of_audio()
        gate.open()
        chunks = take(session)
    assert chunks[-1].block == 6
    # Set when it changes: blocks 0 | 1, 2 | 3 | 4 | 5 | 6.
    assert heard == ["A person.", "edit", "A person.", "good", "last", "good"]


def test_a_block_being_made_keeps_its_prompt(engine: Engine) -> None:
    with open_session(engine) as session:
        used: list[torch.Tensor] = []
        set_prompt = stream_of(session).set_prompt
        stream_of(session).set_prompt = lambda text: (used.append(text), set_prompt(text))
        audio = Gate(session._state.utterance.audio, "block_features")
        session.set_prompt("mine", 0, 0)
        session.push_audio(speech(1.4), RATE_HZ)
        audio.wait()  # block 0 is taken; its audio is being encoded
        session.set_prompt("later")
        audio.open()
        assert in_time(session.next_chunk).block == 0
        assert used[0] is engine.encode_prompt("mine")


def test_edits_do_not_accumulate(engine: Engine) -> None:
    with open_session(engine) as session:
        for i in range(300):
            session.set_prompt("a", i % 3)
            session.set_prompt("b", 7, 8)
        assert len(session._state.edits) <= 4
        for blocks in ((-1, None), (3, 2)):
            with pytest.raises(InputError, match="prompt: expected"):
                session.set_prompt("a", *blocks)


@pytest.mark.parametrize(
    ("new", "old", "now", "gone"),
    [
        ((0, None), (7, 8), 0, True),
        ((8, None), (7, 8), 0, False),
        ((8, None), (7, 8), 8, True),
        ((0, 9), (7, 8), 0, True),
        ((0, 9), (7, None), 0, False),
        ((9, 9), (7, 8), 8, False),
        ((9, 9), (7, 8), 9, True),
        ((5, None), (3, None), 5, True),
        ((5, None), (3, None), 4, False),
    ],
)
def test_what_an_edit_replaces(new: Any, old: Any, now: int, gone: bool) -> None:
    text = torch.zeros(1)
    newer, older = PromptEdit(*new, text), PromptEdit(*old, text)
    assert newer.replaces(older, now) is gone
    # The definition: no block from now on would be made with the older one.
    left = [b for b in range(now, 30) if older.applies_to(b) and not newer.applies_to(b)]
    assert gone is (left == [])


# ------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("moment", ["at once", "waiting", "full", "ended", "failed"])
def test_close_at_any_moment(engine: Engine, moment: str) -> None:
    before_bytes = engine.dit.device.allocated_bytes
    session = open_session(engine)
    if moment == "waiting":
        session.push_audio(speech(0.5), RATE_HZ)
    elif moment == "full":
        session.push_audio(speech(20.0), RATE_HZ)
        wait_until(lambda: session._state.next_block == 5, "the queues never filled")
    elif moment == "ended":
        session.push_audio(speech(1.0), RATE_HZ)
        session.end_of_audio()
        take(session)
    elif moment == "failed":
        stream_of(session).denoise = fail
        session.push_audio(speech(1.4), RATE_HZ)
        wait_until(lambda: not workers(), "it never failed")
    in_time(session.close)
    assert not workers()
    assert engine.dit.device.allocated_bytes == before_bytes, "though the session is still held"
    in_time(session.close)
    for call in (
        session.interrupt,
        session.end_of_audio,
        session.next_chunk,
        lambda: session.push_audio(speech(1.0), RATE_HZ),
        lambda: session.set_prompt("x"),
        lambda: next(session),
    ):
        with pytest.raises(SessionError, match="out of luck" if moment == "failed" else "closed"):
            call()


@pytest.mark.parametrize("where", ["encoder", "denoise", "decode"])
def test_close_while_a_worker_works(engine: Engine, where: str) -> None:
    session = open_session(engine)
    target, name = {
        "encoder": (session._state.utterance.audio, "block_features"),
        "denoise": (stream_of(session), "denoise"),
        "decode": (decoder_of(session), "decode"),
    }[where]
    gate = Gate(target, name)
    session.push_audio(speech(8.0), RATE_HZ)
    consuming = Background(lambda: list(session))
    gate.wait()
    closing = [Background(session.close) for _ in range(3)]
    assert closing[0].running(0.05), "it waits for the worker"
    gate.open()
    for one in closing:
        one.result()
    with pytest.raises(SessionError, match="closed"):
        consuming.result()


def test_close_while_push_audio_waits(engine: Engine) -> None:
    session = open_session(engine, fps=100, max_backlog_s=4)

    def push() -> None:
        for _ in range(100):
            session.push_audio(speech(1.0), RATE_HZ, timeout_s=None)

    pushing = Background(push)
    wait_until(lambda: len(session._state.chunks) == CHUNK_QUEUE_LENGTH, "never filled")
    assert pushing.running(0.1)
    in_time(session.close)
    with pytest.raises(SessionError, match="closed"):
        pushing.result()


def test_a_dropped_session_stops_its_workers(engine: Engine) -> None:
    for pushed_s in (0.0, 20.0):
        session = open_session(engine)
        if pushed_s:
            session.push_audio(speech(pushed_s), RATE_HZ)
            assert in_time(session.next_chunk) is not None
        assert len(workers()) == 2
        del session
        gc.collect()
        wait_until(lambda: not workers(), "its workers run on")


@pytest.mark.slow
def test_the_process_ends_without_close(tmp_path: Path) -> None:
    script = f"""
import numpy as np
from liveact import Engine
session = Engine.load({str(demo_checkpoint())!r}, device="cpu").open_session(
    image={str(PORTRAIT)!r}, prompt="A person.", size=(32, 32))
session.push_audio(np.zeros(16_000 * 3, np.float32), 16_000)
print(session.next_chunk().block)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=ONE_THREAD
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("where", ["encoder", "denoise", "decode", "prompt"])
def test_an_error_of_a_worker_reaches_the_caller(engine: Engine, where: str) -> None:
    """Once as the end of the iteration; and another session on the engine goes on unharmed."""
    expected = pictures(run_whole(engine, speech(2.0)))
    with open_session(engine) as session, open_session(engine) as other:
        if where == "encoder":
            session._state.utterance.audio._encoder = type("Broken", (), {"encode": fail})()
        else:
            target = decoder_of(session) if where == "decode" else stream_of(session)
            name = {"decode": "decode", "prompt": "set_prompt"}.get(where, "denoise")
            setattr(target, name, fail)
        for one in (session, other):
            one.push_audio(speech(2.0), RATE_HZ)
        other.end_of_audio()
        with pytest.raises(SessionError, match="out of luck") as caught:
            take(session)
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(SessionError, match="out of luck"):
            session.push_audio(speech(1.0), RATE_HZ)
        assert np.array_equal(pictures(take(other)), expected)


def test_an_error_in_the_middle_comes_after_what_was_made(engine: Engine) -> None:
    with open_session(engine) as session:
        gate = Gate(stream_of(session), "denoise")
        session.push_audio(speech(8.0), RATE_HZ)
        gate.open(1)
        chunks = [in_time(session.next_chunk) for _ in range(6)]
        assert {chunk.block for chunk in chunks} == {0}
        gate._call = fail
        gate.open()
        with pytest.raises(SessionError, match="out of luck"):
            take(session)


def test_noise_that_is_not_finite_is_an_error(engine: Engine) -> None:
    with open_session(engine) as session:
        denoise = stream_of(session).denoise
        stream_of(session).denoise = lambda noise, *rest: denoise(noise * torch.nan, *rest)
        session.push_audio(speech(1.4), RATE_HZ)
        with pytest.raises(SessionError, match="block 0 has a NaN or an infinity"):
            take(session)


def test_too_little_audio_is_an_error_for_both_sides(engine: Engine) -> None:
    for seconds in (0.0, 0.04):
        with open_session(engine) as session:
            session.push_audio(speech(seconds), RATE_HZ)
            with pytest.raises(InputError, match="one video frame"):
                session.end_of_audio()
            with pytest.raises(SessionError, match="one video frame"):
                take(session)


@pytest.mark.parametrize(
    "pcm",
    [np.zeros((5, 65), "f4"), np.zeros(5), np.array(0.5, "f4"), np.full(5, np.nan, "f4"), "sound"],
    ids=["65 channels", "float64", "scalar", "nan", "text"],
)
def test_bad_audio_is_refused_and_the_session_goes_on(engine: Engine, pcm: Any) -> None:
    with open_session(engine) as session:
        with pytest.raises(InputError, match="pcm: expected"):
            session.push_audio(pcm, RATE_HZ)
        session.push_audio(speech(1.0), RATE_HZ)
        session.end_of_audio()
        assert len(take(session)) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"size": (33, 32)},
        {"fps": float("nan")},
        {"seed": 2**63},
        {"memory": "total"},
        {"vae_decode": "fast"},
        {"audio_guidance": float("nan")},
        {"audio_mode": "both"},
        {"image": np.zeros((9, 9), np.float32)},
        {"image": "missing.png"},
        {"prompt": "\ud800"},
        {"trace": "/dev/null/trace.json"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_refused(engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        open_session(engine, **options)


def test_a_picture_is_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each picture and size, whoever asks; another picture is another one."""
    encoded = []
    encode = engine.vae.encode
    monkeypatch.setattr(engine.vae, "encode", lambda v: (encoded.append(v.shape), encode(v))[1])
    image = np.full((64, 64, 3), 90, np.uint8)
    for changed, count in ((0, 1), (0, 1), (1, 2)):
        image[5, 5, 0] += changed
        open_session(engine, image=image, size=(64, 64)).close()
        assert len(encoded) == count
    open_session(engine, image=image, size=(64, 48)).close()
    assert len(encoded) == 3


# ------------------------------------------------------------------------------ endurance


class CheapDecoder:
    """Pictures for nothing, so that the rest of the pipeline can be run for many blocks."""

    def decode(self, latents: torch.Tensor) -> Iterator[npt.NDArray[np.uint8]]:
        assert latents.isfinite().all()
        _, n, h, w = latents.shape
        for i in range(n):
            yield np.zeros((1 if n == 6 and i == 0 else 4, 8 * h, 8 * w, 3), np.uint8)

    def close(self) -> None:
        pass


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("blocks", "decoder"), [(300, CheapDecoder()), (120, None)])
def test_a_long_session_does_not_grow(
    engine: Engine, blocks: int, decoder: CheapDecoder | None
) -> None:
    """8 minutes of audio without the VAE, 3 with it: what grew with the blocks would show.

    What passes through per block is 98 kB of pictures, 102 kB of sound, 51 kB of 16 kHz samples and
    8 kB of latents. Kept, any but the last would add 3.6 to 19 MB from the first mark to the last,
    which comes before the session has made its last block: then it gives its memory back.
    """

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    warm = blocks // 3
    with open_session(engine, max_backlog_s=3) as session:  # audio comes as it is needed
        if decoder is not None:
            pipeline = session._workers._pipeline
            session._workers._pipeline = replace(pipeline, decoder=decoder)
        device = engine.dit.device

        def push() -> None:
            for second in range(int(BLOCK_S * blocks) - 1):
                session.push_audio(speech(1.0, seed=second), RATE_HZ, timeout_s=None)
            session.end_of_audio()

        pushing = Background(push)
        marks: list[tuple[float, int]] = []
        times_ms: list[float] = []
        for chunk in session:
            if (timings := chunk.timings.block) is not None:
                times_ms.append(timings.audio_ms + timings.denoise_ms + timings.decode_ms)
                if chunk.block in (warm, blocks - 9):
                    gc.collect()
                    marks.append((resident_mib(), device.allocation_count))
        pushing.result()
    assert len(times_ms) == blocks
    (early_mib, early_allocations), (late_mib, late_allocations) = marks
    # The first decile: what other processes take from this one does not count.
    early_ms = statistics.quantiles(times_ms[warm // 2 : warm], n=10)[0]
    late_ms = statistics.quantiles(times_ms[-warm // 2 :], n=10)[0]
    print(f"{late_mib - early_mib:+.1f} MiB; {early_ms:.1f} ms a block early, {late_ms:.1f} late")
    assert late_allocations == early_allocations
    assert late_mib - early_mib < 3
    assert late_ms <= 1.5 * early_ms
