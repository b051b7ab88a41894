"""Sound as people have it: headers that lie, several files in one, pipes, channels, odd names."""

from __future__ import annotations

import logging
import os
import struct
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from liveact.audio.front_end import AudioFrontEnd
from liveact.blocks import RELEASED_CLOCK
from liveact.commands.generate import audio_mode
from liveact.errors import InputError
from liveact.media.mp4 import Mp4Writer
from liveact.media.sound import AudioFile, open_audio
from liveact.media.wav import left_by_a_stream
from tests.support.cli import Run, generate, refused
from tests.support.pipeline import speech, write_wav

RATE_HZ = 16_000


def decode(path: Path) -> np.ndarray:
    return np.concatenate(list(open_audio(path)))


def samples_of(wav: bytes) -> bytes:
    return wav[44:]


def as_floats(samples: bytes, channels: int = 1) -> np.ndarray:
    values = np.frombuffer(samples, "<i2").astype(np.float32) / np.float32(32_768)
    return values.reshape(-1, channels)


@pytest.fixture
def wav(tmp_path: Path) -> bytes:
    """Half a second of 16-bit mono, with the usual header of 44 bytes."""
    return write_wav(tmp_path / "original.wav", speech(0.5)).read_bytes()


def with_lengths(wav: bytes, riff: int, data: int) -> bytes:
    return wav[:4] + struct.pack("<I", riff) + wav[8:40] + struct.pack("<I", data) + wav[44:]


# ------------------------------------------------------------------------- lengths in a header

STREAM_LENGTHS = [
    (0x7FFF_FFFF, 0x7FFF_FFFF - 36),
    (0x7FFF_FFFF, 0x7FFF_FFFF),
    (0xFFFF_FFFF, 0xFFFF_FFFF),
    (0xFFFF_FFFF, 0xFFFF_FFFF - 36),
    (2_000_000_036, 2_000_000_000),
    (2_000_000_000, 1_999_999_964),
    (0x8000_0024, 0x8000_0000),
    (0x7FFF_F024, 0x7FFF_F000),
    (0, 0),
    (36, 0),
    (36 + 16_000, 0),
]


@pytest.mark.parametrize(("riff", "data"), STREAM_LENGTHS)
def test_a_length_that_a_stream_leaves_means_up_to_the_end(
    tmp_path: Path, wav: bytes, riff: int, data: int
) -> None:
    path = tmp_path / "stream.wav"
    path.write_bytes(with_lengths(wav, riff, data))
    audio = open_audio(path)
    assert audio.duration_s == 0.5
    expected = as_floats(samples_of(wav))
    assert np.array_equal(np.concatenate(list(audio)), expected)
    assert np.array_equal(np.concatenate(list(audio)), expected), "from the start again"


def test_a_truncated_wav_is_refused_with_what_is_there(tmp_path: Path, wav: bytes) -> None:
    path = tmp_path / "cut.wav"
    path.write_bytes(wav[:10_044])
    message = r"cut\.wav: truncated, expected 16000 bytes of samples, found 10000$"
    with pytest.raises(InputError, match=message):
        open_audio(path)
    # Long, but no stream writes such a length.
    path.write_bytes(with_lengths(wav, 1_500_000_036, 1_500_000_000))
    with pytest.raises(InputError, match=r"expected 1500000000 bytes of samples, found 16000$"):
        open_audio(path)


def test_which_lengths_a_stream_leaves() -> None:
    for length in (2**31 - 1, 2**31, 2**32 - 1, 2**32 - 45, 10**9, 2 * 10**9 - 36, 4 * 10**9 + 36):
        assert left_by_a_stream(length)
    for length in (0, 36, 16_000, 10**8, 1_500_000_000, 2**31 - 10**6, 2**32 - 10**6, 2**30):
        assert not left_by_a_stream(length)


def test_metadata_around_the_samples_is_not_heard(tmp_path: Path, wav: bytes) -> None:
    note = b"LIST" + struct.pack("<I", 27) + b"INFOISFT" + b"\x7f" * 19 + b"\0"
    path = tmp_path / "noted.wav"
    path.write_bytes(wav[:12] + note + wav[12:] + note)
    assert np.array_equal(decode(path), as_floats(samples_of(wav)))
    # A length of 0 that is true: nothing but a note follows.
    empty = wav[:12] + wav[12:40] + bytes(4) + note
    path.write_bytes(empty)
    with pytest.raises(InputError, match="found 0 samples"):
        open_audio(path)


# ------------------------------------------------------------------------ several files in one


