"""Pixels of any kind to 8-bit sRGB: depth, transparency, colour profile."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from liveact.errors import InputError

# The space of a colour profile → the mode of the pixels that it is for.
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")


def as_srgb(path: Path | str, image: Image.Image, file_format: str | None) -> Image.Image:
    """8-bit RGB in sRGB; transparent parts show white.

    A colour profile in the file is applied; one that is broken, or not for such pixels, is ignored,
    as browsers do. Deeper than 8 bits is rounded (Pillow cuts off colour of 16 bits itself).

    Args:
        path: named in an error.
        file_format: Pillow's name of the format; what mode `I` means depends on it.

    Raises InputError for floating point, and for more than 16 bits.
    """
    profile = image.info.get("icc_profile")
    grey = image.mode in _GREY_MODES
    image = _eight_bits(path, image, file_format)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if profile and (converted := _apply(profile, image, grey)) is not None:
        return converted
    return image if image.mode == "RGB" else image.convert("RGB")  # no copy of a large photo


def _eight_bits(path: Path | str, image: Image.Image, file_format: str | None) -> Image.Image:
    # Pillow has grey of 16 bits in mode I where a file may also have fewer: PNG, PGM.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        pixels = np.asarray(image).astype(np.int32)  # [H, W]
        clear = image.info.get("transparency")  # the grey that is
        if isinstance(clear, int):
            pixels[pixels == clear] = 65_535
        return Image.fromarray(((pixels.clip(0, 65_535) * 2 + 257) // 514).astype(np.uint8))
    if image.mode in ("I", "F"):
        found = "floating point" if image.mode == "F" else "32 bits"
        raise InputError(f"{path}: expected 8 or 16 bits per channel, found {found}")
    return image


def _apply(profile: bytes, image: Image.Image, grey: bool) -> Image.Image | None:
    """The image in sRGB; None where the profile cannot be used, or is sRGB already."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES.get(source.profile.xcolor_space.strip())
        if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not grey):
            return None
        # Converted, it would be the same but for the rounding.
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return None
        # Perceptual where a profile has tables for it; of a matrix it is relative colorimetric.
        return ImageCms.profileToProfile(
            image.convert(mode),
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.PERCEPTUAL,
            outputMode="RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
