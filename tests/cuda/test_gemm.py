"""Which algorithm of cuBLASLt a product runs with: the fastest, measured when a stream opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peaks import row_scales
from liveact import _core, _core_dev
from liveact.dit.precision import PRODUCTS, Choice, PrecisionPolicy
from liveact.errors import LiveActError
from tests.support.cuda.blocks import NUM_LAYERS, calls, denoise, open_device, open_stream
from tests.support.cuda.fake import FakeCuda
from tests.support.kernels.manifest import read_manifest

HEURISTIC = "cublasLtMatmulAlgoGetHeuristic"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCuda]:
    yield FakeCuda.copy_into(tmp_path)


@pytest.fixture
def images(fake: FakeCuda, compiled_kernels: Path) -> list[_core.KernelImage]:
    return fake.images(read_manifest("sm_90a", compiled_kernels))


def products(log: list[str]) -> list[tuple[int, int, int, int]]:
    """(M, N, K, algorithm) of every product."""
    lines = [line.split("|")[1].split() for line in log if line.startswith("cublasLtMatmul ")]
    return [(int(m), int(n), int(k), int(algorithm)) for m, n, k, algorithm in lines]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("times", [[1.0], [1.0, 0.99], [1.0, 1.0, 1.0]])
def test_the_first_suggestion_where_nothing_is_gained(fake, images, weights, times) -> None:
    """One algorithm needs no clock; a gain within the noise is none."""
    fake.set_algorithms(times)
    fake.clear()
    images = [image for image in images if "hopper" not in image.name]
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


@pytest.mark.slow
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


def fast_sums(log: list[str]) -> set[str]:
    prefix = "cublasLtMatmulDescSetAttribute 25 "  # CUBLASLT_MATMUL_DESC_FAST_ACCUM
    return {line.removeprefix(prefix) for line in log if line.startswith(prefix)}


def test_sums_are_fast_unless_a_policy_says_full(fake, images, weights) -> None:
    device = open_device(fake, images)
    layers = (dict.fromkeys(PRODUCTS, Choice("fp8")),) * NUM_LAYERS
    for sums, expected in (("fast", {"1"}), ("full", {"0"})):
        fake.clear()
        stream = open_stream(device, weights, PrecisionPolicy(layers, sums=sums))
        denoise(stream)
        assert fast_sums(fake.log()) == expected, sums
    fake.clear()
    open_stream(device, weights, "fp8")
    assert fast_sums(fake.log()) == {"1"}
    fake.clear()
    open_stream(device, weights, "bf16")
    assert fast_sums(fake.log()) == set()
    with pytest.raises(LiveActError, match="expected sums fast or full, found quick"):
        open_stream(device, weights, PrecisionPolicy(layers, sums="quick"))


@pytest.mark.parametrize("times", [[1.0], [2.0, 1.0]])
def test_a_bias_beside_a_sum_may_be_refused(fake, images, weights, times) -> None:
    """Then the product goes to scratch and a kernel of ours does the rest, also in the graphs."""
    fake.set_algorithms(times)
    fake.separate_residuals()
    device = open_device(fake, images)
    stream = open_stream(device, weights)
    refused = {k: v for k, v in device.choices.items() if k.startswith("product")}
    refused = {k for k, v in refused.items() if v.endswith("the product, then apply_epilogue")}
    assert refused and all(k.endswith("fp8 + bias + out") for k in refused)
    for block in range(4):
        fake.clear()
        denoise(stream)
        log = fake.log()
        assert not any(line.startswith("cublasLtMatmul 1 1 |") for line in log), "it was refused"
        # As many as residuals: self_o, cross_o and ffn_down at every step, audio_o at two.
        separate = sum(line.startswith("cuLaunchKernel apply_epilogue.residual") for line in log)
        assert separate == (0 if block == 3 else 2 * (3 * 3 + 2))


def residual(device: Any, **options: Any) -> Any:
    """(found, expected) of an fp8 product onto a residual."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 32, generator=generator) for n in (3, 16))
    bias = torch.randn(16, generator=generator).bfloat16()
    before = torch.randn(3, 16, generator=generator).bfloat16()
    (qx, sx), (qw, sw) = row_scales(x), row_scales(w)

    def bits(t: torch.Tensor) -> Any:
        return t.view(torch.uint8 if t.dtype == torch.float8_e4m3fn else torch.uint16).numpy()

    found = _core_dev.ops.linear(
        device,
        (bits(qx), sx[:, 0].numpy()),
        (bits(qw), sw[:, 0].numpy()),
        sw[:, 0].numpy(),
        bits(bias),
        bits(before),
        True,
        **options,
    )
    return torch.from_numpy(np.asarray(found)).view(torch.bfloat16)


def test_an_op_that_nobody_planned_is_taken_apart_too(fake, images) -> None:
    device = open_device(fake, images)
    residual(device)
    fake.separate_residuals()
    fake.clear()
    residual(device)
    launched = [line.split()[1] for line in fake.log() if line.startswith("cuLaunchKernel")]
    assert launched == ["apply_epilogue.residual"]


def test_a_product_beyond_its_scratch_is_refused(fake, images) -> None:
    """Before its epilogue a gated or separable product is as large as its result, not its input."""
    device = open_device(fake, images)
    x, weight = np.ones((96, 16), np.uint16), np.ones((64, 16), np.uint16)
    gate, out = np.ones(64, np.float32), np.zeros((96, 64), np.uint16)
    given = (device, x, weight, gate, gate, out, True)
    fake.clear()
    _core_dev.ops.linear(*given)  # with as much scratch as it needs
    with pytest.raises(LiveActError, match=r"at most 6143 elements of a product .*, found 96 x 64"):
        _core_dev.ops.linear(*given, max_operand=96 * 64 - 1)
    with pytest.raises(LiveActError, match=r"at most 47 elements of a product .*, found 3 x 16"):
        residual(device, max_operand=3 * 16 - 1)
