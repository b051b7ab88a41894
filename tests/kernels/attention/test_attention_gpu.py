"""The compiled self-attention kernels on a GPU: against float64, and against each other."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels.attention_cases import (
    BF16_STEP,
    F8_MAX,
    F8_STEP,
    F32_LOGIT_ERROR,
    TENSOR_CORE_LOGIT_ERROR,
)
from tests.support.kernels.attention_compile import SPECS
from tests.support.kernels.attention_gpu import architecture, released_size, run
from tests.support.kernels.attention_self_cases import CASES

ARCH = architecture() or ""
HOPPER = "self_attention.f8.hopper"
NAMES = ["self_attention.f8", "self_attention.bf16"] + [HOPPER] * (ARCH == "sm_90a")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ARCH, reason="no CUDA device"),
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", NAMES)
def test_within_the_rounding_of_p(kernel: str, name: str) -> None:
    case = CASES[name](".f8" in kernel)
    out = run(kernel, ARCH, case.arguments()).double()
    logit_error = TENSOR_CORE_LOGIT_ERROR if case.is_f8 else F32_LOGIT_ERROR
    expected, bound, deviation = case.expected(logit_error)
    assert not out.isnan().any(), "expected a result in every row"
    error = (out - expected).abs()
    worst = (error / bound.clamp(min=1e-300)).max().item()
    assert worst <= 1.0, f"an element is {worst:.2f} times the bound off"
    assert error.square().mean().sqrt() <= deviation.square().mean().sqrt()


@pytest.mark.parametrize("kernel", NAMES)
def test_what_is_written_in_fp8(kernel: str) -> None:
    """The result in bf16, rounded to fp8 with the largest of the heads' scales in every row."""
    if f"{kernel}.to_f8" not in SPECS:
        pytest.skip("bf16 attention writes bf16")
    case = CASES["one_over"](True)
    wide = run(kernel, ARCH, case.arguments()).double()
    arguments = case.arguments()
    scale = wide.abs().amax().float() / F8_MAX
    arguments["head_scale"] = torch.stack([scale / 3, scale])
    for name in ("out", "rest"):
        arguments[name] = arguments[name].to(torch.float8_e4m3fn)
    codes = run(f"{kernel}.to_f8", ARCH, arguments).double()
    assert torch.equal(arguments["out_scale"], scale.expand(len(codes)))
    error = (codes * scale.double() - wide).abs()
    bound = (F8_STEP + BF16_STEP) * wide.abs() + 2.0**-10 * scale.double()
    assert (error <= bound).all()


@pytest.mark.skipif(ARCH != "sm_90a", reason=f"{HOPPER} needs sm_90a")
@pytest.mark.parametrize("frame_tokens", [1024, 1170])
def test_the_two_fp8_kernels_agree(frame_tokens: int) -> None:
    """Same tiles, same order, same roundings: they may differ by fused multiply-adds alone."""
    case = released_size(True, frame_tokens, heads=2)
    plain = run("self_attention.f8", ARCH, case.arguments()).double()
    hopper = run(HOPPER, ARCH, case.arguments()).double()
    assert not hopper.isnan().any()
    difference = ((plain - hopper).norm() / plain.norm()).item()
    assert difference <= BF16_STEP, f"relative difference {difference:.2e}"
    assert torch.equal(hopper, run(HOPPER, ARCH, case.arguments()).double()), "two runs differ"
