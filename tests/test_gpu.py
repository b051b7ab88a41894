"""The CUDA backend on a GPU: `pytest -m gpu`. Skips, with the reason, where none is usable."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import pytest
import torch

from liveact import _core, kernels
from liveact.checkpoint import open_tensors
from liveact.devices import cublaslt_library, cuda_obstacle
from liveact.dit import WEIGHTS_STEM, Dit, DitStream, MemoryPolicy, audio_rows, read_config
from tests.conftest import relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda() -> _core.Device:
    if obstacle := cuda_obstacle():
        pytest.skip(f"no usable GPU: {obstacle}")
    return open_cuda()


def open_cuda() -> _core.Device:
    images = kernels.load(_core.cuda_architecture(0))
    return _core.open_cuda(0, images, cublaslt=cublaslt_library())


@pytest.fixture(scope="module")
def recorded(load_golden: Any) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = load_golden("dit/inputs.safetensors")
    return inputs


def load_dit(golden: Any, device: _core.Device, precision: str) -> Dit:
    tensors = open_tensors(golden / "dit", WEIGHTS_STEM)
    return Dit(device, read_config(golden / "dit" / "config.json", tensors), tensors, precision)


def open_stream(dit: Dit, recorded: dict[str, torch.Tensor], **options: Any) -> DitStream:
    y = recorded["y"][0]
    stream = dit.open_stream(
        (y.shape[2], y.shape[3]), MemoryPolicy(), image_tokens=recorded["clip"].shape[1], **options
    )
    stream.set_image(recorded["clip"][0], y)
    stream.set_prompt(recorded["text"])
    return stream


def denoise(stream: DitStream, recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    """The next block; blocks past the recording repeat its last one."""
    block = stream.next_block
    source = min(block, 4)
    renoise = torch.stack([recorded[f"renoise.{source}.{i}"] for i in range(2)])
    rows = audio_rows(recorded["audio"], source, stream.frames_of_next_block)
    return stream.denoise(recorded[f"noise.{source}"], renoise, rows)


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
    """A stream whose graphs are dropped before every block gives the same bits."""
    dit = load_dit(golden, cuda, "fp8")
    replayed, eager = open_stream(dit, recorded), open_stream(dit, recorded)
    for _ in range(5):
        eager.set_prompt(recorded["text"])
        assert torch.equal(denoise(replayed, recorded), denoise(eager, recorded))


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


def test_a_thousand_blocks(golden, cuda, recorded) -> None:
    """No drift of memory or time."""
    stream = open_stream(load_dit(golden, cuda, "fp8"), recorded)
    for _ in range(10):
        denoise(stream, recorded)
    before = cuda.allocation_count, cuda.allocated_bytes
    times = []
    for _ in range(1000):
        start = time.perf_counter()
        denoise(stream, recorded)
        times.append(time.perf_counter() - start)
    assert (cuda.allocation_count, cuda.allocated_bytes) == before
    assert statistics.median(times[-200:]) < 1.2 * statistics.median(times[:200])
