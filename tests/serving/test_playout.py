"""What leaves for WebRTC: the two tracks on one timeline, and what a microphone lets through."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from aiortc.codecs.opus import OpusEncoder
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame, VideoFrame

from liveact.audio.samples import as_int16
from liveact.serve.gate import ATTACK_S, HANGOVER_S, PRE_ROLL_S, VoiceGate
from liveact.serve.playout import PACKET_SAMPLES, PLAYOUT_S, SAMPLE_RATE_HZ, Playout
from liveact.session.pacing import Frame

RATE_HZ = SAMPLE_RATE_HZ


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def frames(count: int, fps: Fraction, start_s: float) -> list[Frame]:
    """Every picture has its number as its colour; the sound is a ramp, so that nothing repeats."""
    ends = [int(i * RATE_HZ / fps) for i in range(count + 1)]
    ramp = np.arange(ends[-1], dtype=np.float32)[:, None] % 30_000 / 32_768
    return [
        Frame(
            number=i,
            picture=np.full((32, 32, 3), i, np.uint8),
            pcm=ramp[ends[i] : ends[i + 1]],
            sample_rate_hz=RATE_HZ,
            due_s=start_s + float(i / fps),
            utterance=0,
            speech=True,
            last_of_utterance=False,
        )
        for i in range(count)
    ]


async def play(playout: Playout, shown: list[Frame]) -> None:
    """As a `Pacer` hands them out: each when it is due."""
    loop = asyncio.get_running_loop()
    for frame in shown:
        await asyncio.sleep(frame.due_s - loop.time())
        playout.put(frame)


@pytest.mark.parametrize("fps", [Fraction(20), Fraction(25), Fraction(24_000, 1001), Fraction(30)])
def test_picture_and_sound_have_one_timeline(fps: Fraction) -> None:
    async def work() -> None:
        loop, playout = asyncio.get_running_loop(), Playout()
        shown = frames(12, fps, loop.time())
        playing = asyncio.create_task(play(playout, shown))
        pictures: list[tuple[float, VideoFrame]] = []
        packets: list[tuple[float, AudioFrame]] = []

        async def watch() -> None:
            while len(pictures) < len(shown):
                pictures.append((0.0, await playout.video.recv()))
                pictures[-1] = (loop.time(), pictures[-1][1])

        async def hear() -> None:
            for _ in range(sum(len(f.pcm) for f in shown) // PACKET_SAMPLES):
                packet = await playout.audio.recv()
                packets.append((loop.time(), packet))

        await asyncio.gather(playing, watch(), hear())

        # No gap: the packets are the sound, and each is stamped with its place in it.
        sent = np.concatenate([packet.to_ndarray()[0] for _, packet in packets])
        whole = as_int16(np.concatenate([frame.pcm for frame in shown]))[:, 0]
        np.testing.assert_array_equal(sent, whole[: len(sent)])
        assert [p.pts for _, p in packets] == [i * PACKET_SAMPLES for i in range(len(packets))]
        # Exactly paired: a picture's stamp is the first sample of its sound.
        before = np.cumsum([0, *(len(frame.pcm) for frame in shown)])
        assert [p.pts for _, p in pictures] == [int(n) * 90_000 // RATE_HZ for n in before[:-1]]
        # Never early, for either: what plays at t is sent at t + PLAYOUT_S.
        start_s = shown[0].due_s + PLAYOUT_S
        for at_s, media in [*pictures, *packets]:
            assert at_s >= start_s + float(media.pts * media.time_base) - 1e-4

    run(work())


def test_a_sender_that_is_slow_loses_the_oldest_and_keeps_the_pairing() -> None:
    async def work() -> None:
        playout = Playout()
        for frame in frames(100, Fraction(20), asyncio.get_running_loop().time() - 5):
            playout.put(frame)
        assert (await playout.video.recv()).pts == 98 * 4500
        packet = await playout.audio.recv()
        assert packet.pts == 200 * PACKET_SAMPLES, "one second is kept"
        assert packet.to_ndarray()[0, 0] == packet.pts % 30_000

    run(work())


def test_what_the_clock_left_out_is_left_out_of_both_tracks() -> None:
    async def work() -> None:
        playout, start_s = Playout(), asyncio.get_running_loop().time() - 10
        shown = frames(6, Fraction(24), start_s)
        late_s = 0.13  # six packets, and a half that stays
        shown[3:] = [replace(frame, due_s=frame.due_s + late_s) for frame in shown[3:]]
        pictures, packets = [], []
        for frame in shown:
            playout.put(frame)
            pictures.append(await playout.video.recv())
            while playout.audio.items:
                packets.append(await playout.audio.recv())
        left_out = 6 * PACKET_SAMPLES
        expected = [i * 2000 + left_out * (i >= 3) for i in range(6)]
        assert [picture.pts for picture in pictures] == [n * 90_000 // RATE_HZ for n in expected]
        # 6000 samples before the gap are six packets and 240 samples, which move with what follows.
        silent = packets.pop(6)
        assert not silent.to_ndarray().any()
        assert silent.pts == 11 * PACKET_SAMPLES
        assert [packet.pts // PACKET_SAMPLES for packet in packets] == [*range(6), *range(12, 18)]
        sent = np.concatenate([packet.to_ndarray()[0] for packet in packets])
        np.testing.assert_array_equal(sent, np.arange(len(sent)) % 30_000)
        # As it leaves: only the silent packet is stamped as if there were no gap.
        encoder = OpusEncoder()
        stamps = [encoder.encode(p)[1] for p in [*packets[:6], silent, *packets[6:]]]
        assert [stamp // PACKET_SAMPLES for stamp in stamps] == [*range(7), *range(12, 18)]

    run(work())


def test_after_hush_only_a_fade_is_heard() -> None:
    async def work() -> None:
        playout = Playout()
        loud = frames(3, Fraction(25), asyncio.get_running_loop().time() - 1)
        for frame in loud:
            playout.put(frame)
        before = (await playout.audio.recv()).to_ndarray()[0]
        assert before.any()
        playout.hush()
        fade, *silent = [(await playout.audio.recv()).to_ndarray()[0] for _ in range(5)]
        assert fade[1] > 0 and not fade[240:].any()
        assert not np.any(silent)

    run(work())


def test_a_stopped_track_wakes_its_sender() -> None:
    async def work() -> None:
        playout = Playout()
        waiting = asyncio.create_task(playout.video.recv())
        await asyncio.sleep(0)
        playout.stop()
        with pytest.raises(MediaStreamError):
            await waiting

    run(work())


# ------------------------------------------------------------------------ the gate


def tone(seconds: float, level_dbfs: float) -> np.ndarray:
    t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return (2**0.5 * 10 ** (level_dbfs / 20) * np.sin(2 * np.pi * 200 * t))[:, None].astype("f4")


def through(pcm: np.ndarray) -> tuple[float, int]:
    """What the gate lets through, in seconds, and the utterances that it ends."""
    gate, said, ends = VoiceGate(RATE_HZ), 0, 0
    for i in range(0, len(pcm), PACKET_SAMPLES):
        gated = gate.push(pcm[i : i + PACKET_SAMPLES])
        said, ends = said + len(gated.pcm), ends + gated.ended
    return said / RATE_HZ, ends


def test_speech_passes_whole_with_what_is_before_and_after_it() -> None:
    seconds, ends = through(np.concatenate([tone(1, -70), tone(2, -20), tone(2, -70)]))
    assert ends == 1
    assert seconds == pytest.approx(2 + PRE_ROLL_S + HANGOVER_S, abs=2 * ATTACK_S)


def test_a_pause_between_words_ends_nothing() -> None:
    word, pause = tone(0.5, -20), tone(HANGOVER_S - 0.1, -70)
    seconds, ends = through(np.concatenate([word, pause, word, pause, word, tone(1, -70)]))
    assert ends == 1
    assert seconds == pytest.approx(1.5 + 2 * (HANGOVER_S - 0.1) + HANGOVER_S, abs=0.1)


@pytest.mark.parametrize(
    "name, pcm",
    [
        ("silence", np.zeros((RATE_HZ, 1), np.float32)),
        ("a quiet room", tone(3, -55)),
        ("a click", np.concatenate([tone(1, -70), tone(0.02, -10), tone(1, -70)])),
    ],
)
def test_what_is_no_speech_stays_outside(name: str, pcm: np.ndarray) -> None:
    assert through(pcm) == (0.0, 0)


def test_a_fan_is_taken_for_speech_for_a_bounded_time_only() -> None:
    # From -60 dBFS the noise rises by 3 dB/s until -40 dBFS is less than 10 dB above it.
    seconds, ends = through(tone(12, -40))
    assert ends == 1
    assert seconds < 10 / 3 + HANGOVER_S + 0.1
