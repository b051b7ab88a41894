"""Draws a member of the family: a portrait, or every frame of a clip at once.

The mouth is where it has to be exact: its half height grows with `opening`, its half width with
`width` and `smile`, and `mouth_geometry` says what a picture should show. Everything is painted
from back to front; see `shapes` for the coordinates. Of the head each part is painted in a
rectangle around it only, which makes a clip three times as fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.identity import Color, Identity, shade
from training.data.motion import COLUMNS
from training.data.shapes import Canvas, arc, blank, box, ellipse, glow, segment

INSIDE: Color = (0.27, 0.06, 0.09)  # of the mouth
TOOTH: Color = (0.97, 0.96, 0.93)
TONGUE: Color = (0.80, 0.36, 0.38)
_WHITE: Color = (0.99, 0.99, 0.98)
_GOLD: Color = (0.96, 0.78, 0.25)

MOUTH_OPENING = 0.105  # half height of a mouth that is wide open
_ZOOM = 0.84  # the picture shows this much of the figure, so that the mouth is large
_FACE_Y = 0.0
_EYE_Y = -0.06  # of the face, like all that follows


@dataclass(frozen=True)
class Mouth:
    """The inside of the mouth, [T] each, in units of half the picture.

    x, y: its middle. half_width, up, down: from there to its corners and to the lips. lift: how
    much the corners are above the middle; it also moves the middle down, by 0.35 of it.
    """

    x: Tensor
    y: Tensor
    half_width: Tensor
    up: Tensor
    down: Tensor
    lift: Tensor

    @property
    def area(self) -> Tensor:
        """[T], in the same units squared: of what lies between its two parabolas."""
        return 4 / 3 * self.half_width * (self.up + self.down)


def mouth_geometry(person: Identity, motion: Tensor) -> Mouth:
    """The mouth that `draw` draws, from motion [T, 12] in the order of `COLUMNS`."""
    m = _figure_mouth(person, motion)
    fields = (m.x, m.y, m.half_width, m.up, m.down, m.lift)
    return Mouth(*(value / _ZOOM for value in fields))


def draw(person: Identity, motion: Tensor, size: int = 128) -> Tensor:
    """Motion [T, 12] in the order of `COLUMNS` -> pictures [T, 3, size, size], 0 to 1."""
    still = blank(1, size)
    still = Canvas(still.picture, still.x * _ZOOM, still.y * _ZOOM, still.pixel * _ZOOM)
    _background(still, person)
    frames = len(motion)
    canvas = Canvas(still.picture.repeat(frames, 1, 1, 1), still.x, still.y, still.pixel)
    dx, dy = _head(motion)
    head = canvas.moved(dx, dy + _FACE_Y)
    _hair_behind(head, person)
    _body(canvas, person)
    _ears(head, person)
    _face(head, person, motion)
    _eyes(head, person, motion)
    _mouth(canvas, person, motion)
    _hair_before(head, person)
    _glasses(head, person)
    if float(motion[:, COLUMNS.index("hand")].max()) > 0:
        _hand(canvas, person, motion)
    return canvas.picture


def _figure_mouth(person: Identity, motion: Tensor) -> Mouth:
    """`mouth_geometry` in the units of the figure."""
    m = {name: motion[:, i] for i, name in enumerate(COLUMNS)}
    opening = m["opening"].clamp(0, 1)
    width = person.mouth_width * (1 + 0.24 * m["width"] + 0.18 * m["smile"] - 0.06 * m["press"])
    dx, dy = _head(motion)
    return Mouth(
        x=dx,
        y=_FACE_Y + person.mouth_y + dy + 0.010 * opening,
        half_width=width * (1 - 0.08 * opening),
        up=MOUTH_OPENING * 0.62 * opening,
        down=MOUTH_OPENING * 1.38 * opening,
        lift=0.016 + 0.045 * m["smile"] - 0.055 * m["sad"],
    )


def _head(motion: Tensor) -> tuple[Tensor, Tensor]:
    """Where the head is moved to, [T] each: a nod, and to the side with that of speech."""
    nod, bob = (motion[:, COLUMNS.index(name)] for name in ("nod", "bob"))
    return 0.04 * nod, 0.07 * nod + 0.07 * bob


def _column(motion: Tensor, name: str) -> Tensor:
    """[T, 1, 1]"""
    return motion[:, COLUMNS.index(name)].view(-1, 1, 1)


# ---------------------------------------------------------------------------- what stands still


def _background(c: Canvas, person: Identity) -> None:
    """A light that falls off, and two large discs."""
    c.paint(person.back, torch.ones_like(c.x))
    c.paint(shade(person.back, 1.5), 0.8 * glow(c.x, c.y, 0.0, -0.3, 0.9, 0.9))
    for cx, cy, r in ((-0.75, -0.5, 0.38), (0.8, 0.25, 0.5)):
        c.fill(shade(person.back, 0.9), ellipse(c.x, c.y, cx, cy, r, r), 0.6)


def _body(canvas: Canvas, person: Identity) -> None:
    """Neck and shirt. They do not move, so they are the same in each frame."""
    c = canvas.crop(-1.0, 1.0, 0.25, 1.0)
    x, y = c.x, c.y
    shoulders = ellipse(x, y, 0.0, 1.12, 0.80, 0.46, 2.6)
    c.fill(person.shirt, shoulders)
    c.fill(person.accent, torch.maximum(shoulders, _pattern(person, x, y)))
    c.fill(shade(person.shirt, 0.55), shoulders, 0.35 * glow(x, y, 0.0, 0.62, 0.35, 0.16))
    c.fill(shade(person.shirt, 0.72), ellipse(x, y, 0.0, 0.70, 0.235, 0.13))
    neck = torch.minimum(
        box(x, y, 0.0, 0.55, 0.15, 0.26, 0.12), ellipse(x, y, 0.0, 0.68, 0.20, 0.115)
    )
    c.fill(person.skin, neck)
    c.fill(shade(person.skin, 0.62), neck, 0.75 * glow(x, y, 0.02, 0.52, 0.24, 0.12))


def _pattern(person: Identity, x: Tensor, y: Tensor) -> Tensor:
    """Distance to where the shirt has its second colour."""
    step = 0.17 * person.pattern_scale
    v = ((y - 0.06) / step) % 1 - 0.5
    if person.pattern == "stripes":
        return (v.abs() - 0.25) * step
    if person.pattern == "dots":
        row = torch.floor((y - 0.06) / step) % 2
        u = (x / step + 0.5 * row + 0.5) % 1 - 0.5
        return ((u.square() + v.square()).sqrt() - 0.26) * step
    if person.pattern == "checks":
        u = (x / step + 0.5) % 1 - 0.5
        across, down = (u.abs() - 0.25) * step, (v.abs() - 0.25) * step
        return torch.maximum(torch.minimum(across, down), -torch.maximum(across, down))
    return torch.ones_like(x)


# ---------------------------------------------------------------------------- head


def _hair_behind(head: Canvas, person: Identity) -> None:
    w, h = person.face_width, person.face_height
    dark = shade(person.hair, 0.72)
    if person.hair_style == "bob":
        head.fill(dark, box(head.x, head.y, 0.0, 0.06, w + 0.12, h + 0.03, 0.3))
    elif person.hair_style == "long":
        head.fill(dark, box(head.x, head.y, 0.0, 0.30, w + 0.13, h + 0.28, 0.34))
    elif person.hair_style == "bun":
        c = head.crop(-0.25, 0.25, -1.0, -h + 0.05)
        c.fill(dark, ellipse(c.x, c.y, 0.0, -h - 0.10, 0.19, 0.16))
        c.paint(shade(person.hair, 1.15), 0.5 * glow(c.x, c.y, -0.05, -h - 0.16, 0.07, 0.05))
    elif person.hair_style == "curls":
        curls = []
        for i in range(11):
            angle = math.pi * (i / 10 * 1.3 - 0.15)
            cx, cy = -(w + 0.05) * math.cos(angle), -h * math.sin(angle)
            curls.append(ellipse(head.x, head.y, cx, cy, 0.17, 0.17))
        head.fill(dark, torch.stack(curls).amin(0))


def _ears(head: Canvas, person: Identity) -> None:
    for side in (-1.0, 1.0):
        cx = side * (person.face_width + 0.01)
        c = head.crop(cx - 0.08, cx + 0.08, -0.1, 0.23)
        c.fill(shade(person.skin, 0.93), ellipse(c.x, c.y, cx, 0.03, 0.065, 0.105))
        c.fill(shade(person.skin, 0.78), ellipse(c.x, c.y, cx + 0.01 * side, 0.03, 0.03, 0.06), 0.7)
        if person.ear_rings:
            rx = cx + 0.015 * side
            c.fill(_GOLD, ellipse(c.x, c.y, rx, 0.175, 0.042, 0.042))
            c.fill((1.0, 0.97, 0.8), ellipse(c.x, c.y, rx - 0.012, 0.163, 0.014, 0.014))


def _face(head: Canvas, person: Identity, motion: Tensor) -> None:
    w, h, skin = person.face_width, person.face_height, person.skin
    c = head.crop(-w - 0.02, w + 0.02, -h - 0.02, h + 0.08)
    x, y = c.x, c.y
    # The chin goes down with the jaw: the lower half is a taller ellipse.
    jaw = 0.04 * _column(motion, "opening").clamp(0, 1)
    height = torch.where(y > 0, h + jaw, torch.tensor(h))
    face = ellipse(x, y, 0.0, 0.0, w, height, person.jaw)
    c.fill(skin, face)
    c.fill(shade(skin, 1.35), face, 0.5 * glow(x, y, -0.08, -0.2, 0.3, 0.28))
    edge = ((x / w).square() + (y / h).square()).clamp(0, 1) ** 4
    c.fill(shade(skin, 0.8), face, 0.45 * edge)
    for side in (-1.0, 1.0):
        c.fill((0.93, 0.42, 0.40), face, 0.3 * glow(x, y, side * 0.25, 0.17, 0.10, 0.075))
        if person.freckles:
            for fx, fy in ((0.2, 0.12), (0.25, 0.16), (0.3, 0.11), (0.23, 0.2)):
                s = c.crop(side * fx - 0.02, side * fx + 0.02, fy - 0.02, fy + 0.02)
                s.fill(shade(skin, 0.72), ellipse(s.x, s.y, side * fx, fy, 0.012, 0.012), 0.8)
    _nose(head, person)


def _nose(head: Canvas, person: Identity) -> None:
    n, skin = person.nose, person.skin
    c = head.crop(-0.14, 0.14, -0.05, 0.2)
    c.paint(shade(skin, 0.74), 0.5 * glow(c.x, c.y, 0.03, 0.12, n, 0.03))
    c.paint(shade(skin, 1.4), 0.6 * glow(c.x, c.y, -0.012, 0.075, 0.022, 0.045))
    c.fill(shade(skin, 0.58), arc(c.x, c.y, 0.0, 0.115, n, 0.022, 0.010), 0.8)


def _eyes(head: Canvas, person: Identity, motion: Tensor) -> None:
    smile, sad = _column(motion, "smile"), _column(motion, "sad")
    lid = 0.12 + 0.88 * torch.maximum(_column(motion, "blink").clamp(0, 1), 0.2 * sad)
    r = person.eye_size
    for side in (-1.0, 1.0):
        cx, cy = side * person.eye_gap, _EYE_Y
        c = head.crop(cx - 1.6 * r, cx + 1.6 * r, cy - 2.6 * r, cy + 1.7 * r)
        x, y = c.x, c.y
        c.paint(shade(person.skin, 0.8), 0.5 * glow(x, y, cx, cy, 1.2 * r, 1.1 * r))
        # What the lids leave open: between an upper and a lower edge, bent with the eyeball.
        bend = (1 - ((x - cx) / r).square()).clamp(0, 1).sqrt()
        upper = cy + r * (2.0 * lid - 1.0) * bend
        lower = cy + r * (1.0 - 0.3 * smile) * bend
        ball = ellipse(x, y, cx, cy, r, r * 1.05)
        open_eye = torch.maximum(torch.maximum(upper - y, y - lower), ball)
        c.fill(_WHITE, open_eye)
        for color, up, rx, ry in (
            (shade(person.iris, 0.6), 0.004, 0.66, 0.70),
            (shade(person.iris, 1.12), 0.010, 0.53, 0.57),
            ((0.06, 0.05, 0.07), 0.004, 0.33, 0.35),
        ):
            disc = ellipse(x, y, cx, cy + up, r * rx, r * ry)
            c.fill(color, torch.maximum(open_eye, disc))
        spark = ellipse(x, y, cx - 0.25 * r, cy - 0.25 * r, r * 0.19, r * 0.19)
        c.fill((1.0, 1.0, 1.0), torch.maximum(open_eye, spark))
        lash = torch.maximum((y - upper).abs() - 0.016, (x - cx).abs() - r * 0.97)
        c.fill(shade(person.hair, 0.4), lash)
        brow_y = cy - r - 0.055 - 0.045 * _column(motion, "brow") - 0.015 * smile
        tilt = side * (person.brow_tilt + 0.04 * sad) * (x - cx) / r
        brow = arc(x, y - tilt, cx, brow_y + 0.012, r * 1.18, -0.03, person.brow_thickness)
        c.fill(shade(person.hair, 0.75), brow)


def _mouth(canvas: Canvas, person: Identity, motion: Tensor) -> None:
    m = _figure_mouth(person, motion)
    press, teeth = (_column(motion, name).clamp(0, 1) for name in ("press", "teeth"))
    cx, cy, half, up, down, lift = (
        v.view(-1, 1, 1) for v in (m.x, m.y, m.half_width, m.up, m.down, m.lift)
    )
    c = canvas.crop(-0.28, 0.34, _FACE_Y + 0.12, _FACE_Y + 0.66)
    x, y = c.x, c.y
    u = (x - cx) / half
    bow = (1 - u * u).clamp_min(-0.5)
    middle = cy - lift * (u * u - 0.35)  # the line where the lips meet
    top, bottom = middle - up * bow, middle + down * bow
    thick = 0.036 * (1 - 0.45 * press)
    outer = (1 - (u / 1.12).square()).clamp_min(0) ** 0.75
    dip = 0.010 * glow(u, u, 0.0, 0.0, 0.18, 0.18)  # of the upper lip
    lip_top = middle - (up + thick) * outer + dip
    lip_bottom = middle + (down + 1.25 * thick) * outer
    lips = torch.maximum(torch.maximum(lip_top - y, y - lip_bottom), (u.abs() - 1.12) * half)
    c.paint(shade(person.skin, 0.72), 0.45 * glow(x, y, cx, cy + down + 0.085, 0.09, 0.022))
    c.fill(person.lip, lips)
    c.fill(shade(person.lip, 1.45), lips, 0.5 * glow(x, y, cx, cy + down + 0.022, 0.06, 0.014))
    # Divided by the slope of the edges, so that a steep edge is one pixel wide too.
    steep = (1 + (2 * (up + down) * u / half).square()).sqrt()
    gap = torch.maximum(torch.maximum(top - y, y - bottom) / steep, (u.abs() - 1) * half)
    c.fill(INSIDE, gap)
    tongue = ellipse(x, y, cx, cy + down * 1.05, half * 0.62, 0.03 + 0.5 * down)
    c.fill(TONGUE, torch.maximum(gap, tongue))
    edge = top + (0.012 + 0.03 * teeth) * (up + down).clamp(0, 0.06) / 0.06
    c.fill(TOOTH, torch.maximum(gap, y - edge), 0.15 + 0.85 * teeth)
    line = torch.maximum((y - middle).abs() - 0.008, (u.abs() - 1.02) * half)
    c.fill(shade(person.lip, 0.45), line, (1 - (up + down) / 0.02).clamp(0, 1))


def _hair_before(head: Canvas, person: Identity) -> None:
    w, h, style = person.face_width, person.face_height, person.hair_style
    c = head.crop(-w - 0.1, w + 0.1, -h - 0.2, 0.42)
    x, y = c.x, c.y
    around = 0.035 if style == "bun" else 0.075
    crown = ellipse(x, y, 0.0, -0.10, w + around, h + 0.03, 2.2)
    free = -ellipse(x, y, 0.0, 0.32, w - 0.015, 0.66, 2.3)  # the forehead
    limit = y + 0.02
    if style not in ("short", "curls"):
        # Of the forehead, what two ellipses to the left and right of a parting leave free.
        p = person.parting
        left, right = (ellipse(x, y, p + s * 0.42, 0.30, 0.46, 0.60) for s in (-1.0, 1.0))
        free = torch.maximum(-torch.minimum(left, right), free)
        limit = y - (-0.02 if style == "bun" else 0.40)
    hair = torch.maximum(torch.maximum(crown, free), limit)
    c.fill(person.hair, hair)
    c.fill(shade(person.hair, 1.45), hair, 0.55 * glow(x, y, -0.16, -0.47, 0.24, 0.07))
    if style == "curls":
        for i in range(9):
            angle = math.pi * (i / 8 * 0.84 + 0.08)
            cx, cy = -w * 0.92 * math.cos(angle), -h * 0.86 * math.sin(angle) - 0.04
            s = head.crop(cx - 0.11, cx + 0.11, cy - 0.11, cy + 0.11)
            color = person.hair if i % 2 else shade(person.hair, 1.08)
            s.fill(color, ellipse(s.x, s.y, cx, cy, 0.105, 0.105))
    if style == "bun":
        s = head.crop(-0.16, 0.16, -h - 0.06, -h + 0.06)
        s.fill(person.accent, segment(s.x, s.y, -0.12, -h - 0.015, 0.12, -h - 0.015, 0.022))


def _glasses(head: Canvas, person: Identity) -> None:
    if person.glasses == "none":
        return
    r, cy = person.eye_size * 1.5, _EYE_Y + 0.01
    c = head.crop(-person.face_width - 0.02, person.face_width + 0.02, cy - 0.2, cy + 0.2)
    x, y = c.x, c.y
    frame = segment(x, y, -0.045, cy - 0.02, 0.045, cy - 0.02, 0.012)
    for side in (-1.0, 1.0):
        cx = side * (person.eye_gap + 0.005)
        if person.glasses == "round":
            lens = ellipse(x, y, cx, cy, r, r)
        else:
            lens = box(x, y, cx, cy, r, r * 0.85, 0.045)
        shine = segment(x, y, cx - 0.06, cy + 0.05, cx, cy - 0.05, 0.012)
        c.fill((1.0, 1.0, 1.0), torch.maximum(lens, shine), 0.35)
        arm = segment(x, y, cx + side * r, cy - 0.02, side * person.face_width, cy - 0.02, 0.012)
        frame = torch.minimum(frame, torch.minimum(lens.abs() - 0.013, arm))
    c.fill(person.glasses_color, frame)


def _hand(canvas: Canvas, person: Identity, motion: Tensor) -> None:
    """A raised hand to the right of the face; it comes from below, and turns about the elbow."""
    raised, wave = _column(motion, "hand"), _column(motion, "wave")
    c = canvas.crop(0.3, 1.0, 0.1, 1.0)
    u, v = c.x - 0.68, c.y - 1.0 - 0.75 * (1 - raised)
    cos, sin = torch.cos(0.17 * wave), torch.sin(0.17 * wave)
    x, y = cos * u + sin * v, cos * v - sin * u
    c.fill(person.shirt, box(x, y, 0.0, -0.02, 0.1, 0.22, 0.03))
    shapes = [segment(x, y, 0.0, -0.2, 0.0, -0.42, 0.05), ellipse(x, y, 0.0, -0.47, 0.08, 0.085)]
    for i in (-1.5, -0.5, 0.5, 1.5):
        length = 0.66 - 0.012 * abs(i)
        shapes.append(segment(x, y, 0.04 * i, -0.5, 0.054 * i, -length, 0.021))
    shapes.append(segment(x, y, -0.05, -0.44, -0.115, -0.53, 0.023))
    hand = torch.stack(shapes).amin(0)
    c.fill(shade(person.skin, 0.62), hand - 0.012)
    c.fill(person.skin, hand)
