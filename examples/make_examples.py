"""Makes the two example inputs beside this file: portrait.png (drawn) and speech.wav (spoken).

Both are committed; run this only to change them: python examples/make_examples.py. The voice is
the synthesiser espeak-ng, which must be installed for that (apt-get install espeak-ng) and is not
needed otherwise.
"""

from __future__ import annotations

import subprocess
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
from PIL import Image, ImageChops, ImageDraw, ImageFilter

HERE = Path(__file__).resolve().parent
SIZE = 768  # pixels of the portrait
SCALE = 3  # it is drawn this much larger, for smooth edges
RATE_HZ = 44_100

SENTENCE = (
    "Hello! I am only a drawing. "
    "Give the engine a picture and a recording, and it makes me talk for as long as you like."
)

Point = tuple[float, float]
Color = tuple[int, int, int]

SKIN, SKIN_SHADE, SKIN_LIGHT = (238, 190, 160), (196, 128, 104), (255, 222, 198)
HAIR, HAIR_LIGHT, HAIR_DARK = (74, 44, 34), (132, 84, 60), (46, 26, 22)
SWEATER, SWEATER_SHADE, SWEATER_LIGHT = (38, 112, 120), (22, 74, 86), (74, 152, 156)
LIP, LIP_DARK, LIP_LIGHT = (200, 96, 94), (140, 58, 62), (232, 140, 132)
IRIS, IRIS_DARK, IRIS_LIGHT = (92, 112, 66), (44, 60, 36), (150, 168, 104)


class Canvas:
    """A picture of 768 × 768 units; shapes are masks, so that they can be blurred and cut."""

    def __init__(self) -> None:
        side = SIZE * SCALE
        self.image = Image.new("RGB", (side, side))
        self._side = side

    def gradient(self, top: Color, bottom: Color, glow: Color, center: Point) -> None:
        """A backdrop: a vertical gradient with a soft round glow."""
        y, x = np.mgrid[0 : self._side, 0 : self._side] / SCALE  # units
        ramp = (y / SIZE)[..., None]
        pixels = np.array(top) * (1 - ramp) + np.array(bottom) * ramp
        distance = np.hypot(x - center[0], y - center[1]) / 420
        light = np.exp(-(distance**2))[..., None] * 0.75
        pixels = pixels * (1 - light) + np.array(glow) * light
        self.image = Image.fromarray(pixels.round().astype(np.uint8))

    def blank(self) -> Image.Image:
        return Image.new("L", (self._side, self._side))

    def ellipse(self, center: Point, radii: Point) -> Image.Image:
        mask = self.blank()
        (x, y), (rx, ry) = center, radii
        box = [v * SCALE for v in (x - rx, y - ry, x + rx, y + ry)]
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        return mask

    def blob(self, points: Sequence[Point]) -> Image.Image:
        """The closed smooth curve (Catmull-Rom) through `points`."""
        mask = self.blank()
        curve = [(x * SCALE, y * SCALE) for x, y in smooth(points, closed=True)]
        ImageDraw.Draw(mask).polygon(curve, fill=255)
        return mask

    def stroke(self, points: Sequence[Point], widths: tuple[float, float, float]) -> Image.Image:
        """A brush stroke along `points`: its width at the start, in the middle, at the end."""
        mask = self.blank()
        draw = ImageDraw.Draw(mask)
        curve = smooth(points, closed=False)
        along = np.linspace(0, 1, len(curve))
        for (x, y), width in zip(curve, np.interp(along, [0, 0.5, 1], widths), strict=True):
            r = width / 2
            draw.ellipse([v * SCALE for v in (x - r, y - r, x + r, y + r)], fill=255)
        return mask

    def paint(
        self,
        mask: Image.Image,
        color: Color,
        *,
        blur: float = 0,
        opacity: float = 1,
        inside: Image.Image | None = None,
    ) -> None:
        """Puts a colour where the mask is, its edge blurred by `blur` units, cut to `inside`."""
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * SCALE))
        if inside is not None:
            mask = ImageChops.multiply(mask, inside)
        if opacity < 1:
            mask = mask.point(lambda value: round(value * opacity))
        self.image.paste(color, (0, 0), mask)


