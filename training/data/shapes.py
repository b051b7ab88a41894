"""Anti-aliased drawing with signed distances: how much of each pixel a shape covers.

The picture is the square [-1, 1] x [-1, 1], y downwards, whatever its size in pixels. All functions
work on any broadcastable tensors, so that a clip is drawn at once: coordinates [T, H, W], numbers
that change from frame to frame [T, 1, 1]. A distance is negative inside; distances of ellipses and
curves are the usual first-order ones (value over the length of the gradient).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Number = Tensor | float


def blank(frames: int, size: int) -> Canvas:
    """Black pictures with the origin in the middle, from -1 to 1 either way."""
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return Canvas(torch.zeros(frames, 3, size, size), x[None], y[None], 2 / size)


def ellipse(
    x: Tensor, y: Tensor, cx: Number, cy: Number, rx: Number, ry: Number, power: float = 2.0
) -> Tensor:
    """Distance to an ellipse, or for a power above 2 to a superellipse (rounder square)."""
    u, v = ((x - cx) / rx).abs(), ((y - cy) / ry).abs()
    if power == 2.0:
        k0 = (u.square() + v.square() + 1e-9).sqrt()
        k1 = ((u / rx).square() + (v / ry).square() + 1e-9).sqrt()
        return k0 * (k0 - 1) / k1
    value = u**power + v**power
    slope = power * ((u ** (power - 1) / rx).square() + (v ** (power - 1) / ry).square()).sqrt()
    return (value - 1) / (slope + 1e-3)


def box(x: Tensor, y: Tensor, cx: Number, cy: Number, rx: Number, ry: Number, r: float) -> Tensor:
    """Distance to a rectangle with half sides rx, ry whose corners are rounded by r."""
    u, v = (x - cx).abs() - rx + r, (y - cy).abs() - ry + r
    outside = (u.clamp_min(0).square() + v.clamp_min(0).square() + 1e-12).sqrt()
    return outside + torch.maximum(u, v).clamp_max(0) - r


def segment(
    x: Tensor, y: Tensor, x0: Number, y0: Number, x1: Number, y1: Number, r: Number
) -> Tensor:
    """Distance to a line from (x0, y0) to (x1, y1), 2 r thick, with round ends."""
    dx, dy = x1 - x0, y1 - y0
    t = (((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((x - x0 - t * dx).square() + (y - y0 - t * dy).square() + 1e-12).sqrt() - r


def arc(
    x: Tensor, y: Tensor, cx: Number, cy: Number, half: Number, bend: Number, r: Number
) -> Tensor:
    """Distance to the parabola y = cy + bend * (1 - ((x - cx) / half)^2) between its ends, 2 r
    thick, pointed at the ends."""
    u = (x - cx) / half
    slope = 2 * bend * u / half
    away = (y - cy - bend * (1 - u * u)).abs() / (1 + slope * slope) ** 0.5
    taper = r * (1 - u * u).clamp_min(0) ** 0.5
    return torch.where(u.abs() < 1, away - taper, (u.abs() - 1) * half + away)


def cover(distance: Tensor, pixel: float, soft: float = 1.0) -> Tensor:
    """How much of a pixel (side `pixel`) is inside, 0 to 1; `soft` pixels wide at the edge."""
    return (0.5 - distance / (pixel * soft)).clamp(0, 1)


def glow(x: Tensor, y: Tensor, cx: Number, cy: Number, rx: Number, ry: Number) -> Tensor:
    """A Gaussian spot of height 1."""
    return torch.exp(-(((x - cx) / rx).square() + ((y - cy) / ry).square()))


@dataclass(frozen=True)
class Canvas:
    """Pictures that are painted on in place, and the coordinates of their pixels.

    picture: [T, 3, H, W]. x, y: [T or 1, H, W], moved with what is painted. pixel: side of one.
    """

    picture: Tensor
    x: Tensor
    y: Tensor
    pixel: float

    def paint(self, color: tuple[float, float, float], alpha: Tensor) -> None:
        """Puts a colour over the pictures, as opaque as alpha [T or 1, H, W] says."""
        ink = torch.tensor(color).view(3, 1, 1)
        self.picture.lerp_(ink.expand_as(self.picture), alpha.unsqueeze(-3).expand_as(self.picture))

    def fill(
        self, color: tuple[float, float, float], distance: Tensor, opacity: Number = 1.0
    ) -> None:
        """Puts a colour where a distance is negative."""
        self.paint(color, cover(distance, self.pixel) * opacity)

    def crop(self, left: float, right: float, top: float, bottom: float) -> Canvas:
        """The part of it that has all pixels of this rectangle of its coordinates, in any frame."""
        columns = self._inside(self.x.amin((0, 1)), self.x.amax((0, 1)), left, right)
        rows = self._inside(self.y.amin((0, 2)), self.y.amax((0, 2)), top, bottom)
        part = (..., rows, columns)
        return Canvas(self.picture[part], self.x[part], self.y[part], self.pixel)

    def moved(self, dx: Tensor, dy: Tensor) -> Canvas:
        """The same pictures in coordinates whose origin is at (dx, dy) [T]."""
        shift = (-1, 1, 1)
        return Canvas(self.picture, self.x - dx.view(shift), self.y - dy.view(shift), self.pixel)

    def _inside(self, lowest: Tensor, highest: Tensor, low: float, high: float) -> slice:
        inside = ((highest > low - self.pixel) & (lowest < high + self.pixel)).nonzero()
        if not len(inside):
            return slice(0, 0)
        return slice(int(inside[0]), int(inside[-1]) + 1)