@pytest.mark.parametrize(
    ("known", "trailer"), [(True, b""), (False, b""), (True, b"LIST\x04\0\0\0INFO")]
)
def test_all_of_concatenated_wavs_is_read(
    tmp_path: Path, wav: bytes, known: bool, trailer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    second = write_wav(tmp_path / "b.wav", speech(0.7, seed=1)).read_bytes()
    third = write_wav(tmp_path / "c.wav", speech(0.3, seed=2)).read_bytes()
    parts = [part if known else with_lengths(part, 2**32 - 1, 2**32 - 1) for part in (wav, second)]
    path = tmp_path / "all.wav"
    path.write_bytes(b"".join(part + trailer for part in (*parts, third)))
    expected = as_floats(b"".join(samples_of(part) for part in (wav, second, third)))
    assert np.array_equal(decode(path), expected)
    assert open_audio(path).duration_s == pytest.approx(1.5, abs=0.01)
    assert not caplog.records


def test_half_a_frame_at_the_end_of_a_part_shifts_nothing(tmp_path: Path) -> None:
    first = write_wav(tmp_path / "a.wav", speech(0.2, channels=2)).read_bytes()
    path = tmp_path / "all.wav"
    for riff, data in ((36 + 12_801, 12_801), (0xFFFF_FFFF, 0xFFFF_FFFF)):
        part = with_lengths(first, riff, data) + b"\x55"
        path.write_bytes(part + first)
        assert np.array_equal(decode(path), as_floats(samples_of(first) * 2, channels=2))


@pytest.mark.parametrize("pipe", [False, True])
def test_what_is_left_out_is_said(
    tmp_path: Path, wav: bytes, pipe: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_wav(tmp_path / "other.wav", speech(0.5, 8_000), 8_000).read_bytes()
    path = fed(tmp_path / "both.wav", wav + other) if pipe else tmp_path / "both.wav"
    if not pipe:
        path.write_bytes(wav + other)
    assert np.array_equal(decode(path), as_floats(samples_of(wav)))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{path}: expected nothing more after 0.5 s of sound, found ")
    assert message.endswith(f"found {len(other)} bytes: left out")
    assert caplog.records[0].levelno == logging.WARNING and caplog.records[0].name == "liveact"


def test_the_command_line_says_what_is_left_out(run: Run, tmp_path: Path, wav: bytes) -> None:
    path = tmp_path / "both.wav"
    path.write_bytes(wav + b"\x01" * 99)
    code, output, errors = run(*generate(path, tmp_path))
    assert (code, errors) == (0, "")
    expected = f"{path}: expected nothing more after 0.5 s of sound, found 99 bytes: left out"
    assert expected in output.splitlines()


# ------------------------------------------------------------------------------------- pipes


def fed(path: Path, content: bytes) -> Path:
    """A pipe that somebody writes into, once."""
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(content), 7_001):
                file.write(content[start : start + 7_001])

    threading.Thread(target=write, daemon=True).start()
    return path


@pytest.mark.parametrize("lengths", [None, (2**32 - 1, 2**32 - 1)])
def test_a_pipe_is_read_as_it_comes(
    tmp_path: Path, wav: bytes, lengths: tuple[int, int] | None
) -> None:
    content = wav if lengths is None else with_lengths(wav, *lengths)
    audio = open_audio(fed(tmp_path / "pipe.wav", content))
    assert audio.duration_s is None
    assert audio_mode(audio) == "whole", "the same film as of a file"
    assert audio.duration_s == 0.5
    assert np.array_equal(np.concatenate(list(audio)), as_floats(samples_of(wav)))
    with pytest.raises(InputError, match=r"pipe\.wav: expected a file to read again"):
        list(audio)


@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.ogg"])
def test_other_formats_come_through_a_pipe(tmp_path: Path, name: str) -> None:
    codec = {"a.mp3": "libmp3lame", "a.flac": "flac", "a.ogg": "libopus"}[name]
    encode(tmp_path / name, codec, speech(3.0, 48_000), 48_000, "mono")
    content = (tmp_path / name).read_bytes()
    expected = decode(tmp_path / name)
    found = decode(fed(tmp_path / "pipe", content))
    assert np.array_equal(found[: len(expected)], expected)  # libav cuts padding where it can seek
    assert len(expected) <= len(found) <= len(expected) + 2_000


def test_a_pipe_that_ends_too_soon(tmp_path: Path, wav: bytes) -> None:
    audio = open_audio(fed(tmp_path / "pipe", wav[:10_044]))
    with pytest.raises(InputError, match=r"truncated, expected 16000 bytes .*, found 10000$"):
        list(audio)


def test_generate_reads_a_pipe(run: Run, tmp_path: Path, wav: bytes) -> None:
    code, _, errors = run(*generate(fed(tmp_path / "pipe", wav), tmp_path))
    assert (code, errors) == (0, "")
    assert (tmp_path / "video.mp4").stat().st_size > 1_000
    cut = fed(tmp_path / "cut", wav[:9_000])
    refused(run(*generate(cut, tmp_path)), "cut: truncated, expected 16000 .* found 8956$")


# ------------------------------------------------------------------------ a length that lies


def encode(path: Path, codec: str, samples: np.ndarray, rate_hz: int, layout: str) -> None:
    """samples float32 [n, channels]. An mp3 gets no Xing header, so it tells no length."""
    options = {"write_xing": "0"} if path.suffix == ".mp3" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        assert isinstance(stream, av.AudioStream)
        resampler = av.AudioResampler(stream.format.name, layout, rate_hz, frame_size=960)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def vbr_mp3(path: Path, loud_s: float, quiet_s: float) -> Path:
    """Begins with noise, which takes many bits, so that libav's guess from the first frames is far
    too short for the silence that follows."""
    samples = np.concatenate([speech(loud_s), np.zeros((round(quiet_s * RATE_HZ), 1), np.float32)])
    with av.open(str(path), "w", options={"write_xing": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=RATE_HZ, layout="mono")
        stream.codec_context.options = {"abr": "0"}
        stream.codec_context.qscale = True
        stream.codec_context.global_quality = 0
        assert isinstance(stream, av.AudioStream)
        for start in range(0, len(samples), 576):
            part = np.ascontiguousarray(samples[start : start + 576].T)
            frame = av.AudioFrame.from_ndarray(part, "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE_HZ, start, Fraction(1, RATE_HZ)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_an_mp3_that_is_longer_than_it_says_is_a_stream(tmp_path: Path) -> None:
    audio = open_audio(vbr_mp3(tmp_path / "long.mp3", 2, 150))
    assert audio.duration_s is not None and audio.duration_s < 60, "it lies"
    assert audio_mode(audio) == "stream"
    assert audio.duration_s is None, "not known, rather than wrong"
    assert sum(map(len, audio)) / RATE_HZ == pytest.approx(152, abs=0.2)


def test_a_film_of_an_mp3_that_is_longer_than_it_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = vbr_mp3(tmp_path / "long.mp3", 0.4, 6)
    announced_s = open_audio(path).duration_s
    assert announced_s is not None and announced_s < 4
    # A minute and two, as seconds.
    monkeypatch.setattr("liveact.commands.generate.WHOLE_CLIP_S", 4.0)
    monkeypatch.setitem(AudioFrontEnd.__init__.__kwdefaults__, "max_whole_s", 5.0)
    code, output, errors = run(*generate(path, tmp_path))
    assert (code, errors) == (0, "")
    assert "audio encoded as stream" in output


def test_the_mode_is_chosen_by_what_is_decoded(tmp_path: Path) -> None:
    for seconds, mode in ((59.9, "whole"), (60.0, "whole"), (60.1, "stream")):
        audio = open_audio(write_wav(tmp_path / "a.wav", speech(seconds, 8_000), 8_000))
        assert audio_mode(audio) == mode
        assert audio.duration_s == pytest.approx(seconds)
        assert sum(map(len, audio)) == round(seconds * 8_000)


# ------------------------------------------------------------------------------ all channels


class Listener:
    """Stands in for the encoder: keeps what it heard."""

    def encode(self, samples: torch.Tensor, num_features: int) -> torch.Tensor:
        self.heard = samples.numpy()
        return torch.zeros(num_features, 1, 1)


def heard(pcm: np.ndarray) -> np.ndarray:
    listener = Listener()
    front_end = AudioFrontEnd(listener, 25, mode="whole")
    front_end.push(pcm, RATE_HZ)
    front_end.end()
    front_end.block_features(0)
    kept = front_end.pcm(0, RELEASED_CLOCK.first_video_frames)
    assert np.array_equal(kept, pcm[: len(kept)]), "the sound track keeps its channels"
    return listener.heard


@pytest.mark.parametrize(("channels", "channel"), [(2, 0), (2, 1), (6, 2), (6, 5), (8, 7)])
def test_a_voice_is_heard_in_whatever_channel_it_is(channels: int, channel: int) -> None:
    voice = speech(1.0)
    pcm = np.zeros((len(voice), channels), np.float32)
    pcm[:, channel] = voice[:, 0]
    # 25 fps at 16 kHz: no resampling, no tempo change.
    np.testing.assert_allclose(heard(pcm), 3 * voice[:, 0] / channels, rtol=1e-5, atol=1e-7)


def test_of_one_channel_nothing_changes() -> None:
    voice = speech(1.0)
    assert np.array_equal(heard(voice), voice[:, 0] * np.float32(3))


def test_equal_channels_are_heard_as_one() -> None:
    voice = speech(1.0)
    assert np.array_equal(heard(np.repeat(voice, 2, axis=1)), heard(voice))


# ----------------------------------------------------------------------- the film's sound track


def tone(hz: float, rate_hz: int = 48_000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(rate_hz) / rate_hz)).astype(np.float32)


def level(sound: np.ndarray, hz: float) -> float:
    """Amplitude of a tone in the middle of a second at 48 kHz."""
    middle = sound[12_000:36_000]
    phase = 2 * np.pi * hz * np.arange(24_000) / 48_000
    return float(np.abs(2 * (middle * np.exp(-1j * phase)).mean()))


def film(path: Path, pcm: np.ndarray, layout: str | None) -> np.ndarray:
    with Mp4Writer(path, 32, 32, 20, 48_000, pcm.shape[1], layout) as writer:
        writer.write(np.zeros((20, 32, 32, 3), np.uint8), pcm)
    return decode(path)


def test_surround_becomes_stereo_with_everything_in_its_place(tmp_path: Path) -> None:
    hz = [400, 600, 800, 1_000, 1_200, 1_400]  # FL FR FC LFE BL BR
    pcm = np.stack([tone(f) for f in hz], axis=1) / 6
    sound = film(tmp_path / "a.mp4", pcm, "5.1")
    assert sound.shape[1] == 2
    root = 0.5**0.5
    scale = 0.5 / 6 / (1 + 2 * root)  # the sum of the largest row of factors is 1
    expected = {  # ITU-R BS.775
        400: (1, 0), 600: (0, 1), 800: (root, root), 1_000: (0, 0), 1_200: (root, 0),
        1_400: (0, root),
    }  # fmt: skip
    for f, (left, right) in expected.items():
        assert level(sound[:, 0], f) == pytest.approx(left * scale, abs=0.002), f
        assert level(sound[:, 1], f) == pytest.approx(right * scale, abs=0.002), f


def test_stereo_is_kept_and_channels_without_names_are_all_there(tmp_path: Path) -> None:
    pcm = np.stack([tone(400), tone(600)], axis=1)
    sound = film(tmp_path / "a.mp4", pcm, "stereo")
    assert [level(sound[:, c], f) > 0.4 for c in (0, 1) for f in (400, 600)] == [
        True, False, False, True,
    ]  # fmt: skip
    pcm = np.stack([tone(f) for f in (400, 600, 800)], axis=1)
    sound = film(tmp_path / "b.mp4", pcm, None)
    assert sound.shape[1] == 1
    for f in (400, 600, 800):
        assert level(sound[:, 0], f) == pytest.approx(0.5 / 3, abs=0.01)


def test_a_voice_in_the_centre_of_a_surround_file_is_in_the_film(run: Run, tmp_path: Path) -> None:
    pcm = np.zeros((48_000, 6), np.float32)
    pcm[:, 2] = tone(500)
    for name, codec in (("in.m4a", "aac"), ("in.wav", "pcm_s16le")):
        encode(tmp_path / name, codec, pcm, 48_000, "5.1")
        assert open_audio(tmp_path / name).layout == "5.1"
        code, _, errors = run(*generate(tmp_path / name, tmp_path))
        assert (code, errors) == (0, "")
        sound = decode(tmp_path / "video.mp4")
        assert sound.shape[1] == 2
        for channel in (0, 1):
            assert level(sound[:, channel], 500) == pytest.approx(0.5 * 0.293, abs=0.02)


@pytest.mark.parametrize(("channels", "layout"), [(1, "mono"), (6, "5.1"), (9, None)])
def test_the_layout_of_a_wav_that_does_not_say(
    tmp_path: Path, channels: int, layout: str | None
) -> None:
    audio: AudioFile = open_audio(write_wav(tmp_path / "a.wav", speech(0.2, channels=channels)))
    assert (audio.channels, audio.layout) == (channels, layout)


# ------------------------------------------------------------------------------------ names


def test_a_name_with_a_colon_is_no_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "a.mp3", "libmp3lame", speech(1.0), RATE_HZ, "mono")
    (tmp_path / "a.mp3").rename(tmp_path / "12:30.mp3")
    assert len(decode(Path("12:30.mp3"))) > 15_000
    with Mp4Writer("at:12.mp4", 32, 32, 20, 48_000, 1) as writer:
        writer.write(np.zeros((1, 32, 32, 3), np.uint8), np.zeros((2_400, 1), np.float32))
    assert (tmp_path / "at:12.mp4").stat().st_size > 0
