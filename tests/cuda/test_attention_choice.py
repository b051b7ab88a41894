"""Which kernel self-attention in fp8 runs with: the faster of two, measured when a stream opens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from liveact.device import kernels
from tests.support.cuda.blocks import calls, denoise, open_device, open_stream
from tests.support.cuda.fake import KERNEL_MS, FakeCuda

TRITON, GLUON = "self_attention.f8", "self_attention.f8.hopper"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCuda]:
    yield FakeCuda.copy_into(tmp_path)


@pytest.fixture
def images(fake: FakeCuda, compiled_kernels: Path) -> list[dict[str, Any]]:
    return fake.images(kernels.load("sm_90a", compiled_kernels))


def launched(fake: FakeCuda) -> Counter[str]:
    names = [line.split()[1] for line in fake.log() if line.startswith("cuLaunchKernel ")]
    return Counter(name for name in names if name.startswith("self_attention"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ms", "chosen"),
    [(0.5 * KERNEL_MS, GLUON), (2.0 * KERNEL_MS, TRITON), (0.99 * KERNEL_MS, TRITON)],
)
def test_the_faster_of_the_two(
    fake, images, weights, caplog: pytest.LogCaptureFixture, ms: float, chosen: str
) -> None:
    """A gain within the noise is none. What was chosen is in the log, once."""
    caplog.set_level(logging.INFO, "liveact")
    fake.set_kernel_ms(GLUON, ms)
    device = open_device(fake, images)
    fake.clear()
    stream = open_stream(device, weights)
    # Two shapes, the first block's and a steady one's: once to load and five times measured, each.
    assert launched(fake) == {TRITON: 12, GLUON: 12}
    for block in range(3):
        fake.clear()
        denoise(stream)
        assert launched(fake) == {chosen: 6}, f"block {block}"
    said = [
        v for k, v in device.choices.items() if k.startswith("self_attention f8 96 x (72 + 96)")
    ]
    assert len(said) == 1 and said[0].startswith(f"{chosen}: ") and f"{ms:.6f} ms" in said[0]
    fake.clear()
    open_stream(device, weights)
    assert launched(fake) == {}, "a device measures once"
    assert sum("8 96 x (72 + 96)" in record.message for record in caplog.records) == 1


def test_what_is_measured_is_not_zero(fake, images, weights) -> None:
    fake.clear()
    open_stream(open_device(fake, images), weights)
    lines = [line.split()[0] for line in fake.log()]
    first = next(i for i, x in enumerate(fake.log()) if f"cuLaunchKernel {TRITON}" in x)
    assert "cuMemcpyHtoDAsync" in lines[first - 12 : first], "expected random operands"


def test_without_the_second_nothing_is_measured(fake, images, weights) -> None:
    device = open_device(fake, [image for image in images if image["name"] != GLUON])
    fake.clear()
    stream = open_stream(device, weights)
    assert launched(fake) == {}
    denoise(stream)
    assert launched(fake) == {TRITON: 6}
    assert f"{TRITON}, the only one packaged" in device.choices.values()


def test_bf16_has_one_kernel(fake, images, weights) -> None:
    fake.set_kernel_ms(GLUON, 0.5 * KERNEL_MS)
    fake.clear()
    stream = open_stream(open_device(fake, images), weights, "bf16")
    assert launched(fake) == {}
    denoise(stream)
    assert launched(fake) == {"self_attention.bf16": 6}


def test_a_kernel_that_fails_is_an_error_of_the_stream(fake, images, weights) -> None:
    fake.fail(f"cuLaunchKernel {GLUON}", 700)
    with pytest.raises(Exception, match=rf"cuLaunchKernel of {GLUON}: .* \(700\)"):
        open_stream(open_device(fake, images), weights)
    assert calls(fake.log())["cuMemAlloc"] > 0
