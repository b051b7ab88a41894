"""The CUDA backend on a GPU: `pytest -m gpu`. Skips, with the reason, where none is usable."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch

from liveact import _core, _core_dev
from liveact.device import kernels
from liveact.device.devices import cuda_obstacle
from liveact.dit.dit import Dit
from tests.support.compare import relative_error
from tests.support.cuda import independent
from tests.support.cuda.recorded_dit import denoise, load_dit, open_cuda, open_stream
from tests.support.kernels.manifest import read_manifest
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda() -> _core.Device:
    if obstacle := cuda_obstacle():
        pytest.skip(f"no usable GPU: {obstacle}")
    return open_cuda()


@pytest.fixture(scope="module")
def recorded(load_golden: Any) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = load_golden("dit/inputs.safetensors")
    return inputs


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_recorded_dit(golden, cuda, recorded, load_golden, precision: str) -> None:
    """At most twice the error of the CPU backend in the same precision, against the recording."""
    expected = load_golden("dit/outputs_single.safetensors")
    gpu = open_stream(load_dit(golden, cuda, precision), recorded)
    cpu = open_stream(load_dit(golden, _core.open_cpu(), precision), recorded)
    for block in range(3):
        found, emulated = denoise(gpu, recorded), denoise(cpu, recorded)
        reference = expected[f"latent.{block}"]
        bound = 2 * relative_error(emulated, reference)
        assert relative_error(found, reference) <= bound, f"block {block}"


def test_graphs_change_nothing(golden, cuda, recorded) -> None:
    """A stream that runs op by op, and one whose graphs are made anew before every block."""
    dit = load_dit(golden, cuda, "fp8")
    op_by_op = load_dit(golden, _core_dev.TimedDevice(cuda, flush_bytes=0), "fp8")
    replayed, renewed = open_stream(dit, recorded), open_stream(dit, recorded)
    eager = open_stream(op_by_op, recorded)
    for _ in range(5):
        renewed.set_prompt(recorded["text"])
        expected = denoise(eager, recorded)
        assert torch.equal(denoise(replayed, recorded), expected)
        assert torch.equal(denoise(renewed, recorded), expected)


def test_streams_do_not_mix(golden, cuda, recorded) -> None:
    """Two streams, and two devices on one card, at once and alone: the same bits. Each device
    measures for itself which algorithms are the fastest, so between the two the last bits differ.
    """
    dits = [load_dit(golden, device, "fp8") for device in (cuda, open_cuda())]
    alone: dict[int, list[torch.Tensor]] = {}
    results: dict[int, list[torch.Tensor]] = {}
    used = (0, 0, 1)  # which of dits a stream is on

    def run(target: dict[int, list[torch.Tensor]], key: int, dit: Dit) -> None:
        stream = open_stream(dit, recorded)
        target[key] = [denoise(stream, recorded) for _ in range(4)]

    for i, dit in enumerate(dits):
        run(alone, i, dit)
    threads = [
        threading.Thread(target=run, args=(results, key, dits[i])) for key, i in enumerate(used)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, i in enumerate(used):
        assert all(torch.equal(a, b) for a, b in zip(results[key], alone[i], strict=True))


def test_every_kernel_as_launched_by_others(cuda) -> None:
    """Our launcher and one that knows only the manifest: the same bits in every buffer."""
    driver = pytest.importorskip(
        "cuda.bindings.driver", reason="NVIDIA's Python bindings (cuda-python) are not installed"
    )
    _, context = driver.cuDevicePrimaryCtxRetain(driver.cuDeviceGet(0)[1])
    (pushed,) = driver.cuCtxPushCurrent(context)
    assert pushed == driver.CUresult.CUDA_SUCCESS

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(torch.uint8)

    try:
        for kernel in read_manifest(_core.cuda_architecture(0), kernels.PACKAGED):
            given = independent.buffers(kernel, seed=7)
            expected = independent.run(kernel, given)
            written = [n for n, t in given.items() if not torch.equal(bits(t), bits(expected[n]))]
            assert written, f"{kernel['name']} wrote nothing"
            found = independent.run(
                kernel,
                given,
                partial(_core.launch, cuda, kernel["name"], 0),
            )
            for name, tensor in expected.items():
                assert torch.equal(bits(found[name]), bits(tensor)), f"{kernel['name']}: {name}"
    finally:
        driver.cuCtxPopCurrent()
        driver.cuDevicePrimaryCtxRelease(driver.cuDeviceGet(0)[1])


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(cuda, tool: str) -> None:
    """Opening a stream, blocks as single ops and as graphs: no error in any kernel."""
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        pytest.skip("compute-sanitizer (of the CUDA toolkit) is not on the PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99"]
    command += [sys.executable, "-m", "tests.support.cuda.gpu_blocks", "4"]
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def test_a_thousand_blocks(golden, cuda, recorded) -> None:
    """No drift of memory or time, by our own count and by the device's."""
    stream = open_stream(load_dit(golden, cuda, "fp8"), recorded)
    for _ in range(10):
        denoise(stream, recorded)
    before = cuda.allocation_count, cuda.allocated_bytes
    free_before = cuda.free_bytes
    times = []
    for _ in range(1000):
        start = time.perf_counter()
        denoise(stream, recorded)
        times.append(time.perf_counter() - start)
    assert (cuda.allocation_count, cuda.allocated_bytes) == before
    # Graphs and cuBLASLt allocate behind our back, in pages of 2 MiB: one is not a drift.
    assert free_before - cuda.free_bytes <= 2 << 20
    assert statistics.median(times[-200:]) < 1.2 * statistics.median(times[:200])
