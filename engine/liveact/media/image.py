"""The portrait in: a picture file or pixels to what the encoders take."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from liveact.blocks import check_size
from liveact.errors import InputError
from liveact.files import one_line

MAX_IMAGE_PIXELS = 64_000_000  # decoded at once: 256 MB


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
        raise InputError(f"{path}: expected an image, found {one_line(error)}") from error
    return _cover(path, picture, size)


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
        picture = _as_rgb("image", ImageOps.exif_transpose(image))
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
    _check_pixels(path, scaled_width, scaled_height)  # of a strip, covering takes huge scales
    picture = picture.resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    pixels = np.array(picture.crop((left, top, left + width, top + height)))  # [H, W, 3] uint8
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def _check_pixels(path: Path | str, width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise InputError(
            f"{path}: expected at most {MAX_IMAGE_PIXELS // 1_000_000} megapixels, "
            f"found {width}×{height} (scaled to cover the video)"
        )


def _as_rgb(path: Path | str, image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path}: expected 8 bits per channel, found Pillow mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
