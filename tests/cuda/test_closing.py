"""What closing a stream does to others on its device, and to work of its own that is under way."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from liveact import _core, _core_dev
from liveact.dit.dit import Dit, DitStream, MemoryPolicy
from liveact.errors import LiveActError, SessionError
from liveact.vae.queue import DecodeQueue
from tests.support.cuda.blocks import LATENT, NUM_LAYERS, calls, denoise, open_device, open_stream
from tests.support.cuda.small import core_config

ATTENTION = "cuLaunchKernel self_attention.f8.to_f8"


def closing(streams: list[DitStream]) -> Callable[[], None]:
    def close() -> None:
        streams.clear()
        gc.collect()

    return close


@pytest.mark.slow
def test_a_stream_that_closes_breaks_no_capture(fake, images, weights) -> None:
    """A cuBLASLt handle that is destroyed waits for the device, which ends every capture on it."""
    device = open_device(fake, images)
    stream, others = open_stream(device, weights), [open_stream(device, weights)]
    denoise(others[0])
    for _ in range(2):
        denoise(stream)
    fake.interrupt(ATTENTION, closing(others))
    fake.clear()
    denoise(stream)  # block 2, which is captured
    log = calls(fake.log())
    assert log["cuStreamBeginCapture"] == 3
    assert log["cuMemFree"] > 0, "expected the other to close meanwhile"
    assert log["cublasLtDestroy"] == 0


def test_a_broken_capture_is_an_error_of_its_stream(fake, images, weights) -> None:
    """The stand-in does break them: two devices of two libraries share no handle."""
    stream = open_stream(open_device(fake, images), weights)
    other = [open_device(fake, images)]
    for _ in range(2):
        denoise(stream)

    def destroy() -> None:
        fake._library.cublasLtDestroy(None)

    fake.interrupt(ATTENTION, destroy)
    with pytest.raises(LiveActError, match=r"\(901\)"):
        denoise(stream)
    other.clear()


def test_one_handle_for_a_gpu_as_long_as_it_is_open(fake, images, weights) -> None:
    fake.clear()
    first, second = open_device(fake, images), open_device(fake, images)
    streams = [open_stream(device, weights) for device in (first, first, second)]
    assert calls(fake.log())["cublasLtCreate"] == 1
    del streams, first
    gc.collect()
    assert calls(fake.log())["cublasLtDestroy"] == 0
    del second
    gc.collect()
    assert calls(fake.log())["cublasLtDestroy"] == 1


def test_a_device_without_a_handle_leaves_nothing(fake, images) -> None:
    fake.clear()
    fake.fail("cublasLtCreate", 1)
    with pytest.raises(LiveActError, match="cublasLtCreate: cuBLASLt status 1"):
        open_device(fake, images)
    log = calls(fake.log())
    assert log["cuModuleLoadData"] == log["cuModuleUnload"] > 0
    assert log["cuStreamCreateWithPriority"] == log["cuStreamDestroy"] == 1
    assert log["cuDevicePrimaryCtxRetain"] == log["cuDevicePrimaryCtxRelease"] == 1


def test_the_denoise_goes_before_the_decode_unless_asked(
    fake, images, weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less is more urgent."""
    fake.clear()
    stream = open_stream(open_device(fake, images), weights)
    made = [line.split() for line in fake.log() if line.startswith("cuStreamCreateWithPriority")]
    denoise = int(made[-1][2])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: priority)
    after = DecodeQueue(torch.device("cuda:0")).stream
    before = DecodeQueue(torch.device("cuda:0"), before_denoise=True).stream
    assert before < denoise < after
    stream.close()


def test_a_cancelled_stream_waits_before_it_frees(fake, images, weights) -> None:
    streams = [open_stream(open_device(fake, images), weights)]
    denoise(streams[0])
    fake.interrupt(ATTENTION, lambda: streams[0].cancel())
    with pytest.raises(SessionError, match="cancelled"):
        denoise(streams[0])
    before = fake.busy_frees()
    fake.clear()
    streams.clear()
    gc.collect()
    names = [line.split()[0] for line in fake.log()]
    assert names.index("cuStreamSynchronize") < names.index("cuMemFree")
    assert fake.busy_frees() == before


def test_a_stream_is_a_handful_of_allocations(fake, images, weights) -> None:
    """Each of which waits for the whole device when it is freed."""
    dit = Dit(open_device(fake, images), core_config(NUM_LAYERS), weights, "fp8")
    before = fake.live_allocations()
    streams = [dit.open_stream(LATENT, MemoryPolicy(), 1.5, 4)]
    assert fake.live_allocations() - before == 5, "the arena and four of the op queue"
    closing(streams)()
    assert fake.live_allocations() == before


@pytest.mark.parametrize("timed", [False, True])
def test_an_op_that_fails_waits_before_it_frees(fake, images, timed: bool) -> None:
    device: _core.Device = open_device(fake, images)
    if timed:
        device = _core_dev.TimedDevice(device, flush_bytes=512)
    before = fake.busy_frees()
    x = torch.randn(4, 16).numpy()
    fake.fail("cuMemcpyDtoHAsync", 999)
    with pytest.raises(LiveActError, match="a failure that the test asked for"):
        _core_dev.ops.guide(device, x.reshape(-1), np.ones(64, np.float32), 1.5)
    assert fake.busy_frees() == before
