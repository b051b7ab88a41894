"""RIFF wav files whose header does not say how long they are, and several of them in one file.

libav believes the lengths in a header, takes a file that was cut for a shorter one, and stops after
the first of several. So it is given the bytes through `WavReader`, which knows better.
"""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

from liveact.errors import InputError

_ANOTHER = re.compile(rb"RIFF.{4}WAVEfmt ", re.DOTALL)  # where a file begins within another one
_ANOTHER_BYTES = 16
# What follows samples of length 0, where that is true. Anything else is the samples themselves.
_AFTER_SAMPLES = (b"LIST", b"id3 ", b"ID3 ", b"fact", b"cue ", b"bext", b"JUNK", b"PAD ", b"smpl")
_MAX_FORMAT_BYTES = 4096


class WavReader:
    """The bytes of a wav file, read once from the front to the back, so that a pipe will do.

    `read` gives a header without lengths, then the samples of this file and of those appended to it
    in the same format. A length that a program leaves there when it writes to a stream (0, the
    largest numbers of 32 bits, whole thousands of millions) means: up to the end of the file, or to
    where another one begins.

    Attributes:
        duration_s: None where the file does not say, as a stream never does.
        truncated: what is missing, once that is known: of a file at once, of a pipe at its end.
        left_out_bytes: what follows the samples and is neither metadata nor more of them.
    """

    def __init__(self, path: Path, file: io.RawIOBase, size_bytes: int | None) -> None:
        """file: after `RIFF`, four bytes and `WAVE`. size_bytes: of the file, None of a pipe.

        Raises InputError where no samples follow.
        """
        self._path, self._file, self._size_bytes = path, file, size_bytes
        self.duration_s: float | None = None
        self.truncated: str | None = None
        self.left_out_bytes = 0
        self._ahead = b""  # bytes that were read and are still to be used
        self._format = b""  # how samples are stored: rate, channels, …
        self._format_chunks = b""
        self._ended = False
        self._begin()
        if size_bytes is not None:
            self._survey(size_bytes)
            file.seek(12)
            self._begin()
        # Lengths that mean "unknown" to libav.
        size = b"\xff" * 4
        self._header = b"RIFF" + size + b"WAVE" + self._format_chunks + b"data" + size

    def read(self, count: int) -> bytes:
        """At most `count` bytes, none at the end."""
        if self._header:
            data, self._header = self._header[:count], self._header[count:]
            return data
        while not self._ended:  # libav asks again after the end
            if data := self._samples(count):
                return data
            self._ended = not self._next_part()
        return b""

    # ------------------------------------------------------------------------------- parts

    def _begin(self) -> None:
        """At the chunks of the first file."""
        self._position, self._ended = 12, False
        self._ahead = self._format_chunks = self._format = b""
        if not self._read_header():
            raise InputError(f"{self._path}: expected an audio file, found no samples in it")

    def _read_header(self) -> bool:
        """Reads the chunks before the samples; False where the file ends or another format comes.

        Sets what the part needs: `_left`, its bytes still to come (None: up to the end).
        """
        fields, chunks = b"", b""
        while True:
            name, length = self._take(4), self._take(4)
            if len(length) < 4:
                return False
            num_bytes = int.from_bytes(length, "little")
            if name == b"data":
                break
            if name in (b"fmt ", b"fact"):
                if num_bytes > _MAX_FORMAT_BYTES:
                    return False
                content = self._take(num_bytes + num_bytes % 2)
                chunks += name + length + content
                fields = content if name == b"fmt " else fields
            else:
                self._skip(num_bytes + num_bytes % 2)
        if len(fields) < 16 or (self._format and fields[:16] != self._format):
            return False
        self._format = self._format or fields[:16]
        self._format_chunks = self._format_chunks or chunks
        self._bytes_per_s, self._align = struct.unpack("<8xIH", fields[:14])
        self._align = max(1, self._align)
        self._length = self._left = None if self._is_open_ended(num_bytes) else num_bytes
        self._given = 0
        return True

    def _is_open_ended(self, num_bytes: int) -> bool:
        if num_bytes:
            return left_by_a_stream(num_bytes)
        after = self._take(4)
        self._give_back(after)
        return after not in _AFTER_SAMPLES

    def _next_part(self) -> bool:
        """Goes to the samples of a file that was appended; False where there is none."""
        if self._left is None or self.truncated:
            return False
        if self._length and self._length % 2:
            pad = self._take(1)
            if pad != b"\0":  # a writer that forgot it
                self._give_back(pad)
        while len(head := self._take(8)) == 8:
            name, num_bytes = head[:4], int.from_bytes(head[4:], "little")
            start = self._position - 8
            if name == b"RIFF":
                if self._take(4) == b"WAVE" and self._read_header():
                    return True
            elif self._is_chunk(name, num_bytes):
                self._skip(num_bytes + num_bytes % 2)
                continue
            self.left_out_bytes = self._end() - start
            return False
        return False

    def _is_chunk(self, name: bytes, num_bytes: int) -> bool:
        """Metadata; else it is something that does not belong to the file."""
        fits = self._size_bytes is None or self._position + num_bytes <= self._size_bytes
        return fits and all(0x20 <= byte < 0x7F for byte in name)

    def _survey(self, size_bytes: int) -> None:
        """Duration of a file, and whether it is all there, from its headers alone."""
        num_bytes = 0
        while True:
            there = size_bytes - self._position
            found = there if self._left is None else min(there, self._left)
            num_bytes += found
            if self._left is not None and found < self._left:
                self._say_truncated(found)
            self._skip(found)
            if not self._next_part():
                break
        if self._bytes_per_s:
            self.duration_s = num_bytes / self._bytes_per_s

    def _say_truncated(self, found: int) -> None:
        self.truncated = (
            f"{self._path}: truncated, expected {self._length} bytes of samples, found {found}"
        )

    # ----------------------------------------------------------------------------- samples

    def _samples(self, count: int) -> bytes:
        """At most `count` bytes of this part, none at its end. It ends with a whole frame of all
        channels, or whatever comes after it would be shifted."""
        if self._left is None:
            data = self._up_to_another(count)
        if self._left is not None:
            whole = self._left - (self._given + self._left) % self._align
            data = self._take_some(min(count, whole))
            self._left -= len(data)
            if whole > 0 and not data:
                self._say_truncated(self._given)
            elif whole <= 0:
                self._skip(self._left)
                self._left = 0
        self._given += len(data)
        return data

    def _up_to_another(self, count: int) -> bytes:
        """Bytes of a part without a length. Where another file begins after it, the length is known
        from then on; what may be the beginning of one is kept back."""
        data = b""
        while len(data) < _ANOTHER_BYTES:
            more = self._take_some(count + _ANOTHER_BYTES)
            if not more:
                break
            data += more
        if another := _ANOTHER.search(data):
            self._give_back(data)
            self._left = another.start()
            self._length = self._given + self._left
            return b""
        sure = len(data) - _ANOTHER_BYTES + 1 if len(data) >= _ANOTHER_BYTES else len(data)
        sure = min(sure, count)
        self._give_back(data[sure:])
        return data[:sure]

    # ------------------------------------------------------------------------------- bytes

    def _take_some(self, count: int) -> bytes:
        """1 to `count` bytes; none at the end of the file."""
        if count <= 0:
            return b""
        if self._ahead:
            data, self._ahead = self._ahead[:count], self._ahead[count:]
        else:
            data = self._file.read(count) or b""
        self._position += len(data)
        return data

    def _take(self, count: int) -> bytes:
        """`count` bytes, fewer at the end of the file."""
        data = b""
        while len(data) < count and (more := self._take_some(count - len(data))):
            data += more
        return data

    def _give_back(self, data: bytes) -> None:
        self._ahead = data + self._ahead
        self._position -= len(data)

    def _skip(self, count: int) -> None:
        if self._size_bytes is not None:
            self._position = min(self._position + count, self._size_bytes)
            self._ahead = b""
            self._file.seek(self._position)
            return
        while count > 0 and (data := self._take_some(min(count, 1 << 16))):
            count -= len(data)

    def _end(self) -> int:
        """The size of the file, which a pipe has to be read for."""
        if self._size_bytes is not None:
            return self._size_bytes
        while self._take_some(1 << 16):
            pass
        return self._position


def left_by_a_stream(num_bytes: int) -> bool:
    """Whether this is a length that was written before anything was known and was never mended:
    about the largest number of 31 or 32 bits, or whole thousands of millions, with or without the
    bytes of a header."""
    return (
        2**31 - 2**16 <= num_bytes <= 2**31 + 2**12
        or num_bytes >= 2**32 - 2**16
        or (num_bytes > 10**8 and abs(num_bytes - round(num_bytes, -9)) <= 64)
    )
