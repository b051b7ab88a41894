"""The fake driver, the kernels and weights that run on it: of a file, unless it says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from liveact import _core
from tests.support.cuda.blocks import NUM_LAYERS
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import random_weights
from tests.support.kernels.manifest import read_manifest


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda.copy_into(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def manifest(compiled_kernels: Path) -> list[dict[str, Any]]:
    return read_manifest("sm_90a", compiled_kernels)


@pytest.fixture(scope="module")
def images(fake: FakeCuda, manifest: list[dict[str, Any]]) -> list[_core.KernelImage]:
    return fake.images(manifest)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(NUM_LAYERS)
