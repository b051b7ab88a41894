"""The audio of a file in: any container with a sound track, decoded as a stream."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import stat
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from liveact.audio.tempo import FloatArray
from liveact.errors import InputError
from liveact.files import one_line
from liveact.media.wav import WavReader

MAX_AHEAD_BYTES = 2**28  # decoded ahead by `read_ahead`; a minute of 8 channels at 96 kHz is 184 MB

# Where a wav file does not say which of its channels is which, it is the order of Microsoft's.
_USUAL_LAYOUTS = {
    **{1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0"},
    **{6: "5.1", 7: "6.1", 8: "7.1"},
}


class AudioFile:
    """The first sound track of a file. Iterating decodes it, piece by piece.

    The file stays open from the first look at it on, and is read from the front to the back: a pipe
    can be iterated over once, a file again, from its start. Not thread-safe.

    The pieces are float32 [n, channels]. InputError while iterating: the file is damaged, ends
    before the length that it announces (mp4, mov, flac and wav tell), changes its format, or is a
    pipe that was read already. A warning is logged to `liveact` where a wav file has bytes after
    its samples that nothing can be made of.

    Attributes:
        layout: libav's name of the order of the channels, such as `5.1`; None where there is none.
        duration_s: as announced, or as found by `read_ahead`; None where neither says.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError, see `open_audio`."""
        self.path = path
        track = _Track(path)
        self.sample_rate_hz = track.sample_rate_hz
        self.channels = track.channels
        self.layout = track.layout
        self.duration_s = track.duration_s
        self._pieces: Iterator[FloatArray] | None = track.decode()
        self._ahead: deque[FloatArray] = deque()

    def read_ahead(self, seconds: float) -> bool:
        """Decodes up to a piece more than `seconds`, kept for whoever iterates; whether that is all
        there is. A length that is announced can lie, this cannot.

        No more than MAX_AHEAD_BYTES are kept: of a file that reaches them there is more.
        """
        self._pieces = self._pieces or self._open_again()
        num_samples = num_bytes = 0
        for piece in self._pieces:
            self._ahead.append(piece)
            num_samples, num_bytes = num_samples + len(piece), num_bytes + piece.nbytes
            decoded_s = num_samples / self.sample_rate_hz
            if decoded_s > seconds or num_bytes > MAX_AHEAD_BYTES:
                if self.duration_s is not None and self.duration_s < decoded_s:
                    self.duration_s = None
                return False
        self.duration_s = num_samples / self.sample_rate_hz
        return True

    def __iter__(self) -> Iterator[FloatArray]:
        pieces, self._pieces = self._pieces or self._open_again(), None
        ahead, self._ahead = self._ahead, deque()
        while ahead:
            yield ahead.popleft()
        yield from pieces

    def _open_again(self) -> Iterator[FloatArray]:
        if not self.path.is_file():
            raise InputError(
                f"{self.path}: expected a file to read again, found one that is read once"
            )
        return _Track(self.path).decode()


def open_audio(path: Path | str) -> AudioFile:
    """Opens any container with a sound track: wav, mp3, m4a, flac, ogg, mp4, …; or a pipe, which is
    opened once and in which nothing is sought.

    Raises:
        InputError: missing, not a media file, no sound track, no samples in it, a wav file
            shorter than its header says.
    """
    return AudioFile(Path(path))


class _Track:
    """A file that was opened, and the decoder of its first sound track."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._wav: WavReader | None = None
        try:
            self._container = self._open()
            if not self._container.streams.audio:
                raise InputError(f"{path}: expected a sound track, found none")
            stream = self._container.streams.audio[0]
            frames = self._container.decode(stream)
            # The first frame knows better than the header (HE-AAC doubles the rate).
            first = next(frames, None)
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{path}: expected an audio file, found {one_line(error)}") from error
        if first is None or not first.samples:
            raise InputError(f"{path}: expected audio, found 0 samples")
        _frame_samples(path, first)  # a format that can be used
        self.sample_rate_hz: int = first.sample_rate
        self.channels = len(first.layout.channels)
        self.layout = _layout_name(first.layout)
        self.duration_s: float | None = None
        if self._wav is not None:
            self.duration_s = self._wav.duration_s
        elif stream.duration is not None and stream.time_base is not None:
            self.duration_s = float(stream.duration * stream.time_base)
        self._frames = itertools.chain([first], frames)

    def decode(self) -> Iterator[FloatArray]:
        """All samples as float32 [n, channels], once; the file is closed after it. InputError."""
        num_samples = 0
        try:
            for frame in self._frames:
                found = (frame.sample_rate, len(frame.layout.channels))
                if found != (self.sample_rate_hz, self.channels):
                    raise InputError(
                        f"{self.path}: expected {self.sample_rate_hz} Hz, {self.channels} "
                        f"channels throughout, found {found[0]} Hz, {found[1]} channels later"
                    )
                num_samples += frame.samples
                yield _frame_samples(self.path, frame)
            self._check_end(num_samples / self.sample_rate_hz)
        except (av.FFmpegError, OSError) as error:
            raise InputError(
                f"{self.path}: damaged after {num_samples / self.sample_rate_hz:.1f} s: "
                f"{one_line(error)}"
            ) from error
        finally:
            with contextlib.suppress(av.FFmpegError, OSError):
                self._container.close()
            self._close_file()

    def _open(self) -> av.container.InputContainer:
        file = io.FileIO(self.path)  # unbuffered: nobody else may wait for its lock
        self._close_file = weakref.finalize(self, file.close)
        status = os.fstat(file.fileno())
        regular = stat.S_ISREG(status.st_mode)
        start = b""
        while len(start) < 12 and (more := file.read(12 - len(start))):
            start += more
        if start[:4] == b"RIFF" and start[8:] == b"WAVE":
            self._wav = WavReader(self.path, file, status.st_size if regular else None)
            if self._wav.truncated:
                raise InputError(self._wav.truncated)
            return av.open(self._wav, "r", format="wav")
        if regular:
            self._close_file()
            return av.open(f"file:{self.path}", "r")  # else `12:30.mp3` would be a protocol
        return av.open(_Pipe(start, file), "r")

    def _check_end(self, decoded_s: float) -> None:
        """libav takes what was cut for something shorter, without a word."""
        if self._wav is not None:
            if self._wav.truncated:
                raise InputError(self._wav.truncated)
            if self._wav.left_out_bytes:
                logging.getLogger("liveact").warning(
                    "%s: expected nothing more after %.1f s of sound, found %d bytes: left out",
                    self.path,
                    decoded_s,
                    self._wav.left_out_bytes,
                )
            return
        announces_length = self._container.format.name.startswith(("mov", "flac"))
        # A quarter of a second: more than the padding of any codec, less than a missing word.
        if announces_length and self.duration_s and decoded_s < self.duration_s - 0.25:
            raise InputError(
                f"{self.path}: truncated, expected {self.duration_s:.1f} s, found {decoded_s:.1f} s"
            )


class _Pipe:
    """A file that libav can only read, the bytes that were looked at first."""

    def __init__(self, start: bytes, file: io.RawIOBase) -> None:
        self._start, self._file = start, file

    def read(self, count: int) -> bytes:
        """At most `count` bytes; none at the end."""
        if self._start:
            data, self._start = self._start[:count], self._start[count:]
            return data
        return self._file.read(count) or b""


def _layout_name(layout: av.AudioLayout) -> str | None:
    """libav's name of a layout; of one without names for its channels, the usual one."""
    if any(channel.name == "NONE" for channel in layout.channels):
        return _USUAL_LAYOUTS.get(len(layout.channels))
    return layout.name


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
