"""Starts the tests of tests/kernels/interpreted in a process of their own.

The interpreter replaces the compiler when a kernel is defined, so the two cannot share a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

FOLDER = Path(__file__).resolve().parent / "interpreted"


FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
SLOW = {"test_memory.py", "test_two_devices.py", "test_vae_decoder.py"}


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=[pytest.mark.slow] if f in SLOW else []) for f in FILES]
)
def test_under_the_interpreter(file: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(FOLDER / file),
        "--tb=short",
        "-p",
        "no:warnings",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{file} under the interpreter:\n{done.stdout}{done.stderr}"
