"""Which algorithm of cuBLASLt a product runs with: the fastest, measured when a stream opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from liveact.device import kernels
from liveact.errors import LiveActError
from tests.support.cuda.blocks import calls, denoise, open_device, open_stream
from tests.support.cuda.fake import FakeCuda

HEURISTIC = "cublasLtMatmulAlgoGetHeuristic"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCuda]:
    yield FakeCuda.copy_into(tmp_path)


@pytest.fixture
def images(fake: FakeCuda, compiled_kernels: Path) -> list[dict[str, Any]]:
    return fake.images(kernels.load("sm_90a", compiled_kernels))


def products(log: list[str]) -> list[tuple[int, int, int, int]]:
    """(M, N, K, algorithm) of every product."""
    lines = [line.split("|")[1].split() for line in log if line.startswith("cublasLtMatmul ")]
    return [(int(m), int(n), int(k), int(algorithm)) for m, n, k, algorithm in lines]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_fastest_of_every_shape(fake, images, weights, precision: str) -> None:
    times = [5.0, 1.0, 3.0]
    fake.set_algorithms(times)
    stream = open_stream(open_device(fake, images), weights, precision)
    chosen = set()
    for block in range(3):
        fake.clear()
        denoise(stream)
        assert products(fake.log())
        for m, n, k, algorithm in products(fake.log()):
            fastest = min(range(3), key=lambda i: times[(i + n // 16) % 3])
            assert algorithm == fastest, f"block {block}: {m} x {n} x {k}"
            chosen.add(algorithm)
        new = [call for call in calls(fake.log()) if "Create" in call or call == HEURISTIC]
        assert new == [], "a block must not look for algorithms"
    assert len(chosen) > 1, "expected the fastest to differ between shapes"


def test_a_device_measures_a_shape_once(fake, images, weights) -> None:
    fake.set_algorithms([2.0, 1.0])
    device = open_device(fake, images)
    fake.clear()
    first = open_stream(device, weights)
    opened = products(fake.log())
    denoise(first)
    denoise(first)
    # Once to load it and five times measured, for each of the two.
    tried = [p for p in opened if opened.count(p) == 6]
    assert {p[3] for p in tried} == {0, 1}
    fake.clear()
    second = open_stream(device, weights)
    again = products(fake.log())
    assert max(again.count(p) for p in again) < 6 <= max(opened.count(p) for p in opened)
    fake.clear()
    denoise(second)
    assert calls(fake.log())[HEURISTIC] == 0


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.99], [1.0, 1.0, 1.0]])
def test_the_first_suggestion_where_nothing_is_gained(fake, images, weights, times) -> None:
    """One algorithm needs no clock; a gain within the noise is none."""
    fake.set_algorithms(times)
    fake.clear()
    stream = open_stream(open_device(fake, images), weights)
    if len(times) == 1:
        assert calls(fake.log())["cuEventRecord"] == 0
    fake.clear()
    denoise(stream)
    denoise(stream)
    assert {algorithm for *_, algorithm in products(fake.log())} == {0}


def test_what_is_measured_is_not_zero(fake, images, weights) -> None:
    fake.set_algorithms([2.0, 1.0])
    fake.clear()
    open_stream(open_device(fake, images), weights)
    log = fake.log()
    for i, line in enumerate(log):
        if line.startswith(HEURISTIC) and line != f"{HEURISTIC} 1":
            following = [x.split()[0] for x in log[i + 1 : i + 5]]
            assert "cuMemcpyHtoDAsync" in following, "expected random operands before the first run"


def test_an_algorithm_that_is_refused_is_left_out(fake, images, weights) -> None:
    fake.set_algorithms([1.0, 1.0])
    device = open_device(fake, images)
    fake.fail("cublasLtMatmul", 15)  # CUBLAS_STATUS_NOT_SUPPORTED, at the first shape that is tried
    fake.clear()
    stream = open_stream(device, weights)
    refused = products(fake.log())[0]
    fake.clear()
    denoise(stream)
    denoise(stream)
    assert {p[3] for p in products(fake.log()) if p[:3] == refused[:3]} == {1 - refused[3]}


@pytest.mark.parametrize(
    "call",
    [
        HEURISTIC,
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceSetAttribute",
    ],
)
def test_error_text(fake, images, weights, call: str) -> None:
    fake.set_algorithms([2.0, 1.0])
    device = open_device(fake, images)
    before = fake.live_events()
    fake.fail(call, 7)
    with pytest.raises(LiveActError) as error:
        open_stream(device, weights)
    assert "cuBLASLt status 7: a failure that the test asked for" in str(error.value)
    if call == HEURISTIC:
        assert " for M=" in str(error.value)
    assert fake.live_events() == before
    open_stream(device, weights)
