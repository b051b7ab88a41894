"""Fixtures shared by all tests: where the recordings are, how relative error is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY.parent / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with the recordings of the released model; tests that need it skip without it."""
    if not GOLDEN.is_dir():
        pytest.skip(f"recordings of the released model not found: expected the folder {GOLDEN}")
    return GOLDEN


@pytest.fixture(scope="session")
def load_golden(golden: Path):
    """Callable: `load_golden("dit/inputs.safetensors")` gives a dict of tensors."""
    return lambda name: load_file(golden / name)


@pytest.fixture(scope="session")
def compiled_kernels() -> Path:
    """The GPU kernels compiled for sm_90a; only what changed is compiled again."""
    pytest.importorskip("triton", reason="triton compiles the GPU kernels; it is not installed")
    folder = REPOSITORY / "build" / "kernels"
    command = [sys.executable, "-m", "triton_kernels.compile", "--arch", "sm_90a", "--out", folder]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny networks: with more, threads that wait for one another would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over the whole tensor, in float64."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {expected.shape}"
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()