def smooth(points: Sequence[Point], closed: bool) -> list[Point]:
    """Points densely along the Catmull-Rom curve through `points`."""
    count = len(points)
    curve: list[Point] = []
    for i in range(count if closed else count - 1):
        indices = [i - 1, i, i + 1, i + 2]
        near = [j % count if closed else min(max(j, 0), count - 1) for j in indices]
        p = np.array([points[j] for j in near])
        for t in np.linspace(0, 1, 40, endpoint=False):
            x, y = 0.5 * (
                2 * p[1]
                + (p[2] - p[0]) * t
                + (2 * p[0] - 5 * p[1] + 4 * p[2] - p[3]) * t**2
                + (3 * p[1] - p[0] - 3 * p[2] + p[3]) * t**3
            )
            curve.append((float(x), float(y)))
    return curve


def mirrored(points: Sequence[Point]) -> list[Point]:
    return [(SIZE - x, y) for x, y in points]


def draw_portrait() -> Image.Image:
    canvas = Canvas()
    canvas.gradient((206, 222, 226), (150, 176, 190), (250, 238, 222), (384, 330))
    draw_hair_behind(canvas)
    draw_body(canvas)
    face = draw_head(canvas)
    draw_features(canvas, face)
    draw_hair_in_front(canvas)
    return canvas.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_hair_behind(canvas: Canvas) -> None:
    right = [(384, 88), (478, 100), (556, 168), (580, 276), (574, 380), (588, 470), (560, 548)]
    bob = canvas.blob([*right, (470, 590), (298, 590), *mirrored(right)[:0:-1]])
    canvas.paint(bob, HAIR_DARK)
    for x in (206, 232, 536, 562):
        strand = canvas.stroke([(x, 250), (x - (384 - x) * 0.04, 400), (x, 545)], (2, 14, 2))
        canvas.paint(strand, HAIR, blur=4, inside=bob)


def draw_body(canvas: Canvas) -> None:
    shoulder = [(470, 604), (560, 630), (650, 672), (704, 740), (726, 820)]
    body = canvas.blob([(384, 596), *shoulder, (384, 900), *mirrored(shoulder)[::-1]])
    canvas.paint(body, SWEATER)
    canvas.paint(canvas.ellipse((250, 680), (110, 40)), SWEATER_LIGHT, blur=26, inside=body)
    for side in (1, -1):
        fold = [(384 + side * 214, 700), (384 + side * 196, 760), (384 + side * 200, 790)]
        canvas.paint(canvas.stroke(fold, (4, 16, 26)), SWEATER_SHADE, blur=6, inside=body)
    canvas.paint(canvas.ellipse((620, 800), (150, 90)), SWEATER_SHADE, blur=36, inside=body)

    edge = [(440, 470), (444, 560), (470, 612)]
    neck = canvas.blob([*edge, (424, 648), (344, 648), *mirrored(edge)[::-1]])
    collar = canvas.ellipse((384, 632), (116, 50))
    canvas.paint(canvas.ellipse((384, 640), (118, 52)), SWEATER_SHADE, blur=6, inside=body)
    canvas.paint(collar, SWEATER_LIGHT)
    canvas.paint(canvas.ellipse((384, 624), (100, 42)), SWEATER_SHADE)
    canvas.paint(neck, SKIN)
    canvas.paint(canvas.ellipse((392, 536), (92, 50)), SKIN_SHADE, blur=15, inside=neck)
    canvas.paint(canvas.ellipse((456, 600), (30, 70)), SKIN_SHADE, blur=14, inside=neck)


def draw_head(canvas: Canvas) -> Image.Image:
    for side in (1, -1):
        ear = canvas.ellipse((384 + side * 158, 362), (24, 44))
        canvas.paint(ear, SKIN)
        inner = canvas.ellipse((384 + side * 162, 364), (11, 26))
        canvas.paint(inner, SKIN_SHADE, blur=5, opacity=0.7, inside=ear)
    cheek = [(462, 172), (522, 232), (540, 318), (532, 398), (500, 470), (440, 530)]
    face = canvas.blob([(384, 152), *cheek, (384, 548), *mirrored(cheek)[::-1]])
    canvas.paint(face, SKIN)
    # Light from the upper left: a shaded rim, most of it on the right and under the chin.
    rim = ImageChops.invert(canvas.ellipse((366, 330), (150, 205)))
    canvas.paint(rim, SKIN_SHADE, blur=34, opacity=0.6, inside=face)
    canvas.paint(canvas.ellipse((350, 250), (96, 50)), SKIN_LIGHT, blur=30, inside=face)
    canvas.paint(canvas.ellipse((300, 400), (36, 26)), SKIN_LIGHT, blur=16, opacity=0.6)
    canvas.paint(canvas.ellipse((384, 512), (30, 14)), SKIN_LIGHT, blur=9, opacity=0.7)
    for side in (1, -1):
        blush = canvas.ellipse((384 + side * 94, 424), (40, 26))
        canvas.paint(blush, (236, 128, 112), blur=17, opacity=0.42, inside=face)
    return face


