"""The portrait in: a picture file or pixels to what the encoders take."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from liveact.blocks import check_size
from liveact.errors import InputError
from liveact.files import one_line
from liveact.media.color import as_srgb

MAX_IMAGE_PIXELS = 64_000_000  # decoded at once: 256 MB
# Of what can be reduced while it is decoded, to half its sides: JPEG. Phones make up to this.
# NOTE: 108 megapixels take 121 MiB then, measured; 721 MiB where the JPEG is progressive (4:4:4),
# since libjpeg holds all of its coefficients.
MAX_REDUCED_PIXELS = 200_000_000
_LIMIT = (
    f"at most {MAX_IMAGE_PIXELS // 1_000_000} megapixels, "
    f"{MAX_REDUCED_PIXELS // 1_000_000} of a JPEG"
)


def read_image(path: Path | str, size: tuple[int, int]) -> torch.Tensor:
    """The portrait, scaled (bicubic) to cover `size` and centre-cropped to it.

    The orientation of the camera (EXIF) and a colour profile are applied, transparent parts show
    white, 16 bits become 8. A JPEG of more than MAX_IMAGE_PIXELS is reduced to half its sides while
    it is decoded.

    Args:
        path: any image that Pillow reads; of an animation the first picture. HEIC where pillow-heif
            is installed (the extra `heic`).
        size: width and height in pixels, see `check_size`.

    Returns:
        float32 [3, height, width], sRGB in [−1, 1]. Raises InputError.
    """
    width, height = size
    check_size(width, height)
    try:
        with _open(path) as image:
            if image.width * image.height <= MAX_REDUCED_PIXELS:
                _reduce(image)
            _check_pixels(path, *image.size)
            image.load()
            file_format = image.format
            ImageOps.exif_transpose(image, in_place=True)
            picture = as_srgb(path, image, file_format)
    except InputError:
        raise
    # RuntimeError is what pillow-heif makes of some damage.
    except (
        *(OSError, SyntaxError, ValueError, EOFError, RuntimeError),
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"{path}: expected an image, found {one_line(error)}") from error
    return _cover(path, picture, size)


def _open(path: Path | str) -> Image.Image:
    try:
        # Pillow warns of sizes that are decided on here anyway.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except Image.DecompressionBombError as error:  # decoded at full size, which a JPEG is not here
        try:
            return JpegImageFile(path)
        except SyntaxError:
            raise InputError(f"{path}: expected {_LIMIT}, found more: {error}") from None
    except UnidentifiedImageError:
        heif = _heif_kind(path)
        if heif is None:
            raise
        return _open_heif(path, heif)


def _heif_kind(path: Path | str) -> str | None:
    """HEIC or AVIF by the brands at the beginning of a file; None for anything else."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start[4:8] != b"ftyp":
        return None
    brands = start[8:12] + start[16 : min(int.from_bytes(start[:4], "big"), 64)]
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    return "HEIC" if b"hei" in brands or b"hev" in brands or b"mif1" in brands else None


def _open_heif(path: Path | str, kind: str) -> Image.Image:
    if kind == "AVIF":
        raise InputError(f"{path}: expected an image that this Pillow reads, found AVIF")
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise InputError(
            f"{path}: expected an image that Pillow reads, found HEIC, "
            "which takes: pip install liveact-engine[heic]"
        ) from None
    return HeifImageFile(path)


def _reduce(image: Image.Image) -> None:
    """Halves the sides of what is too large, if its format can do so while decoding."""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        image.draft(None, (image.width // 2, image.height // 2))


def fit_image(image: object, size: tuple[int, int]) -> torch.Tensor:
    """The portrait in memory → what `read_image` makes of a file.

    image: a Pillow image, or uint8 [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA. Raises InputError.
    """
    check_size(*size)
    if isinstance(image, np.ndarray):
        plain = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not plain or 0 in image.shape:
            raise InputError(
                "image: expected uint8 [H, W], [H, W, 3] or [H, W, 4], "
                f"found {image.dtype} {list(image.shape)}"
            )
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise InputError(
            "image: expected a file name, a Pillow image or a NumPy array, "
            f"found {type(image).__name__}"
        )
    _check_pixels("image", *image.size)
    if 0 in image.size:
        raise InputError(f"image: expected a picture, found {image.width}×{image.height} pixels")
    try:
        picture = as_srgb("image", ImageOps.exif_transpose(image), image.format)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes a file that late
        raise InputError(f"image: expected a picture, found {one_line(error)}") from error
    return _cover("image", picture, size)


def _cover(path: Path | str, picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """picture, RGB → [3, height, width] in [−1, 1]; `path` names it in an error."""
    width, height = size
    scale = max(width / picture.width, height / picture.height)
    scaled_width, scaled_height = round(picture.width * scale), round(picture.height * scale)
    # Of a strip, covering takes huge scales.
    _check_pixels(path, scaled_width, scaled_height, " (scaled to cover the video)")
    picture = picture.resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    pixels = np.array(picture.crop((left, top, left + width, top + height)))  # [H, W, 3] uint8
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def _check_pixels(path: Path | str, width: int, height: int, how: str = "") -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise InputError(f"{path}: expected {_LIMIT}, found {width}×{height}{how}")
