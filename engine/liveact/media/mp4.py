"""The film out: a file that is written while it is being generated."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import soxr

from liveact.audio.tempo import FloatArray
from liveact.blocks import exact_fps
from liveact.errors import InputError
from liveact.files import one_line, output_target, partial_name

AAC_FRAME = 1024  # samples per packet
# By the end of the name, libav's name of the container; all of them take H.264 and AAC.
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}


def container_of(path: Path) -> str:
    """libav's name of the container that a film's name asks for. Raises InputError."""
    container = CONTAINERS.get(path.suffix.lower())
    if container is None:
        found = path.suffix or "a name without an end"
        raise InputError(f"{path}: expected a film in {', '.join(CONTAINERS)}, found {found}")
    return container


class Mp4Writer:
    """Writes a film (H.264 and AAC) while it is being generated: an mp4, or what the end of the
    name asks for, see CONTAINERS.

    The file grows under a temporary name beside `path` and takes its name when `close` has finished
    it, so a file of that name is always complete. As a context manager it closes, or aborts when
    an exception passes; what is dropped or interrupted otherwise goes as well. Where `path` is a
    link, the file that it leads to is replaced. Memory is bounded as long as sound and pictures
    arrive together.

    - Picture: libx264, yuv420p, BT.709, CRF 18; frame i at exactly i/fps. Preset `veryfast`, since
      H100 and H200 have no encoder and the CPU must keep up: 7.7 ms of one core per 512×512 frame
      (a moving, noisy portrait; a shared machine of two cores).
    - Sound: AAC; rates other than 32, 44.1 and 48 kHz become 48 kHz. It starts with the first frame
      and is padded with silence or cut to the picture's end. More than two channels become two with
      libav's own factors (those of ITU-R BS.775: centre and surround at −3 dB), scaled down where
      the sum could clip; without a `layout` nothing says where each is, and their mean is mono.
    - The index is moved to the front at the end (faststart), which copies the file once. No
      fragments: they would make a crash lose less, but many editors and players cannot seek them.
      Matroska has its index at the end, and times in milliseconds.

    Not thread-safe.
    """

    def __init__(
        self,
        path: Path | str,
        width: int,
        height: int,
        fps: float | Fraction,
        sample_rate_hz: int,
        channels: int,
        layout: str | None = None,
    ) -> None:
        """layout: libav's name of the order of the channels, such as `5.1`. Raises InputError."""
        self.path = Path(path)
        self._target = output_target(self.path)
        container = container_of(self.path)
        self.num_frames = 0
        self._width, self._height = width, height
        self._fps = exact_fps(fps)
        self._sample_rate_hz, self._channels = sample_rate_hz, channels
        if width % 2 or height % 2 or min(width, height) < 2:
            raise InputError(f"{path}: expected even sides, found {width}×{height}")
        if sample_rate_hz < 1 or channels < 1:
            raise InputError(
                f"{path}: expected sound, found {sample_rate_hz} Hz, {channels} channels"
            )
        self._mix = None if channels <= 2 else _downmix(channels, layout)  # [channels, 1 or 2]
        self._partial = partial_name(self._target)
        # Also when the constructor is interrupted, or nobody enters the context.
        weakref.finalize(self, self._partial.unlink, missing_ok=True)
        try:
            self._partial.open("xb").close()  # libav would notice only when it writes
            options = {} if container == "matroska" else {"movflags": "faststart"}
            self._container = av.open(
                f"file:{self._partial}", "w", format=container, options=options
            )
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{path}: cannot be written: {one_line(error)}") from error
        self._open = True
        self._add_video()
        self._add_audio()

    def write(self, frames: np.ndarray, pcm: np.ndarray) -> None:
        """Appends pictures and the sound that belongs to them.

        Args:
            frames: uint8 [n, height, width, 3], RGB, n ≥ 0.
            pcm: float32 [m, channels] in [−1, 1], clipped; m ≈ n·rate/fps.
        """
        if not self._open:
            raise InputError(f"{self.path}: already closed")
        if frames.dtype != np.uint8 or frames.shape[1:] != (self._height, self._width, 3):
            raise InputError(
                f"{self.path}: expected frames uint8 [n, {self._height}, {self._width}, 3], "
                f"found {frames.dtype} {list(frames.shape)}"
            )
        if pcm.dtype != np.float32 or pcm.ndim != 2 or pcm.shape[1] != self._channels:
            raise InputError(
                f"{self.path}: expected pcm float32 [m, {self._channels}], "
                f"found {pcm.dtype} {list(pcm.shape)}"
            )
        with self._file_errors():
            for pixels in frames:
                self._write_frame(pixels)
            self._write_sound(pcm, last=False)

    def close(self) -> None:
        """Finishes the file and gives it its name; nothing happens when it is closed already.

        Raises InputError (and removes the file) when no frame was written.
        """
        if not self._open:
            return
        if not self.num_frames:
            self.abort()
            raise InputError(f"{self.path}: expected at least one frame, found none")
        with self._file_errors():
            self._write_sound(np.zeros((0, self._channels), np.float32), last=True)
            for stream in (self._video, self._audio):
                self._container.mux(stream.encode(None))
            self._container.close()
            self._partial.replace(self._target)
            self._open = False

    def abort(self) -> None:
        """Removes what was written; nothing happens when it is closed already."""
        if not self._open:
            return
        self._open = False
        # The trailer that is written here may fail for the very reason for the abort (disk full);
        # either way the file goes.
        with contextlib.suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _add_video(self) -> None:
        options = {"preset": "veryfast", "crf": "18"}
        self._video = self._container.add_stream("libx264", rate=self._fps, options=options)
        self._video.width, self._video.height = self._width, self._height
        self._video.pix_fmt = "yuv420p"
        context = self._video.codec_context
        context.time_base = 1 / self._fps
        # 1 is BT.709 in the tables of H.273 for all three; range 1 is 16..235.
        context.color_primaries = context.color_trc = context.colorspace = 1
        context.color_range = 1

    def _add_audio(self) -> None:
        rate_hz = (
            self._sample_rate_hz if self._sample_rate_hz in (32_000, 44_100, 48_000) else 48_000
        )
        num_tracks = self._channels if self._mix is None else self._mix.shape[1]
        self._layout = "stereo" if num_tracks == 2 else "mono"
        self._audio = self._container.add_stream("aac", rate=rate_hz)
        self._audio.layout = self._layout
        self._audio.bit_rate = 96_000 * num_tracks
        self._audio.codec_context.time_base = Fraction(1, rate_hz)
        self._resampler = (
            soxr.ResampleStream(self._sample_rate_hz, rate_hz, num_tracks)
            if rate_hz != self._sample_rate_hz
            else None
        )
        self._audio_rate_hz = rate_hz
        self._sound: FloatArray = np.zeros((0, num_tracks), np.float32)  # not encoded yet
        self._num_encoded = 0  # samples

    def _write_frame(self, pixels: np.ndarray) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace="ITU709",
            src_color_range="JPEG",
            dst_color_range="MPEG",
        )
        frame.pts, frame.time_base = self.num_frames, 1 / self._fps
        self._container.mux(self._video.encode(frame))
        self.num_frames += 1

    def _write_sound(self, pcm: FloatArray, last: bool) -> None:
        """Encodes whole AAC frames up to the end of the picture; the last may be shorter."""
        samples = pcm if self._mix is None else pcm @ self._mix
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(np.ascontiguousarray(samples), last=last)
        sound = np.concatenate([self._sound, samples.clip(-1, 1)])
        end = round(self.num_frames * self._audio_rate_hz / self._fps) - self._num_encoded
        if last:
            sound = np.concatenate([sound, np.zeros((max(0, end - len(sound)), sound.shape[1]))])
        available = min(end, len(sound))
        stop = available if last else available - available % AAC_FRAME
        for start in range(0, stop, AAC_FRAME):
            part = sound[start : min(start + AAC_FRAME, stop)].T.astype(np.float32, order="C")
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts = self._audio_rate_hz, self._num_encoded
            frame.time_base = Fraction(1, self._audio_rate_hz)
            self._container.mux(self._audio.encode(frame))
            self._num_encoded += frame.samples
        self._sound = sound[stop:]

    @contextlib.contextmanager
    def _file_errors(self) -> Iterator[None]:
        """Whatever fails while writing removes the file; the reasons of the system in one line."""
        try:
            yield
        except BaseException as error:
            self.abort()
            if isinstance(error, (av.FFmpegError, OSError)):
                raise InputError(f"{self.path}: cannot be written: {one_line(error)}") from error
            raise


def _downmix(channels: int, layout: str | None) -> FloatArray:
    """What each channel gives to left and right, [channels, 2]; [channels, 1] without a layout."""
    if layout is None:
        return np.full((channels, 1), 1 / channels, np.float32)
    # libav does not tell its factors, but what it makes of one impulse per channel is just them.
    count = max(channels, 16)
    impulses = np.eye(count, channels, dtype=np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(impulses, "flt", layout)
    frame.sample_rate = 48_000
    mixed = av.AudioResampler("flt", "stereo", 48_000).resample(frame)[0].to_ndarray()
    factors: FloatArray = mixed.reshape(-1, 2)[:channels].astype(np.float32)
    factors /= max(1.0, float(factors.sum(axis=0).max()))
    return factors