def draw_features(canvas: Canvas, face: Image.Image) -> None:
    for side in (1, -1):
        draw_eye(canvas, side, face)
    nose_shade = [(398, 340), (406, 390), (412, 410)]
    canvas.paint(canvas.stroke(nose_shade, (4, 10, 16)), SKIN_SHADE, blur=7, opacity=0.55)
    canvas.paint(canvas.ellipse((386, 430), (26, 9)), SKIN_SHADE, blur=6, opacity=0.85)
    bridge = canvas.stroke([(380, 320), (379, 370), (381, 405)], (6, 9, 16))
    canvas.paint(bridge, SKIN_LIGHT, blur=5, opacity=0.8)
    for side in (1, -1):
        nostril = canvas.ellipse((384 + side * 14, 429), (6.5, 3.6))
        canvas.paint(nostril, (140, 74, 62), blur=1.5, opacity=0.85)
    draw_mouth(canvas)


def draw_eye(canvas: Canvas, side: int, face: Image.Image) -> None:
    x, y = 384 + side * 70, 342.0
    canvas.paint(canvas.ellipse((x, y - 6), (46, 28)), SKIN_SHADE, blur=10, opacity=0.4)
    lid = [(-40, 5), (-24, -13), (0, -21), (24, -15), (41, 1), (24, 13), (0, 17), (-22, 14)]
    opening = canvas.blob([(x + side * dx, y + dy) for dx, dy in lid])
    canvas.paint(opening, (250, 247, 243))
    canvas.paint(canvas.ellipse((x, y - 22), (44, 16)), (188, 178, 178), blur=5, inside=opening)
    for radius, color, blur in ((20.5, IRIS_DARK, 0.6), (17.5, IRIS, 1.5), (9, (20, 16, 16), 0.8)):
        canvas.paint(canvas.ellipse((x, y - 2), (radius, radius)), color, blur=blur, inside=opening)
    glow = canvas.ellipse((x + 2, y + 8), (11, 5))
    canvas.paint(glow, IRIS_LIGHT, blur=3, opacity=0.8, inside=opening)
    canvas.paint(
        canvas.ellipse((x, y - 19), (30, 7)), (40, 30, 30), blur=3, opacity=0.5, inside=opening
    )
    canvas.paint(canvas.ellipse((x - 7, y - 9), (5, 5)), (255, 255, 255), blur=0.6)
    canvas.paint(canvas.ellipse((x + 7, y + 5), (2.4, 2.4)), (255, 255, 255), opacity=0.8)

    lashes = [(x + side * dx, y + dy) for dx, dy in (*lid[:3], (25, -15), (39, -5), (50, -10))]
    canvas.paint(canvas.stroke(lashes, (2, 6.5, 1.5)), (48, 28, 26))
    lower = [(x + side * dx, y + dy) for dx, dy in lid[4:]]
    canvas.paint(canvas.stroke(lower, (2.5, 1.6, 1)), (150, 94, 80), blur=0.8, opacity=0.7)
    crease = [(x + side * dx, y + dy) for dx, dy in ((-34, -14), (-6, -31), (26, -26), (44, -13))]
    canvas.paint(canvas.stroke(crease, (1, 3, 1)), SKIN_SHADE, blur=1.2)
    brow = [(x + side * dx, y + dy) for dx, dy in ((-38, -50), (-6, -61), (26, -60), (54, -42))]
    canvas.paint(canvas.stroke(brow, (8, 13, 3)), HAIR, blur=1.6, inside=face)


