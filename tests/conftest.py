"""What tests of several rooms share, and the order in which they run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything loads OpenMP. The models here are tiny: threads that spin for one another are most
# of the time, and workers that share the cores need no more than one each.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from safetensors.torch import load_file

from tests.support import builds
from tests.support.cli import run, wav
from tests.support.paths import GOLDEN

__all__ = ["run", "wav"]  # fixtures

# The same examples in every run; others with `--hypothesis-profile default`.
with contextlib.suppress(ModuleNotFoundError):  # tests on a GPU do without
    from hypothesis import settings

    settings.register_profile("same", derandomize=True)
    settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow first, so that no worker is left with it when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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
    return builds.compiled_kernels()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny networks: with more, threads that wait for one another would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
