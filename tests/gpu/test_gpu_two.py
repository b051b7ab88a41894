"""Two GPUs that share every block: `pytest -m gpu`. Skips, with the reason, without two."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from liveact import _core
from liveact.device.devices import cuda_obstacle
from liveact.errors import SessionError
from tests.support.compare import relative_error
from tests.support.cuda.recorded_dit import denoise, load_dit, open_cuda, open_stream

pytestmark = pytest.mark.gpu
TIMEOUT_S = 60  # a device that waits for ever must not hold the tests up


@pytest.fixture(scope="module")
def pair() -> list[_core.Device]:
    if obstacle := cuda_obstacle():
        pytest.skip(f"no usable GPU: {obstacle}")
    if (count := _core.cuda_device_count()) < 2:
        pytest.skip(f"no usable GPU beside the first: found {count}")
    if obstacle := _core.cuda_peer_obstacle(0, 1):
        pytest.skip(f"no usable GPU pair: expected {obstacle}")
    return [open_cuda(0), open_cuda(1)]


@pytest.fixture(scope="module")
def recorded(load_golden: Any) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = load_golden("dit/inputs.safetensors")
    return inputs


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_recorded_dit(golden, pair, recorded, load_golden, precision: str) -> None:
    """At most twice the error of the CPU backend in the same precision, against the recording.
    Eager blocks, captured ones and replays."""
    expected = load_golden("dit/outputs_single.safetensors")
    two = open_stream(load_dit(golden, pair, precision), recorded)
    cpu = open_stream(load_dit(golden, _core.open_cpu(), precision), recorded)
    for block in range(5):
        found, emulated = denoise(two, recorded), denoise(cpu, recorded)
        reference = expected[f"latent.{block}"]
        bound = 2 * relative_error(emulated, reference)
        assert relative_error(found, reference) <= bound, f"block {block}"


def test_the_same_every_time(golden, pair, recorded) -> None:
    """What arrives from the other device arrives before it is read, hundreds of times."""
    dit = load_dit(golden, pair, "fp8")
    first, second = open_stream(dit, recorded), open_stream(dit, recorded)
    for _ in range(100):
        assert torch.equal(denoise(first, recorded), denoise(second, recorded))


def test_cancelling_leaves_no_device_waiting(golden, pair, recorded) -> None:
    dit = load_dit(golden, pair, "fp8")
    for blocks in range(5):
        stream = open_stream(dit, recorded)
        for _ in range(blocks):
            denoise(stream, recorded)
        stream.cancel()
        with pytest.raises(SessionError, match="cancelled"):
            denoise(stream, recorded)
        closing = threading.Thread(target=stream.close, daemon=True)
        closing.start()
        closing.join(TIMEOUT_S)
        assert not closing.is_alive(), f"closing after {blocks} blocks waits for ever"
