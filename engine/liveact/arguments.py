"""What callers pass to the public methods, checked at the door: one value, one line, InputError.

Whole numbers are `int` (or NumPy's), never `bool` or `float`: 20.0 frames or a seed of True are
mistakes elsewhere.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from liveact.errors import InputError

_LARGEST = 2**63 - 1


def _refused(name: str, expected: str, value: object) -> InputError:
    return InputError(f"{name}: expected {expected}, found {value!r:.80}")


def text(name: str, value: object) -> str:
    """A string of Unicode text."""
    if not isinstance(value, str):
        raise _refused(name, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # what a shell makes of bytes that are no UTF-8
        raise InputError(f"{name}: expected Unicode text, found {value!r:.80}") from error
    return value


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """One of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise _refused(name, ", ".join(choices), value)
    return value


def whole_number(name: str, value: object, low: int = -(2**63), high: int = _LARGEST) -> int:
    """An integer from `low` to `high`."""
    found = value if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if found is None or not low <= int(found) <= high:
        raise _refused(name, f"a whole number from {low} to {high}", value)
    return int(found)


def number(name: str, value: object, low: float, high: float) -> float | Fraction:
    """A finite number from `low` to `high`, of any kind but complex."""
    found = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        found = float(value)
    if not low <= found <= high:
        raise _refused(name, f"{low:g} to {high:g}", value)
    return value if isinstance(value, Fraction) else found


def seconds(name: str, value: object) -> float | None:
    """A time to wait, 0 to 10⁹; None: for ever."""
    return None if value is None else float(number(name, value, 0, 1e9))


def size(name: str, value: object) -> tuple[int, int]:
    """Width and height: a tuple or list of two integers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise _refused(name, "(width, height)", value)
    width, height = (whole_number(name, side) for side in value)
    return width, height


def path(name: str, value: object) -> Path:
    """A file or directory name: str or Path."""
    if not isinstance(value, str | os.PathLike):
        raise _refused(name, "a str or a Path", value)
    found = os.fspath(value)
    if not isinstance(found, str) or "\0" in found:
        raise _refused(name, "a str or a Path", value)
    return Path(found)


def samples(name: str, value: object) -> np.ndarray[Any, Any]:
    """What NumPy makes an array of; its shape and dtype are for the audio front end to check."""
    try:
        found = np.asarray(value)
    except Exception as error:  # ragged lists, tensors on a GPU or with a gradient, …
        expected = "float32 or int16 of shape [n] or [n, channels]"
        raise _refused(name, expected, type(value)) from error
    return found
