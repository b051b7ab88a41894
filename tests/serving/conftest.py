"""One engine per file, and that no test leaves anything behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from liveact.engine import Engine
from tests.support.pipeline import demo_checkpoint
from tests.support.session import wait_until, workers


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(demo_checkpoint(), device="cpu")


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Iterator[None]:
    """Every test ends without a worker and with the memory of the device as before."""
    before = engine.dit.device.allocated_bytes
    yield
    wait_until(lambda: not workers(), "workers are left over")
    if engine.dit.device.allocated_bytes > before:
        gc.collect()  # takes longer than most of the tests
    assert engine.dit.device.allocated_bytes <= before
