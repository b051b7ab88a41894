"""The audio of a file in: any container with a sound track, decoded as a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from liveact.audio.tempo import FloatArray
from liveact.errors import InputError
from liveact.files import one_line


class AudioFile:
    """The first sound track of a file. Iterating decodes it from the start, piece by piece.

    The pieces are float32 [n, channels]. InputError while iterating: the file is damaged, ends
    before the length that it announces (mp4, mov and flac tell; wav is checked on opening), or
    changes its format.
    """

    def __init__(
        self, path: Path, sample_rate_hz: int, channels: int, duration_s: float | None
    ) -> None:
        self.path = path
        self.sample_rate_hz = sample_rate_hz
        self.channels = channels
        self.duration_s = duration_s  # as announced; None where the file does not say

    def __iter__(self) -> Iterator[FloatArray]:
        num_samples = 0
        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(container.streams.audio[0]):
                    found = (frame.sample_rate, len(frame.layout.channels))
                    if found != (self.sample_rate_hz, self.channels):
                        raise InputError(
                            f"{self.path}: expected {self.sample_rate_hz} Hz, {self.channels} "
                            f"channels throughout, found {found[0]} Hz, {found[1]} channels later"
                        )
                    num_samples += frame.samples
                    yield _frame_samples(self.path, frame)
                announces_length = container.format.name.startswith(("mov", "flac"))
        except (av.FFmpegError, OSError) as error:
            raise InputError(
                f"{self.path}: damaged after {num_samples / self.sample_rate_hz:.1f} s: "
                f"{one_line(error)}"
            ) from error
        decoded_s = num_samples / self.sample_rate_hz
        # A quarter of a second: more than the padding of any codec, less than a missing word.
        if announces_length and self.duration_s and decoded_s < self.duration_s - 0.25:
            raise InputError(
                f"{self.path}: truncated, expected {self.duration_s:.1f} s, found {decoded_s:.1f} s"
            )


def open_audio(path: Path | str) -> AudioFile:
    """Opens any container with a sound track: wav, mp3, m4a, flac, ogg, mp4, …

    Raises:
        InputError: missing, not a media file, no sound track, no samples in it, a wav file
            shorter than its header says.
    """
    path = Path(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise InputError(f"{path}: expected a sound track, found none")
            stream = container.streams.audio[0]
            # The first frame knows better than the header (HE-AAC doubles the rate).
            frame = next(iter(container.decode(stream)), None)
            if frame is None or not frame.samples:
                raise InputError(f"{path}: expected audio, found 0 samples")
            duration_s = None
            if stream.duration is not None and stream.time_base is not None:
                duration_s = float(stream.duration * stream.time_base)
            _frame_samples(path, frame)
            if container.format.name == "wav":
                _check_wav_length(path)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: expected an audio file, found {one_line(error)}") from error
    return AudioFile(path, frame.sample_rate, len(frame.layout.channels), duration_s)


def _frame_samples(path: Path, frame: av.AudioFrame) -> FloatArray:
    """Decoded samples as float32 [n, channels] in [−1, 1]."""
    samples = frame.to_ndarray()  # planar [channels, n] or packed [1, n · channels]
    channels = len(frame.layout.channels)
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - np.float32(128)) / np.float32(128)
    if samples.dtype in (np.int16, np.int32):
        full_scale = np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
        return samples.astype(np.float32) / full_scale
    if samples.dtype in (np.float32, np.float64):
        return samples.astype(np.float32)
    raise InputError(f"{path}: expected 8, 16, 24, 32-bit or float samples, found {samples.dtype}")


def _check_wav_length(path: Path) -> None:
    """libav plays a cut wav file as a shorter one without a word, so its header is read here."""
    with path.open("rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        at = 12
        while at + 8 <= size_bytes:
            file.seek(at)
            name, length_bytes = file.read(4), int.from_bytes(file.read(4), "little")
            at += 8 + length_bytes + length_bytes % 2
            if name == b"data":
                # Programs that write to a pipe leave the length at its maximum.
                if length_bytes < 0xFFFF_0000 and at - length_bytes % 2 > size_bytes:
                    got_bytes = length_bytes - (at - length_bytes % 2 - size_bytes)
                    raise InputError(
                        f"{path}: truncated, expected {length_bytes} bytes of samples, "
                        f"found {got_bytes}"
                    )
                return