def draw_mouth(canvas: Canvas) -> None:
    canvas.paint(canvas.ellipse((384, 500), (34, 8)), SKIN_SHADE, blur=7, opacity=0.55)
    top = [(326, 468), (356, 459), (374, 455), (384, 459), (394, 455), (412, 459), (442, 468)]
    parting = [(326, 468), (354, 472), (384, 474), (414, 472), (442, 468)]
    bottom = [(326, 468), (352, 484), (384, 491), (416, 484), (442, 468)]
    lips = canvas.blob(top + bottom[-2:0:-1])
    canvas.paint(lips, LIP)
    canvas.paint(canvas.blob(top + parting[-2:0:-1]), LIP_DARK, blur=3, opacity=0.5, inside=lips)
    canvas.paint(canvas.ellipse((376, 481), (24, 4)), LIP_LIGHT, blur=2.5, inside=lips)
    canvas.paint(canvas.stroke(parting, (2, 3.4, 2)), (104, 38, 42), blur=0.7)
    for side in (1, -1):
        corner = [(384 + side * 56, 469), (384 + side * 63, 463), (384 + side * 66, 460)]
        canvas.paint(canvas.stroke(corner, (3.5, 3, 1)), (150, 78, 70), blur=1.4, opacity=0.8)


def draw_hair_in_front(canvas: Canvas) -> None:
    # A side parting: the large part sweeps to the right, the small one to the left.
    large = [(326, 96), (400, 82), (498, 104), (564, 184), (584, 300), (572, 410), (560, 440)]
    inner = [(546, 360), (528, 280), (486, 222), (420, 188), (346, 142)]
    small = [(344, 90), (258, 108), (200, 182), (182, 300), (196, 410), (208, 440)]
    inner_small = [(222, 360), (240, 290), (262, 232), (296, 180), (334, 138)]
    for outline in (large + inner, small + inner_small):
        lock = canvas.blob(outline)
        canvas.paint(lock, HAIR_DARK, blur=9, opacity=0.45)
        canvas.paint(lock, HAIR)
    both = ImageChops.lighter(canvas.blob(large + inner), canvas.blob(small + inner_small))
    for step in range(7):
        t = step / 6
        strand = [
            (332 + 14 * t, 112 + 26 * t),
            (440 + 20 * t, 112 + 70 * t),
            (552 - 30 * t, 210 + 50 * t),
            (574 - 26 * t, 380 - 30 * t),
        ]
        color = HAIR_LIGHT if step % 2 else HAIR_DARK
        canvas.paint(canvas.stroke(strand, (1, 7, 1)), color, blur=2.5, opacity=0.6, inside=both)
    for step in range(5):
        t = step / 4
        strand = [
            (326 + 6 * t, 114 + 18 * t),
            (252 + 22 * t, 142 + 56 * t),
            (200 + 26 * t, 240 + 30 * t),
            (196 + 20 * t, 390 - 30 * t),
        ]
        color = HAIR_DARK if step % 2 else HAIR_LIGHT
        canvas.paint(canvas.stroke(strand, (1, 6, 1)), color, blur=2.5, opacity=0.6, inside=both)
    shine = canvas.stroke([(232, 210), (262, 158), (312, 128)], (4, 20, 4))
    canvas.paint(shine, (190, 140, 106), blur=8, opacity=0.45, inside=both)
    shine = canvas.stroke([(420, 126), (486, 150), (530, 206)], (4, 24, 4))
    canvas.paint(shine, (190, 140, 106), blur=9, opacity=0.4, inside=both)


def speak() -> np.ndarray:
    """The sentence as stereo int16 [n, 2] at 44.1 kHz, slightly different left and right."""
    command = ["espeak-ng", "-v", "en-us+f3", "-s", "172", "-g", "2", "--stdout", SENTENCE]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    # In a pipe espeak-ng cannot go back to write the length into the header: skip the 44 bytes.
    rate_hz = int.from_bytes(wav[24:28], "little")
    voice = np.frombuffer(wav[44:], np.int16).astype(np.float32) / 32_768
    voice = soxr.resample(voice, rate_hz, RATE_HZ)
    pause = np.zeros(RATE_HZ // 5, np.float32)
    voice = np.concatenate([pause, voice / np.abs(voice).max() * 0.7, pause])
    # As two microphones 10 cm apart hear it: 0.3 ms later and a little weaker on the right.
    delay = round(0.0003 * RATE_HZ)
    right = np.concatenate([np.zeros(delay, np.float32), voice[:-delay]]) * 0.85
    return (np.stack([voice, right], axis=1) * 32_767).round().astype(np.int16)


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(samples.tobytes())


def main() -> None:
    portrait = draw_portrait()
    portrait.save(HERE / "portrait.png", optimize=True)
    samples = speak()
    write_wav(HERE / "speech.wav", samples)
    print(f"portrait.png: {SIZE}×{SIZE}; speech.wav: {len(samples) / RATE_HZ:.1f} s")


if __name__ == "__main__":
    main()
