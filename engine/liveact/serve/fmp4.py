"""A live film in pieces: frames with their sound in, an initialisation segment and fragments of MP4
out, as a browser's MediaSource or a player appends them."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

from liveact.session.pacing import Frame

FRAGMENT_US = 200_000  # of film in a fragment
KEY_FRAME_S = 2
MIME_TYPE = 'video/mp4; codecs="avc1.42C028, mp4a.40.2"'
AUDIO_BIT_RATE = 96_000
# Baseline and no delay: what is put in comes out with the same call.
VIDEO_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "23", "profile": "baseline"}


class FragmentWriter:
    """Encodes the frames of a session. `encode` gives what is complete: first the initialisation
    segment (ftyp, moov), then fragments (moof, mdat) of 0.2 s.

    Not thread-safe. `close` frees the encoders.
    """

    def __init__(self, size: tuple[int, int], fps: Fraction, sample_rate_hz: int) -> None:
        self._size, self._fps, self._rate_hz = size, fps, sample_rate_hz
        self._out = _Written()
        self._container = av.open(
            self._out,
            "w",
            format="mp4",
            options={
                "movflags": "empty_moov+default_base_moof",
                "frag_duration": str(FRAGMENT_US),
                "flush_packets": "1",
            },
        )
        options = VIDEO_OPTIONS | {"g": str(round(KEY_FRAME_S * fps)), "level": "4.0"}
        self._video = self._container.add_stream("libx264", rate=fps, options=options)
        self._video.width, self._video.height = size
        self._video.pix_fmt = "yuv420p"
        context = self._video.codec_context
        context.time_base = 1 / fps
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = 1  # 16..235
        self._audio = self._container.add_stream("aac", rate=sample_rate_hz)
        self._audio.layout = "mono"
        self._audio.bit_rate = AUDIO_BIT_RATE
        self._num_frames = self._num_samples = 0

    def encode(self, frame: Frame) -> list[bytes]:
        """What is complete with this frame: nothing, or segments in their order."""
        picture = av.VideoFrame.from_ndarray(frame.picture, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace="ITU709",
            src_color_range="JPEG",
            dst_color_range="MPEG",
        )
        picture.pts, picture.time_base = self._num_frames, 1 / self._fps
        self._num_frames += 1
        self._container.mux(self._video.encode(picture))
        sound = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(frame.pcm.T), format="fltp", layout="mono"
        )
        sound.sample_rate, sound.pts = self._rate_hz, self._num_samples
        sound.time_base = Fraction(1, self._rate_hz)
        self._num_samples += sound.samples
        # NOTE: the encoder's first packet is what comes before the sound, at −1024 samples. With it
        # the muxer would move all later times by 21 ms, but not that of the first picture.
        self._container.mux([p for p in self._audio.encode(sound) if p.pts is None or p.pts >= 0])
        return self._out.take()

    def close(self) -> None:
        """Frees the encoders. What is not complete is lost."""
        self._container.close()


class _Written(io.RawIOBase):
    """What the muxer writes, by its boxes."""

    def __init__(self) -> None:
        super().__init__()
        self._pending = bytearray()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._pending += data
        return len(data)

    def take(self) -> list[bytes]:
        """Complete segments: each ends with a moov or an mdat."""
        segments, start, at = [], 0, 0
        while at + 8 <= len(self._pending):
            size = int.from_bytes(self._pending[at : at + 4], "big")
            if at + size > len(self._pending):
                break
            kind = bytes(self._pending[at + 4 : at + 8])
            at += size
            if kind in (b"moov", b"mdat"):
                segments.append(bytes(self._pending[start:at]))
                start = at
        del self._pending[:start]
        return segments
