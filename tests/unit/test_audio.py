"""The audio front end: what each block hears, that nothing depends on pieces or timing, bounds."""

from __future__ import annotations

import itertools
import math
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveact.audio.chain import SoundFormat
from liveact.audio.front_end import AudioFrontEnd
from liveact.blocks import RELEASED_CLOCK, exact_fps
from liveact.encoders.speech import AudioEncoder
from liveact.errors import InputError, SessionError


class LocalEncoder:
    """A stand-in: feature k says something about its own 640 samples and, in its last number, about
    all that is heard, as the normalisation of the real one does. Keeps what it heard."""

    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []

    def encode(self, samples: torch.Tensor, num_features: int) -> torch.Tensor:
        assert len(samples) >= 640 * num_features
        self.heard.append(samples)
        pieces = samples.numpy()[: 640 * num_features].reshape(num_features, 640)
        level = np.full(num_features, samples.numpy().std(), np.float32)
        layer = np.stack([pieces.mean(1), pieces.max(1), level], axis=1)
        return torch.from_numpy(np.stack([layer, -layer], axis=1))  # [num_features, 2, 3]


def noise(num_samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal((num_samples, channels)) / 8
    return samples.astype(np.float32)


def all_blocks(front_end: AudioFrontEnd) -> list[torch.Tensor]:
    num_blocks = front_end.num_blocks()
    assert num_blocks is not None
    return [front_end.block_features(block) for block in range(num_blocks)]


def heard_whole(pcm: np.ndarray, rate_hz: int, fps: float) -> np.ndarray:
    """The tempo-adjusted 16 kHz samples that the encoder gets, in mode `whole`."""
    encoder = LocalEncoder()
    front_end = AudioFrontEnd(encoder, fps, mode="whole")
    front_end.push(pcm, rate_hz)
    front_end.end()
    front_end.block_features(0)
    return encoder.heard[0].numpy()


# --- which features a block gets ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stream", "whole"])
@pytest.mark.parametrize("num_frames", [1, 21, 23, 31, 32, 54, 55, 100, 250])
def test_rows_are_the_clamped_indices(mode: str, num_frames: int) -> None:
    # 25 fps at 16 kHz: no resampling, no tempo change; video frame k holds the value k/1000.
    value = np.arange(num_frames, dtype=np.float32) / 1000
    front_end = AudioFrontEnd(LocalEncoder(), 25, mode=mode)  # type: ignore[arg-type]
    front_end.push(np.repeat(value, 640), 16_000)
    front_end.end()
    blocks = all_blocks(front_end)
    assert len(blocks) == 1 + math.ceil(max(0, num_frames - 21) / 32)
    for block, features in enumerate(blocks):
        expected = np.array(RELEASED_CLOCK.features(block)).clip(0, num_frames - 1) * 0.003
        assert features.shape == (36 if block else 25, 2, 3)
        np.testing.assert_allclose(features[:, 0, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rate_hz", "fps", "num_samples", "num_blocks"),
    [
        (16_000, 20, 800 * 21, 1),  # 21 frames exactly
        (16_000, 20, 800 * 21 + 1, 1),  # less than a sample may be rounding
        (16_000, 20, 800 * 21 + 2, 2),
        (16_000, 20, 800 * (21 + 32), 2),
        (44_100, 29.97, 44_100 * 10, 10),  # 299.7 frames
        (48_000, Fraction(30_000, 1001), 48_000 * 16, 16),  # 479.5
    ],
)
def test_number_of_blocks(rate_hz: int, fps: float, num_samples: int, num_blocks: int) -> None:
    front_end = AudioFrontEnd(LocalEncoder(), fps)
    front_end.push(np.zeros(num_samples, np.float32), rate_hz)
    assert front_end.num_blocks() is None
    front_end.end()
    assert front_end.num_blocks() == num_blocks
    with pytest.raises(InputError, match=f"has {num_blocks} blocks"):
        front_end.block_features(num_blocks)


@pytest.mark.parametrize("seconds", [0.93, 2.53, 7.27])
def test_the_last_window_ends_with_the_audio(seconds: float) -> None:
    pcm = noise(round(seconds * 44_100))
    num_speech = math.floor(len(pcm) * 20 * 640 / 44_100)  # not a whole number of features
    encoder = LocalEncoder()
    front_end = AudioFrontEnd(encoder, 20)
    front_end.push(pcm, 44_100)
    front_end.end()
    all_blocks(front_end)
    first = max(0, RELEASED_CLOCK.features(len(encoder.heard) - 1).start - 100)
    assert len(encoder.heard[-1]) == num_speech - 640 * first
    whole = heard_whole(pcm, 44_100, 20)
    assert len(whole) == num_speech
    np.testing.assert_array_equal(encoder.heard[-1], whole[640 * first :])


def test_a_block_is_ready_as_soon_as_its_audio_is_in() -> None:
    front_end = AudioFrontEnd(LocalEncoder(), 20)
    at_s: dict[int, float] = {}
    for piece in range(500):
        front_end.push(noise(480), 48_000)
        for block in range(3):
            if front_end.ready(block):
                at_s.setdefault(block, (piece + 1) / 100)
    # Its last feature (docs/model.md, "Audio windows"), plus the delay that the class promises.
    for block, seconds in at_s.items():
        heard_s = RELEASED_CLOCK.features(block).stop / 20
        assert heard_s <= seconds <= heard_s + 0.11
    assert len(at_s) == 3


# --- the chain in front of the encoder ------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate_hz", "fps"), [(8_000, 20), (44_100, 30), (16_000, 24), (48_000, 25)]
)
def test_events_stay_in_place_for_a_minute(rate_hz: int, fps: int) -> None:
    seconds = 60
    pcm = noise(rate_hz * seconds) / 1000
    starts_s = np.arange(0.2, seconds - 0.5, 0.37)
    burst = np.hanning(rate_hz // 100)[:, None] * noise(rate_hz // 100, seed=1)
    for start_s in starts_s:
        at = round(start_s * rate_hz)
        pcm[at : at + len(burst)] += burst.astype(np.float32)
    heard = heard_whole(pcm, rate_hz, fps)
    assert len(heard) == seconds * fps * 640
    for start_s in starts_s:
        center_s = (start_s + 0.005) * fps / 25
        first = max(0, round((center_s - 0.05) * 16_000))
        power = np.square(heard[first : first + 1600], dtype=np.float64)
        found_s = (first + (np.arange(1600) * power).sum() / power.sum()) / 16_000
        assert abs(found_s - center_s) < 0.010


@pytest.mark.parametrize("fps", [20, 30, 50])
def test_tempo_keeps_the_pitch_and_the_level(fps: int) -> None:
    time_s = np.arange(44_100 * 4) / 44_100
    heard = heard_whole(np.sin(2 * np.pi * 205 * time_s).astype(np.float32), 44_100, fps)
    assert len(heard) == 4 * 16_000 * fps // 25
    middle = heard[8_000:-8_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(np.argmax(spectrum) * 16_000 / len(middle) - 205) < 16_000 / len(middle)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(3 / math.sqrt(2), rel=0.05)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_nothing_depends_on_the_pieces_or_on_timing(data: st.DataObject) -> None:
    rate_hz = data.draw(st.sampled_from([4_000, 16_000, 22_050, 48_000]))
    fps = data.draw(st.sampled_from([20, 25, 29.97]))
    channels = data.draw(st.integers(1, 3))
    integer = data.draw(st.booleans())
    num_samples = round(rate_hz * data.draw(st.floats(0.2, 6.0)))
    pcm = noise(num_samples, channels, seed=num_samples).clip(-1, 1)
    if integer:
        pcm = (pcm * 32_767).astype(np.int16)
    cuts = data.draw(st.lists(st.integers(0, num_samples), max_size=20).map(sorted))

    at_once = AudioFrontEnd(LocalEncoder(), fps)
    at_once.push(pcm[:, 0] if channels == 1 else pcm, rate_hz)
    at_once.end()
    expected = all_blocks(at_once)
    num_frames = math.floor(num_samples * exact_fps(fps) / rate_hz) + 3

    in_pieces = AudioFrontEnd(LocalEncoder(), fps)
    features: list[torch.Tensor] = []
    for start, stop in itertools.pairwise([0, *cuts, num_samples]):
        in_pieces.push(pcm[start:stop], rate_hz)
        while in_pieces.ready(len(features)):
            features.append(in_pieces.block_features(len(features)))
    in_pieces.end()
    for block in range(len(features), len(expected)):
        features.append(in_pieces.block_features(block))
    assert len(features) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))

    whole = at_once.pcm(0, num_frames)
    step = data.draw(st.integers(1, 40))
    frames = [*range(0, num_frames, step), num_frames]
    parts = [in_pieces.pcm(*pair) for pair in itertools.pairwise(frames)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    scale = np.float32(1 / 32_768) if integer else np.float32(1)
    np.testing.assert_array_equal(whole[:num_samples], pcm.astype(np.float32) * scale)
    assert not whole[num_samples:].any()
    assert len(whole) == round(num_frames * rate_hz / exact_fps(fps))


# --- the real encoder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wav2vec(golden: Path) -> AudioEncoder:
    return AudioEncoder.load(golden / "encoders" / "wav2vec")


def test_stream_equals_whole_where_the_window_is_the_whole_file(wav2vec: AudioEncoder) -> None:
    blocks = {}
    for mode in ("stream", "whole"):
        for seconds, block in ((0.93, 0), (2.53, 1)):  # 18 features; 50, all within the history
            front_end = AudioFrontEnd(wav2vec, 20, mode=mode)
            front_end.push(noise(round(seconds * 44_100)), 44_100)
            front_end.end()
            blocks[mode, block] = front_end.block_features(block)
    assert torch.equal(blocks["stream", 0], blocks["whole", 0])
    assert torch.equal(blocks["stream", 1], blocks["whole", 1])


@pytest.mark.parametrize("mode", ["stream", "whole"])
def test_silence_is_valid_audio(wav2vec: AudioEncoder, mode: str) -> None:
    front_end = AudioFrontEnd(wav2vec, 20, mode=mode)  # type: ignore[arg-type]
    front_end.push(np.zeros(16_000 * 2, np.int16), 16_000)
    front_end.end()
    assert all(features.isfinite().all() for features in all_blocks(front_end))


def test_the_shortest_audio_is_one_video_frame(wav2vec: AudioEncoder) -> None:
    front_end = AudioFrontEnd(wav2vec, 20)
    front_end.push(noise(2_205), 44_100)
    front_end.end()
    features = front_end.block_features(0)
    assert len(features) == 25
    assert torch.equal(features, features[:1].expand_as(features))
    too_short = AudioFrontEnd(wav2vec, 20)
    too_short.push(noise(2_204), 44_100)
    with pytest.raises(InputError, match=r"at least 0\.050 s \(one video frame\), found 0\.050 s"):
        too_short.end()


# --- bounds, threads, closing ---------------------------------------------------------------------


@pytest.mark.slow
def test_ten_minutes_cost_what_half_a_minute_costs() -> None:
    encoder = LocalEncoder()
    front_end = AudioFrontEnd(encoder, 25)
    held, block = {}, 0
    for second in range(1, 601):
        front_end.push(noise(4_000, seed=second), 4_000)
        while front_end.ready(block):
            front_end.block_features(block)
            front_end.pcm(max(0, 32 * block - 11), 32 * block + 21)
            block += 1
            encoder.heard = encoder.heard[-1:]
        stores = (front_end._pcm, front_end._speech)
        held[second] = [store.stop - store.start for store in stores]
    delay = 6  # frames that the resampler holds back at this rate: 0.23 s
    assert block == (600 * 25 - 55 - delay) // 32 + 2
    assert len(encoder.heard[0]) == (100 + 36) * 640  # history and block
    # At most a block that was given back, a block and the 2 frames it waits for, the second just
    # pushed, and a piece (the history as well for what the encoder hears).
    for num_pcm, num_speech in held.values():
        assert num_pcm <= (32 + 32 + 2 + 25 + 1 + delay) * 4_000 / 25
        assert num_speech <= (100 + 36 + 32 + 25 + 1) * 640


def test_a_consumer_thread_and_a_pusher_that_waits_for_room() -> None:
    fps, rate_hz = 100, 8_000  # a backlog of 10 blocks lasts 3.2 s, the least that is accepted
    pcm = noise(rate_hz * 20, 2)
    reference = AudioFrontEnd(LocalEncoder(), fps)
    reference.push(pcm, rate_hz)
    reference.end()
    expected = all_blocks(reference)

    front_end = AudioFrontEnd(LocalEncoder(), fps)
    features: list[torch.Tensor] = []
    sound: list[np.ndarray] = []

    def consume() -> None:
        for block in itertools.count():
            assert front_end.wait(block, timeout_s=20)
            if block == front_end.num_blocks():
                return
            features.append(front_end.block_features(block))
            sound.append(front_end.pcm(max(0, 32 * block - 11), 32 * block + 21))

    worker = threading.Thread(target=consume)
    worker.start()
    for start in range(0, len(pcm), 7_919):
        front_end.push(pcm[start : start + 7_919], rate_hz)
    front_end.end()
    worker.join(20)
    assert not worker.is_alive()
    assert len(features) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert np.array_equal(np.concatenate(sound)[: len(pcm)], pcm)


def test_the_backlog_is_what_no_block_has_used() -> None:
    front_end = AudioFrontEnd(LocalEncoder(), 100)
    assert front_end.backlog_s == 0
    front_end.push(noise(8_000 * 3), 8_000)
    assert front_end.backlog_s == 3
    for block, frames in enumerate((21, 53, 85)):
        front_end.block_features(block)
        assert front_end.backlog_s == pytest.approx(3 - frames / 100)
    later = AudioFrontEnd(LocalEncoder(), 100)
    later.push(noise(8_000), 8_000)
    later.skip(21)
    assert later.backlog_s == pytest.approx(1 - 0.21) and later.pushed_s == 1


def test_a_clip_encoded_whole_has_a_longest_length() -> None:
    whole = AudioFrontEnd(LocalEncoder(), 20, mode="whole", max_whole_s=5)
    with pytest.raises(InputError, match=r"at most 5 s in mode 'whole', found 6\.0 s"):
        whole.push(noise(8_000 * 6), 8_000)


@pytest.mark.parametrize("mode", ["stream", "whole"])
def test_what_follows_the_end_may_be_silence(mode: str) -> None:
    """Then the encoder hears it to the end of the last block and what that looks ahead."""
    value = np.full(640 * 30, 0.5, np.float32)
    front_end = AudioFrontEnd(LocalEncoder(), 25, mode=mode)  # type: ignore[arg-type]
    front_end.push(value, 16_000)
    front_end.end(silence=True)
    last = all_blocks(front_end)[1][:, 0, 0].numpy()  # features 19 to 54
    assert len(last) == 36 and (last[:11] == pytest.approx(1.5)) and not last[11:].any()


@pytest.mark.parametrize(
    ("rate_hz", "channels", "asked", "expected"),
    [
        (16_000, 1, (0, 0), (16_000, 1)),
        (44_100, 2, (0, 0), (44_100, 2)),
        (16_000, 1, (48_000, 2), (48_000, 2)),
        (44_100, 6, (24_000, 2), (24_000, 2)),
        (48_000, 2, (0, 1), (48_000, 1)),
    ],
)
def test_the_sound_that_comes_out_has_the_format_of_the_session(
    rate_hz: int, channels: int, asked: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Every block that is ready has its sound; a tone stays the tone, at its place."""
    output = SoundFormat(*asked)
    front_end = AudioFrontEnd(LocalEncoder(), 25, output=output)
    time_s = np.arange(rate_hz * 3) / rate_hz
    tone = (0.5 * np.sin(2 * np.pi * 300 * time_s)).astype(np.float32)
    front_end.push(np.repeat(tone[:, None], channels, 1), rate_hz)
    blocks = [block for block in range(9) if front_end.ready(block)]
    sound = [front_end.pcm(0, 21)] + [front_end.pcm(32 * b - 11, 32 * b + 21) for b in blocks[1:]]
    assert (output.sample_rate_hz, output.channels) == expected and len(blocks) == 2
    found = np.concatenate(sound)
    assert found.shape == (round(53 / 25 * expected[0]), expected[1])
    wanted = 0.5 * np.sin(2 * np.pi * 300 * np.arange(len(found)) / expected[0])
    inner = slice(expected[0] // 20, -expected[0] // 20)
    # 16-bit quality of the resampler's pass band; exact where nothing is resampled.
    assert np.abs(found[inner] - wanted[inner, None]).max() < 2e-3


def waits(front_end: AudioFrontEnd) -> tuple[threading.Thread, list[BaseException]]:
    """A thread inside `wait`, and where its error will be."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            front_end.wait(0)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    return thread, errors


def test_close_wakes_whoever_waits() -> None:
    front_end = AudioFrontEnd(LocalEncoder(), 100)
    thread, errors = waits(front_end)
    front_end.close()
    front_end.close()
    thread.join(5)
    assert [type(error) for error in errors] == [SessionError]
    for call in (
        lambda: front_end.push(noise(10), 8_000),
        lambda: front_end.ready(0),
        lambda: front_end.block_features(0),
        lambda: front_end.pcm(0, 1),
        front_end.num_blocks,
        front_end.end,
    ):
        with pytest.raises(SessionError, match="closed"):
            call()


def test_audio_that_ends_empty_wakes_whoever_waits() -> None:
    front_end = AudioFrontEnd(LocalEncoder(), 20)
    thread, errors = waits(front_end)
    with pytest.raises(InputError, match=r"\(one video frame\), found 0\.000 s"):
        front_end.end()
    thread.join(5)
    assert [type(error) for error in errors] == [SessionError]
    assert isinstance(errors[0].__cause__, InputError)
    assert AudioFrontEnd(LocalEncoder(), 20).wait(0, timeout_s=0.01) is False


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pcm", "rate_hz", "message"),
    [
        (np.zeros(10, np.float64), 16_000, "expected float32 or int16"),
        (np.zeros((2, 5, 2), np.float32), 16_000, "of shape"),
        (np.zeros((2, 48_000), np.float32), 48_000, r"found \[2, 48000\]"),
        (np.zeros((10, 0), np.float32), 48_000, r"found \[10, 0\]"),
        (np.array([0, np.nan], np.float32), 16_000, "finite"),
        (np.array([0, -np.inf], np.float32), 16_000, "finite"),
        (np.zeros(10, np.float32), 3_999, "4000 to 384000 Hz, found 3999"),
        (np.zeros(10, np.float32), 384_001, "4000 to 384000 Hz, found 384001"),
        (np.zeros(10, np.float32), 0, "found 0"),
    ],
)
def test_bad_pcm(pcm: np.ndarray, rate_hz: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AudioFrontEnd(LocalEncoder(), 20).push(pcm, rate_hz)


def test_the_format_is_fixed_by_the_first_push() -> None:
    front_end = AudioFrontEnd(LocalEncoder(), 20)
    front_end.push(np.zeros((0, 2), np.float32), 48_000)
    with pytest.raises(InputError, match="48000 Hz, 2 channels, found 44100 Hz, 2 channels"):
        front_end.push(noise(10, 2), 44_100)
    with pytest.raises(InputError, match="48000 Hz, 2 channels, found 48000 Hz, 1 channels"):
        front_end.push(noise(10), 48_000)
    front_end.push(noise(48_000, 2), 48_000)
    front_end.end()
    front_end.end()
    with pytest.raises(InputError, match="no audio after the end"):
        front_end.push(noise(10, 2), 48_000)


def test_what_was_released_or_has_not_come_is_refused() -> None:
    front_end = AudioFrontEnd(LocalEncoder(), 25)
    front_end.push(noise(16_000 * 20), 16_000)
    assert len(front_end.block_features(10)) == 36
    assert len(front_end.block_features(10)) == 36
    with pytest.raises(InputError, match="block 9: its audio was already released"):
        front_end.block_features(9)
    with pytest.raises(InputError, match="block 20: its audio is not there yet"):
        front_end.block_features(20)
    with pytest.raises(InputError, match="expected 0 or more, found -1"):
        front_end.block_features(-1)
    assert np.array_equal(front_end.pcm(100, 110), front_end.pcm(100, 110))
    with pytest.raises(InputError, match="frame 99 was already released"):
        front_end.pcm(99, 110)
    with pytest.raises(InputError, match="320000 arrived"):
        front_end.pcm(499, 501)
    with pytest.raises(InputError, match="start ≤ stop"):
        front_end.pcm(120, 110)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps: expected 1 to 100, found 0"),
        ({"fps": math.nan}, "found nan"),
        ({"fps": 101}, "found 101"),
        ({"fps": 20, "mode": "both"}, "expected 'stream' or 'whole', found 'both'"),
        ({"fps": 20, "history_s": -1}, "history_s: expected 0 to 60, found -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AudioFrontEnd(LocalEncoder(), **arguments)  # type: ignore[arg-type]
