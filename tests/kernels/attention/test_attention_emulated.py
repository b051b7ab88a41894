"""The Gluon kernel for Hopper executed on a CPU: its numbers, and its warp groups in drawn orders.

What is emulated, and what is not: tests/support/kernels/gluon_emulator.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.kernels.attention_cases import (
    BF16_STEP,
    F8_MAX,
    F8_STEP,
    SelfAttention,
    make,
    random_tokens,
)
from tests.support.kernels.attention_self_cases import CASES
from tests.support.kernels.gluon_emulator import Deadlock, run

ORDERS = 24


def long_case() -> SelfAttention:
    """17 tiles: every stage of the ring is filled three times."""
    g = torch.Generator().manual_seed(11)
    q, kc, vc, kt, vt = (random_tokens(g, 1, n) for n in (130, 1000, 1000, 1100, 1100))
    return make(q, (kc, vc), (kt, vt), True)


def error_of(case: SelfAttention, out: torch.Tensor) -> float:
    """The largest error in units of its bound; infinite where the result is not a number."""
    expected, bound, _ = case.expected()
    error = ((out.double() - expected).abs() / bound.clamp(min=1e-300)).max().item()
    return error if error == error else float("inf")


@pytest.mark.parametrize("name", CASES)
def test_within_the_rounding_of_p(name: str) -> None:
    case = CASES[name](True)
    out = run(case.arguments(), seed=0)["out"].double()
    expected, bound, deviation = case.expected()
    assert not out.isnan().any(), "expected a result in every row"
    error = (out - expected).abs()
    assert (error <= bound).all()
    assert error.square().mean() <= deviation.square().mean()


def test_every_order_gives_the_same() -> None:
    case = long_case()
    results = [run(case.arguments(), seed)["out"] for seed in range(ORDERS)]
    assert error_of(case, results[0]) <= 1
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "changes",
    [
        {"STAGES = gl.constexpr(6)": "STAGES = gl.constexpr(4)"},
        {"STAGES = gl.constexpr(6)": "STAGES = gl.constexpr(7)"},
        {"IN_FLIGHT = gl.constexpr(3)": "IN_FLIGHT = gl.constexpr(1)"},
        {"IN_FLIGHT = gl.constexpr(3)": "IN_FLIGHT = gl.constexpr(5)"},
        {
            "mbarrier.wait(turns.index(GROUP), _phase(tile + 1 - GROUP))": "pass",
            "mbarrier.arrive(turns.index(1 - GROUP), count=1)": "pass",
        },
    ],
    ids=["4_stages", "7_stages", "1_in_flight", "5_in_flight", "no_turns"],
)
def test_what_may_be_tuned(changes: dict[str, str]) -> None:
    """docs/attention.md, "What to try on a GPU, in this order": nothing waits for ever, and no bit
    of the result changes."""
    case = long_case()
    expected = run(case.arguments(), seed=0)["out"]
    for seed in range(ORDERS // 4):
        assert torch.equal(run(case.arguments(), seed, changes)["out"], expected)


def test_what_is_written_in_fp8_and_where() -> None:
    """The result in bf16, rounded to fp8 with the largest of the heads' scales in every row; the
    rows of the second device in their own buffer."""
    case, here = CASES["one_over"](True), 50
    wide = run(case.arguments(), seed=0)["out"].double()
    arguments: dict[str, Any] = case.arguments()
    scale = wide.abs().amax().float() / F8_MAX
    arguments["head_scale"] = torch.stack([scale / 3, scale])
    codes = torch.zeros(wide.shape, dtype=torch.float8_e4m3fn)
    arguments |= {"out": codes[:here], "rest": codes[here:], "out_rows": here}
    arguments |= {"out_scale": torch.zeros(here), "rest_scale": torch.zeros(len(codes) - here)}
    found = run(arguments, seed=1)
    written = torch.cat([found["out"], found["rest"]]).double()
    scales = torch.cat([found["out_scale"], found["rest_scale"]])
    assert torch.equal(scales, scale.expand(len(codes)))
    error = (written * scale.double() - wide).abs()
    assert (error <= (F8_STEP + BF16_STEP) * wide.abs() + 2.0**-10 * scale.double()).all()


MISTAKES = {
    # A consumer's turn.
    "both_wait_for_the_first_turn": ("_phase(tile + 1 - GROUP)", "_phase(tile)"),
    "no_turn_is_handed_over": ("mbarrier.arrive(turns.index(1 - GROUP), count=1)", "pass"),
    # The ring.
    "the_first_round_waits": ("_phase(step // STAGES + 1)", "_phase(step // STAGES)"),
    "the_producer_does_not_wait": (
        "mbarrier.wait(empty.index(stage), _phase(step // STAGES + 1))",
        "pass",
    ),
    "a_tile_is_said_to_be_there_too_early": (
        "async_copy.wait_group(IN_FLIGHT - 1)",
        "async_copy.wait_group(IN_FLIGHT)",
    ),
    "no_fence": (
        "            fence_async_shared()\n            gl.thread_barrier()",
        "            gl.thread_barrier()",
    ),
    "a_consumer_does_not_wait": (
        "mbarrier.wait(full.index(next_stage), _phase((tile + 1) // STAGES), pred=is_next)",
        "pass",
    ),
    "one_consumer_frees_for_both": (
        "mbarrier.init(empty.index(stage), count=2)",
        "mbarrier.init(empty.index(stage), count=1)",
    ),
    "a_tile_is_freed_before_it_was_read": (
        "scores, values = warpgroup_mma_wait(0, deps=[scores_ahead, values])\n"
        "        mbarrier.arrive(empty.index(stage), count=1)",
        "mbarrier.arrive(empty.index(stage), count=1)\n"
        "        scores, values = warpgroup_mma_wait(0, deps=[scores_ahead, values])",
    ),
    "the_last_tile_waits_for_another": (", pred=is_next)", ")"),
    # The numbers.
    "keys_in_the_order_of_memory": ("keys = _key_of_column(rows)", "keys = rows"),
    "no_mask": ("if first + KEYS > n:", "if False:"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str) -> None:
    """In one of the orders: by a result that is wrong or no number, or by waiting for ever."""
    for case, orders in ((CASES["one_key_each"](True), 1), (long_case(), ORDERS)):
        for seed in range(orders):
            try:
                if error_of(case, run(case.arguments(), seed, dict([MISTAKES[name]]))["out"]) > 1:
                    return
            except (AssertionError, Deadlock):
                return
    pytest.fail("no order shows it")
