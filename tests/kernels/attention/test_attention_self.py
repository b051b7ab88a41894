"""self_attention under Triton's interpreter against float64 softmax of the same quantised bytes."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels.attention_cases import (
    BF16_STEP,
    HEAD_DIM,
    Segment,
    SelfAttention,
    interpret,
    launch_of,
)
from tests.support.kernels.attention_self_cases import CASES
from tests.support.kernels.core_ops import core
from triton_kernels.self_attention import SPECS

BY_PRECISION = {"f8": SPECS[0], "bf16": SPECS[1]}


def _nan_in_query(f8: bool) -> SelfAttention:
    case = CASES["frame_of_5"](f8)
    case.q.view(torch.uint8)[0, 2, 7] = 0x7F
    return case


def _nan_in_key(f8: bool) -> SelfAttention:
    case = CASES["frame_of_5"](f8)
    case.current.k.view(torch.uint8)[1, 3, 9] = 0x7F
    return case


def _nan_in_value(f8: bool) -> SelfAttention:
    case = CASES["frame_of_5"](f8)
    case.context.v.view(torch.uint8)[0, 11, 4] = 0x7F
    return case


# A NaN in a query makes that row NaN; in a key, its head; in a value, its column.
NOT_A_NUMBER = {
    "nan_in_query": (_nan_in_query, (2, slice(0, HEAD_DIM))),
    "nan_in_key": (_nan_in_key, (slice(None), slice(HEAD_DIM, None))),
    "nan_in_value": (_nan_in_value, (slice(None), 11)),
}
# The tiles of sm_90a for every case; those of architectures without wgmma where tiles matter.
RUNS = [(name, precision, "sm_90a") for name in CASES for precision in BY_PRECISION]
RUNS += [(name, "f8", "default") for name in ("steady_small", "ragged_tiles", "one_over")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], torch.Tensor]:
    builders = CASES | {name: build for name, (build, _) in NOT_A_NUMBER.items()}
    runs = RUNS + [(name, "f8", "sm_90a") for name in NOT_A_NUMBER]
    launches = [
        launch_of(BY_PRECISION[precision], builders[name](precision == "f8").arguments(), tiles)
        for name, precision, tiles in runs
    ]
    outputs = interpret(launches, tmp_path_factory.mktemp("self_attention"))
    return dict(zip(runs, outputs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision", "tiles"), RUNS)
def test_within_the_rounding_of_p(results: dict, name: str, precision: str, tiles: str) -> None:
    out = results[name, precision, tiles].double()
    expected, bound, deviation = CASES[name](precision == "f8").expected()
    assert not out.isnan().any(), "expected a result in every row"
    error = (out - expected).abs()
    worst = (error / bound.clamp(min=1e-300)).max().item()
    assert worst <= 1.0, f"an element is {worst:.2f} times the bound off"
    scatter = (error.square().mean() / deviation.square().mean()).sqrt().item()
    assert scatter <= 1.0, f"errors are {scatter:.2f} times the expected ones"


@pytest.mark.parametrize("name", NOT_A_NUMBER)
def test_not_a_number_stays_where_it_belongs(results: dict, name: str) -> None:
    out = results[name, "f8", "sm_90a"]
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[NOT_A_NUMBER[name][1]] = True
    assert torch.equal(out.isnan(), expected)


def core_self_attention(case: SelfAttention) -> torch.Tensor:
    """The same call of the C++ CPU op, which takes V token-major."""
    v_scale = case.v_scale if case.is_f8 else None

    def segment(s: Segment) -> tuple[torch.Tensor | None, ...]:
        values = s.v[..., : s.tokens].transpose(1, 2).contiguous()
        return s.k, values, case.k_scale if case.is_f8 else None, v_scale

    q_scale = case.q_scale if case.is_f8 else None
    return core(
        "self_attention", case.q, q_scale, segment(case.context), segment(case.current), "bf16"
    )


@pytest.mark.parametrize("precision", BY_PRECISION)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_cpu_op(results: dict, name: str, precision: str) -> None:
    case = CASES[name](precision == "f8")
    out = results[name, precision, "sm_90a"].double()
    expected = core_self_attention(case).double()
    if precision == "f8" and case.context.tokens == 0 and case.current.tokens <= 128:
        # One tile in both, so the same maxima and the same codes of P, but for a few on an edge.
        assert ((out - expected).norm() / expected.norm()).item() <= BF16_STEP
    _, bound, deviation = case.expected()
    error = (out - expected).abs()
    assert (error <= 2 * bound).all()
    assert error.square().mean() <= 2 * deviation.square().mean(), "two independent errors"
