"""Our launcher and an independent reading of the manifest agree on every launch, without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from liveact import _core, _core_dev
from tests.support.cuda import gpu_blocks
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.independent import buffers, grid_of, is_pointer, pack, scalars
from tests.support.kernels.manifest import read_manifest
from triton_kernels.registry import specs_for


def test_the_script_for_the_sanitizer_runs(fake: FakeCuda, compiled_kernels: Path) -> None:
    images = fake.images(read_manifest("sm_90a", compiled_kernels))
    device = _core.open_cuda(0, images, fake.path, fake.path)
    fake.clear()
    gpu_blocks.run(device, 4)
    assert sum(line.startswith("cuGraphLaunch") for line in fake.log()) == 2 * 5
    fake.clear()
    gpu_blocks.run(_core_dev.TimedDevice(device, flush_bytes=0), 4)
    assert not any(line.startswith("cuGraphLaunch") for line in fake.log()), "no graph without one"


@pytest.mark.parametrize("arch", ["sm_90a"])
def test_every_launch_of_the_manifest(fake: FakeCuda, compiled_kernels: Path, arch: str) -> None:
    manifest = read_manifest(arch, compiled_kernels)
    assert [kernel["name"] for kernel in manifest] == sorted(specs_for(arch))
    device = _core.open_cuda(0, fake.images(manifest), fake.path, fake.path)
    fake.set_hook(lambda *_: None)  # the addresses are no memory
    for kernel in manifest:
        values = scalars(kernel)
        pointers = [p["name"] for p in kernel["parameters"] if is_pointer(p)]
        # Addresses that differ in every byte which may be lost.
        values |= {name: 0x7123_4560_0000 + 0x1_0001_0100 * i for i, name in enumerate(pointers)}
        fake.clear()
        _core.launch(device, kernel["name"], 0x5EED, values)
        (line,) = [line for line in fake.log() if line.startswith("cuLaunchKernel")]
        launch, arguments = line.split("|")
        name, *numbers = launch.split()[1:]
        assert name == kernel["name"]
        block, shared = [kernel["threads"], 1, 1], kernel["shared_bytes"]
        assert [int(n) for n in numbers] == [*grid_of(kernel, values), *block, shared], name
        packed = pack(kernel, values)
        assert len(packed) == len(kernel["parameters"]) + len(kernel["hidden_parameters"])
        for parameter, text, value in zip(
            kernel["parameters"], arguments.split(), packed, strict=False
        ):
            size = 8 if is_pointer(parameter) else 4
            assert ctypes.sizeof(value) == size, f"{name}: {parameter['name']}"
            if is_pointer(parameter):
                assert int(text, 16) == value.value, f"{name}: {parameter['name']}"
            elif parameter["type"] == "f32":
                assert float(text) == pytest.approx(value.value, rel=1e-5)  # printed with 6 digits
            else:
                assert int(text) == value.value, f"{name}: {parameter['name']}"


def test_the_buffers_have_no_nan(compiled_kernels: Path) -> None:
    """One kernel for every type that a parameter of any has."""
    seen: set[str] = set()
    manifest = read_manifest("sm_90a", compiled_kernels)
    for kernel in manifest:
        types = {p["type"] for p in kernel["parameters"] if is_pointer(p)}
        if types <= seen:
            continue
        seen |= types
        for p in filter(is_pointer, kernel["parameters"]):
            tensor = buffers(kernel, 0)[p["name"]]
            values = tensor.view(torch.float8_e4m3fn) if p["type"] == "*f8" else tensor
            assert values.float().isfinite().all() and values.float().any(), p
    assert seen == {"*bf16", "*f8", "*f32", "*i32", "*i64", "*u8"}, "types of parameters"
