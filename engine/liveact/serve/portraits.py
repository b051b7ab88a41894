"""Pictures that clients may ask for by name, and those that they send.

The names come from a listing that is made when the server starts. No string of a request ever
becomes a path.
"""

from __future__ import annotations

import asyncio
import binascii
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from liveact.errors import InputError
from liveact.files import one_line
from liveact.media.image import read_image

THUMBNAIL = (256, 256)
FORMATS = ("PNG", "JPEG")  # of what clients send
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PIECE = 2**18  # characters of base64 at a time, 1 ms: decoding holds Python's lock
CHECKED_AT = (64, 64)  # the size of a video for which a listed picture is read once


@dataclass(frozen=True)
class Portrait:
    """A picture that has a name.

    Attributes:
        path: of the picture.
        width, height: in pixels.
        thumbnail: a small PNG of it.
    """

    path: Path
    width: int
    height: int
    thumbnail: bytes


def list_portraits(directory: Path) -> dict[str, Path]:
    """Every picture of a directory, by its name without the suffix. Each is read once: raises
    InputError for one that a session would refuse."""
    try:
        found = sorted(p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise InputError(f"{directory}: expected a directory, found {one_line(error)}") from error
    if not found:
        raise InputError(f"{directory}: expected pictures ({', '.join(SUFFIXES)}), found none")
    for path in found:
        read_image(path, CHECKED_AT)
    return {path.stem: path for path in found}


class Portraits:
    """The pictures that have names, `list_portraits`' or others.

    Raises InputError for one that is no picture.
    """

    def __init__(self, paths: dict[str, Path], max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self.named = {name: _portrait(path) for name, path in paths.items()}
        # Decoding takes memory, as much as the largest picture: one at a time.
        self._decoding = asyncio.Lock()

    async def decode(self, data: str) -> Image.Image:
        """A PNG or JPEG in base64, as a client sends it. Raises InputError."""
        async with self._decoding:
            return await asyncio.to_thread(_decode, data, self._max_pixels)


def _portrait(path: Path) -> Portrait:
    try:
        with Image.open(path) as image:
            width, height = image.size
            image.draft("RGB", THUMBNAIL)
            small = ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: expected a picture, found {one_line(error)}") from error
    small.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    small.save(file, "PNG")
    return Portrait(path, width, height, file.getvalue())


def _decode(data: str, max_pixels: int) -> Image.Image:
    content = _from_base64(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(content, formats=FORMATS)
        # The size is in the header: nothing was decoded yet.
        if image.width * image.height > max_pixels:
            raise InputError(
                f"portrait: expected at most {max_pixels} pixels, "
                f"found {image.width}×{image.height}"
            )
        image.load()
    except UnidentifiedImageError:
        raise InputError(
            f"portrait: expected {' or '.join(FORMATS)}, found something else"
        ) from None
    except (
        *(OSError, SyntaxError, ValueError, EOFError),
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"portrait: expected a picture, found {one_line(error)}") from None
    return image


def _from_base64(data: str) -> io.BytesIO:
    """What is in strict base64, as a file. Raises InputError."""
    content = io.BytesIO()
    try:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            found = binascii.a2b_base64(piece, strict_mode=True)
            if start + PIECE < len(data) and len(found) < PIECE // 4 * 3:
                raise binascii.Error("padding before the end")
            content.write(found)
    except ValueError as error:  # binascii.Error is one
        raise InputError(f"portrait: expected base64, found {one_line(error)}") from None
    content.seek(0)
    return content
