"""Media files: the portrait in, the audio of a file in, the mp4 out.

Sound and film are streams through PyAV with bounded memory; everything a user can get wrong raises
InputError with the name of the file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import soxr
import torch
from PIL import Image, ImageOps

from liveact.audio.front_end import exact_fps
from liveact.audio.tempo import FloatArray
from liveact.errors import InputError

SIDE_MULTIPLE = 16  # 8 of the VAE × 2 of the patch embedding
MIN_SIDE, MAX_SIDE = 32, 2048
MAX_IMAGE_PIXELS = 64_000_000  # decoded at once: 256 MB
AAC_FRAME = 1024  # samples per packet


def check_size(width: int, height: int) -> None:
    """Raises InputError unless both sides are multiples of 16 from 32 to 2048 pixels."""
    for side in (width, height):
        if side % SIDE_MULTIPLE or not MIN_SIDE <= side <= MAX_SIDE:
            raise InputError(
                f"size: expected multiples of {SIDE_MULTIPLE} from {MIN_SIDE} to {MAX_SIDE}, "
                f"got {width}×{height}"
            )


# --- the portrait ---------------------------------------------------------------------------------


def read_image(path: Path | str, size: tuple[int, int]) -> torch.Tensor:
    """The portrait, scaled (bicubic) to cover `size` and centre-cropped to it.

    The orientation of the camera (EXIF) is applied, transparent parts show white.

    Args:
        path: any 8-bit image that Pillow reads; of an animation the first picture.
        size: width and height in pixels, see `check_size`.

    Returns:
        float32 [3, height, width], RGB in [−1, 1].
    """
    width, height = size
    check_size(width, height)
    try:
        # Pillow warns of sizes that are refused here anyway.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            _check_pixels(path, *image.size)
            picture = _as_rgb(path, ImageOps.exif_transpose(image))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: expected an image, got {_one_line(error)}") from error
    return _cover(path, picture, size)


def fit_image(pixels: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """The same for a portrait in memory: uint8 [H, W, 3] RGB."""
    check_size(*size)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InputError(
            f"image: expected uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    return _cover("image", Image.fromarray(np.ascontiguousarray(pixels)), size)


def _cover(path: Path | str, picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """picture, RGB → [3, height, width] in [−1, 1]; `path` names it in an error."""
    width, height = size
    scale = max(width / picture.width, height / picture.height)
    scaled_width, scaled_height = round(picture.width * scale), round(picture.height * scale)
    _check_pixels(path, scaled_width, scaled_height)  # of a strip, covering takes huge scales
    picture = picture.resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    pixels = np.array(picture.crop((left, top, left + width, top + height)))  # [H, W, 3] uint8
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def _check_pixels(path: Path | str, width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise InputError(
            f"{path}: expected at most {MAX_IMAGE_PIXELS // 1_000_000} megapixels, "
            f"got {width}×{height} (scaled to cover the video)"
        )


def _as_rgb(path: Path | str, image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path}: expected 8 bits per channel, got Pillow mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# --- audio in -------------------------------------------------------------------------------------


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
                            f"channels throughout, got {found[0]} Hz, {found[1]} channels later"
                        )
                    num_samples += frame.samples
                    yield _frame_samples(self.path, frame)
                announces_length = container.format.name.startswith(("mov", "flac"))
        except (av.FFmpegError, OSError) as error:
            raise InputError(
                f"{self.path}: damaged after {num_samples / self.sample_rate_hz:.1f} s: "
                f"{_one_line(error)}"
            ) from error
        decoded_s = num_samples / self.sample_rate_hz
        # A quarter of a second: more than the padding of any codec, less than a missing word.
        if announces_length and self.duration_s and decoded_s < self.duration_s - 0.25:
            raise InputError(
                f"{self.path}: truncated, expected {self.duration_s:.1f} s, got {decoded_s:.1f} s"
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
                raise InputError(f"{path}: expected a sound track, got none")
            stream = container.streams.audio[0]
            # The first frame knows better than the header (HE-AAC doubles the rate).
            frame = next(iter(container.decode(stream)), None)
            if frame is None or not frame.samples:
                raise InputError(f"{path}: expected audio, got 0 samples")
            duration_s = None
            if stream.duration is not None and stream.time_base is not None:
                duration_s = float(stream.duration * stream.time_base)
            _frame_samples(path, frame)
            if container.format.name == "wav":
                _check_wav_length(path)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: expected an audio file, got {_one_line(error)}") from error
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
    raise InputError(f"{path}: expected 8, 16, 24, 32-bit or float samples, got {samples.dtype}")


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
                        f"got {got_bytes}"
                    )
                return


# --- mp4 out --------------------------------------------------------------------------------------


class Mp4Writer:
    """Writes an mp4 (H.264 and AAC) while it is being generated.

    The file grows under a temporary name beside `path` and takes its name when `close` has finished
    it, so a file of that name is always complete. As a context manager it closes, or aborts when
    an exception passes. Memory is bounded as long as sound and pictures arrive together.

    - Picture: libx264, yuv420p, BT.709, CRF 18; frame i at exactly i/fps. Preset `veryfast`, since
      H100 and H200 have no encoder and the CPU must keep up: 7.7 ms of one core per 512×512 frame
      (a moving, noisy portrait; a shared machine of two cores).
    - Sound: AAC; rates other than 32, 44.1 and 48 kHz become 48 kHz, more than two channels their
      mean. It starts with the first frame and is padded with silence or cut to the picture's end.
    - The index is moved to the front at the end (faststart), which copies the file once. No
      fragments: they would make a crash lose less, but many editors and players cannot seek them.

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
    ) -> None:
        self.path = Path(path)
        self.num_frames = 0
        self._width, self._height = width, height
        self._fps = exact_fps(fps)
        self._sample_rate_hz, self._channels = sample_rate_hz, channels
        if width % 2 or height % 2 or min(width, height) < 2:
            raise InputError(f"{path}: expected even sides, got {width}×{height}")
        if sample_rate_hz < 1 or channels < 1:
            raise InputError(
                f"{path}: expected sound, got {sample_rate_hz} Hz, {channels} channels"
            )
        # Not the process number alone: in a container it is 1 again after a crash.
        unique = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._partial = self.path.with_name(f".{self.path.name}.partial-{unique}")
        try:
            if self.path.is_dir():
                raise IsADirectoryError("a directory")
            self._partial.open("xb").close()  # libav would notice only when it writes
            self._container = av.open(
                str(self._partial), "w", format="mp4", options={"movflags": "faststart"}
            )
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{path}: cannot be written: {_one_line(error)}") from error
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
                f"got {frames.dtype} {list(frames.shape)}"
            )
        if pcm.dtype != np.float32 or pcm.ndim != 2 or pcm.shape[1] != self._channels:
            raise InputError(
                f"{self.path}: expected pcm float32 [m, {self._channels}], "
                f"got {pcm.dtype} {list(pcm.shape)}"
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
            raise InputError(f"{self.path}: expected at least one frame, got none")
        with self._file_errors():
            self._write_sound(np.zeros((0, self._channels), np.float32), last=True)
            for stream in (self._video, self._audio):
                self._container.mux(stream.encode(None))
            self._container.close()
            self._partial.replace(self.path)
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
        self._layout = "stereo" if self._channels == 2 else "mono"
        num_tracks = 2 if self._channels == 2 else 1
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
        samples = pcm if self._channels <= 2 else pcm.mean(axis=1, keepdims=True)
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
                raise InputError(f"{self.path}: cannot be written: {_one_line(error)}") from error
            raise


def _one_line(error: BaseException) -> str:
    """The reason without the error numbers and file names that libraries add to it."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())
