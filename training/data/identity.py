"""Who is drawn: one member of the family of portraits, from a seed."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Literal

import numpy as np

Color = tuple[float, float, float]
Hair = Literal["short", "bob", "long", "bun", "curls"]
Pattern = Literal["plain", "stripes", "dots", "checks"]
Glasses = Literal["none", "round", "square"]

_SKINS = ("f9d7bd", "f1c3a0", "e3ab82", "c98d62", "a86e48", "7c4d31", "f4c9ae", "d79c72")
_HAIRS = ("2b1d18", "4a2c1c", "7a4a26", "b07a3a", "d9b36a", "a8431f", "5c5560", "1f2233", "c9c4c0")
_IRISES = ("4a7a3e", "3d6fa8", "6b4423", "3f8a8c", "8a6a2b", "55606e")
_SHIRTS = ("1f8a8c", "d0533f", "3b5fb0", "e0a02f", "7a4a9c", "3f8f4f", "c4497f", "34495e")
_LIGHTS = ("f6f0e4", "ffd9a0", "bfe3df", "f7c6c6", "dfe6ff", "e6f2c8")
_BACKS = ("cfe3e8", "f3dcc0", "d9d2ea", "cfe6cf", "f2cfcf", "f0e9b8", "c3cfdf")


@dataclass(frozen=True)
class Identity:
    """Lengths are in units of half the picture; colours are RGB, 0 to 1."""

    skin: Color
    hair: Color
    iris: Color
    lip: Color
    shirt: Color
    accent: Color
    back: Color
    hair_style: Hair
    pattern: Pattern
    glasses: Glasses
    glasses_color: Color
    ear_rings: bool
    freckles: bool
    face_width: float
    face_height: float
    jaw: float
    eye_gap: float
    eye_size: float
    brow_thickness: float
    brow_tilt: float
    nose: float
    mouth_width: float
    mouth_y: float
    parting: float
    pattern_scale: float


def identity(seed: int) -> Identity:
    """The member with this number; the same one on every machine."""
    g = np.random.default_rng([seed, 0x7A1C])

    def pick(options: tuple[str, ...]) -> Color:
        return _rgb(options[int(g.integers(len(options)))])

    def between(low: float, high: float) -> float:
        return float(g.uniform(low, high))

    skin = _varied(pick(_SKINS), g, 0.015)
    lip = _mixed(skin, _rgb("b8323e"), between(0.45, 0.7))
    hair_style: Hair = ("short", "bob", "long", "bun", "curls")[int(g.integers(5))]
    pattern: Pattern = ("plain", "stripes", "dots", "checks")[int(g.integers(4))]
    return Identity(
        skin=skin,
        hair=_varied(pick(_HAIRS), g, 0.03),
        iris=pick(_IRISES),
        lip=lip,
        shirt=_varied(pick(_SHIRTS), g, 0.04),
        accent=pick(_LIGHTS),
        back=_varied(pick(_BACKS), g, 0.02),
        hair_style=hair_style,
        pattern=pattern,
        glasses=("none", "none", "round", "square")[int(g.integers(4))],
        glasses_color=pick(("22262e", "7a3b1e", "2f4b7c", "8c2f39")),
        ear_rings=bool(g.random() < 0.45),
        freckles=bool(g.random() < 0.25),
        face_width=between(0.385, 0.44),
        face_height=between(0.50, 0.56),
        jaw=between(2.1, 2.5),
        eye_gap=between(0.165, 0.195),
        eye_size=between(0.088, 0.105),
        brow_thickness=between(0.014, 0.026),
        brow_tilt=between(-0.015, 0.02),
        nose=between(0.045, 0.065),
        mouth_width=between(0.145, 0.175),
        mouth_y=between(0.255, 0.285),
        parting=between(-0.2, 0.2),
        pattern_scale=between(0.85, 1.2),
    )


def shade(color: Color, factor: float) -> Color:
    """Darker (factor below 1) or lighter (above 1, towards white)."""
    if factor <= 1:
        return (color[0] * factor, color[1] * factor, color[2] * factor)
    return _mixed(color, (1.0, 1.0, 1.0), factor - 1)


def _rgb(code: str) -> Color:
    r, g, b = (int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return (r, g, b)


def _mixed(a: Color, b: Color, share: float) -> Color:
    r, g, b_ = (p + share * (q - p) for p, q in zip(a, b, strict=True))
    return (r, g, b_)


def _varied(color: Color, generator: np.random.Generator, spread: float) -> Color:
    hue, light, saturation = colorsys.rgb_to_hls(*color)
    light = min(max(light + generator.normal() * spread, 0.05), 0.95)
    return colorsys.hls_to_rgb((hue + generator.normal() * spread / 3) % 1.0, light, saturation)
