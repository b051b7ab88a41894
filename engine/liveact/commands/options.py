"""What several commands check of their options before anything large is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from liveact.errors import InputError


def parse_size(text: str) -> tuple[int, int]:
    """`512x512` → (width, height). Raises InputError."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and len(text) < 16):
        raise InputError(f"size: expected WIDTHxHEIGHT such as 512x512, found {text!r}")
    return int(width), int(height)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises InputError for a value that is none of `choices`."""
    if value not in choices:
        raise InputError(f"{name}: expected {', '.join(choices)}, found {value!r}")


def check_output(out: Path, inputs: Sequence[Path]) -> None:
    """Refuses, before any work, what could not be written or would destroy an input."""
    if not out.parent.is_dir():
        raise InputError(f"{out}: expected the directory {out.parent} to exist")
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, found a directory")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out}: expected a directory that can be written, found {out.parent}")
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise InputError(f"{out}: expected an output other than the inputs, found one of them")


def on_terminal() -> bool:
    """Whether somebody watches the output."""
    return sys.stdout.isatty()
