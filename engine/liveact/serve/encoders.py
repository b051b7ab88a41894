"""Frames as the messages of a stream: each for itself with a header, or a film in fragments."""

from __future__ import annotations

import io
import threading
from fractions import Fraction
from typing import Protocol

from PIL import Image

from liveact.serve.fmp4 import FragmentWriter
from liveact.serve.live import SAMPLE_RATE_HZ
from liveact.serve.wire import pack_frame
from liveact.session.pacing import Frame

JPEG_QUALITY = 85


class Encoder(Protocol):
    """`encode` is for a thread; `messages`, right before they are sent, for the event loop."""

    def encode(self, frame: Frame) -> list[bytes]:
        """What takes time: pictures or segments."""

    def messages(self, frame: Frame, encoded: list[bytes]) -> list[bytes]:
        """What goes out for `frame`, whose sound may be another than when it was encoded."""

    def close(self) -> None:
        """Frees what it holds. Any thread, also while another one encodes."""


class Stills:
    """`jpeg` and `rgb24`: a message for each frame (docs/protocol.md, "The header of a frame")."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def encode(self, frame: Frame) -> list[bytes]:
        if self._kind == "rgb24":
            return [frame.picture.tobytes()]
        file = io.BytesIO()
        Image.fromarray(frame.picture).save(file, "JPEG", quality=JPEG_QUALITY)
        return [file.getvalue()]

    def messages(self, frame: Frame, encoded: list[bytes]) -> list[bytes]:
        return [pack_frame(frame, self._kind, picture) for picture in encoded]

    def close(self) -> None:
        pass


class Film:
    """`fmp4`: a message for each segment, which has many frames."""

    def __init__(self, size: tuple[int, int], fps: Fraction) -> None:
        self._writer: FragmentWriter | None = FragmentWriter(size, fps, SAMPLE_RATE_HZ)
        self._lock = threading.Lock()

    def encode(self, frame: Frame) -> list[bytes]:
        with self._lock:
            return [] if self._writer is None else self._writer.encode(frame)

    def messages(self, frame: Frame, encoded: list[bytes]) -> list[bytes]:
        return encoded

    def close(self) -> None:
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def open_encoder(format: str, size: tuple[int, int], fps: Fraction) -> Encoder:
    """The encoder of a stream: `jpeg`, `rgb24` or `fmp4`."""
    return Film(size, fps) if format == "fmp4" else Stills(format)
