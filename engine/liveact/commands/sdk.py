"""`liveact sdk`: where the headers and libraries for C++ and C are that this package came with.

cmake -S . -B build -DCMAKE_PREFIX_PATH="$(liveact sdk)"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import liveact
from liveact.errors import InputError


def run(options: argparse.Namespace) -> None:
    """Prints the folder."""
    print(sdk_directory())


def sdk_directory() -> Path:
    """The prefix that CMake and pkg-config take. Raises InputError where it was not installed."""
    folder = Path(liveact.__file__).resolve().parent / "sdk"
    if not (folder / "include").is_dir():
        raise InputError(f"sdk: expected {folder}, found none in this installation")
    return folder
