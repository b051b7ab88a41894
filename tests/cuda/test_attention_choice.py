"""Which kernel self-attention in fp8 runs with: the faster of two, measured when a stream opens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from liveact import _core
from tests.support.cuda.blocks import calls, denoise, launched, open_device, open_stream
from tests.support.cuda.fake import KERNEL_MS, FakeCuda
from tests.support.kernels.manifest import read_manifest

# In block 0 and in later ones, which write fp8.
TRITON = ("self_attention.f8", "self_attention.f8.to_f8")
GLUON = ("self_attention.f8.hopper", "self_attention.f8.hopper.to_f8")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCuda]:
    yield FakeCuda.copy_into(tmp_path)


@pytest.fixture
def images(fake: FakeCuda, compiled_kernels: Path) -> list[_core.KernelImage]:
    return fake.images(read_manifest("sm_90a", compiled_kernels))


def attended(fake: FakeCuda) -> dict[str, int]:
    return {k: n for k, n in launched(fake.log()).items() if k.startswith("self_attention")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ms", "chosen"),
    [(0.5 * KERNEL_MS, GLUON), (2.0 * KERNEL_MS, TRITON), (0.99 * KERNEL_MS, TRITON)],
)
def test_the_faster_of_the_two(
    fake, images, weights, caplog: pytest.LogCaptureFixture, ms: float, chosen: tuple[str, str]
) -> None:
    """A gain within the noise is none. What was chosen is in the log, once."""
    caplog.set_level(logging.INFO, "liveact")
    for name in GLUON:
        fake.set_kernel_ms(name, ms)
    device = open_device(fake, images)
    fake.clear()
    stream = open_stream(device, weights)
    # The first block's shape and a steady one's: once to load and five times measured, each.
    assert attended(fake) == dict.fromkeys(TRITON + GLUON, 6)
    for block in range(3):
        fake.clear()
        denoise(stream)
        assert attended(fake) == {chosen[block > 0]: 6}, f"block {block}"
    said = [
        v for k, v in device.choices.items() if k.startswith("self_attention f8 96 x (72 + 96)")
    ]
    assert len(said) == 1 and said[0].startswith(f"{chosen[1]}: ") and f"{ms:.6f} ms" in said[0]
    fake.clear()
    open_stream(device, weights)
    assert attended(fake) == {}, "a device measures once"
    assert sum("8 96 x (72 + 96)" in record.message for record in caplog.records) == 1


def test_what_is_measured_is_not_zero(fake, images, weights) -> None:
    fake.clear()
    open_stream(open_device(fake, images), weights)
    lines = [line.split()[0] for line in fake.log()]
    first = next(i for i, x in enumerate(fake.log()) if f"cuLaunchKernel {TRITON[0]}" in x)
    assert "cuMemcpyHtoDAsync" in lines[first - 12 : first], "expected random operands"


def test_without_the_second_nothing_is_measured(fake, images, weights) -> None:
    device = open_device(fake, [image for image in images if image.name not in GLUON])
    fake.clear()
    stream = open_stream(device, weights)
    assert attended(fake) == {}
    for block in range(2):
        fake.clear()
        denoise(stream)
        assert attended(fake) == {TRITON[block]: 6}
        assert f"{TRITON[block]}, the only one packaged" in device.choices.values()


def test_bf16_has_one_kernel(fake, images, weights) -> None:
    fake.set_kernel_ms(GLUON[0], 0.5 * KERNEL_MS)
    fake.clear()
    stream = open_stream(open_device(fake, images), weights, "bf16")
    assert attended(fake) == {}
    denoise(stream)
    assert attended(fake) == {"self_attention.bf16": 6}


def test_a_kernel_that_fails_is_an_error_of_the_stream(fake, images, weights) -> None:
    fake.fail(f"cuLaunchKernel {GLUON[0]}", 700)
    with pytest.raises(Exception, match=rf"cuLaunchKernel of {GLUON[0]}: .* \(700\)"):
        open_stream(open_device(fake, images), weights)
    assert calls(fake.log())["cuMemAlloc"] > 0
