"""The two extension modules and the public headers: version, errors, devices between modules."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from setuptools import Distribution
from setuptools.command.build_py import build_py

from liveact import _core, _core_dev
from liveact.errors import DeviceError, InputError
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import core_config, random_weights
from tests.support.kernels.manifest import read_manifest
from tests.support.paths import REPOSITORY

ROWS = np.ones((2, 64), np.float32)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda.copy_into(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def images(fake: FakeCuda, compiled_kernels: Path) -> list[_core.KernelImage]:
    return fake.images(read_manifest("sm_90a", compiled_kernels))


def test_the_runtime_has_the_version_of_the_package() -> None:
    assert _core.__version__ == version("liveact-engine")


def test_what_only_tests_use_is_not_in_the_module_that_is_shipped() -> None:
    shipped = {name for name in dir(_core) if not name.startswith("__")}
    assert not shipped & {name for name in dir(_core_dev) if not name.startswith("__")}
    assert not {name for name in shipped if "Error" in name}


def test_a_wheel_has_only_what_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    distribution = Distribution()
    distribution.parse_config_files()
    command = build_py(distribution)
    command.finalize_options()
    command.manifest_files = {}
    found = {Path(file).name for file in command.find_data_files("liveact", "engine/liveact")}
    assert {"_core.pyi", "py.typed"} <= found
    assert not {name for name in found if ".so" in name}, "setup.py adds those of its build"


@pytest.mark.slow
def test_public_headers_need_nothing_private(tmp_path: Path) -> None:
    include = REPOSITORY / "include"
    headers = sorted(include.rglob("*.h"))
    assert {"model.h", "stream.h", "device.h", "error.h", "version.h"} <= {h.name for h in headers}
    for header in headers:
        source = tmp_path / f"{header.stem}.cpp"
        source.write_text(f'#include "{header.relative_to(include)}"\n')
        command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*command, "-I", str(include), str(source)], check=True)


def test_errors_of_input() -> None:
    config = _core.ModelConfig()
    config.num_heads = 3
    with pytest.raises(InputError, match="expected dim to be a multiple of num_heads, found 5120"):
        config.check()
    with pytest.raises(InputError, match="expected fp32, bf16 or fp8, found 'fp4'"):
        _core_dev.ops.activate(_core.open_cpu(), ROWS, "relu", "fp4")


def test_errors_of_a_device_cross_the_modules(
    fake: FakeCuda, images: list[_core.KernelImage]
) -> None:
    """Thrown by one copy of the runtime, caught by the other."""
    device = _core.open_cuda(0, images, fake.path, fake.path)
    fake.fail("cuMemAlloc", 2)
    with pytest.raises(DeviceError, match=r"cuda:0: expected \d+ bytes of memory"):
        _core_dev.ops.activate(device, ROWS, "relu", "bf16")
    weights = random_weights(1)
    described = {n: (t.data_ptr(), "bf16", list(t.shape)) for n, t in weights.items()}
    timed = _core_dev.TimedDevice(device, flush_bytes=0)
    fake.fail("cuMemAlloc", 2)
    with pytest.raises(DeviceError, match=r"cuda:0: expected \d+ bytes of memory"):
        _core.Model(timed, core_config(1), described, "fp8")
    model = _core.Model(timed, core_config(1), described, "fp8")
    assert model.config.dim == core_config(1).dim


def test_too_little_memory_on_the_host_is_an_error_of_a_device() -> None:
    config = core_config(1)
    config.context_tokens, config.output_dim = 1, 2**46  # a bias beyond any address space
    weights = random_weights(1)
    small = torch.zeros(64)
    described = {}
    for name, shape in _core.expected_tensors(config).items():
        tensor = weights[name] if list(weights[name].shape) == shape else small
        described[name] = (tensor.data_ptr(), "bf16", shape)
    with pytest.raises(DeviceError, match=r"^host: .* not enough memory$"):
        _core.Model(_core.open_cpu(), config, described, "fp32")
