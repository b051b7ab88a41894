"""What the attention kernels compile to: limits on every architecture, machine code on Hopper.

The counts are of one warp's loop body: 64 queries of 4 warps, so 16 × 128 scores are 64 a thread.
"""

from __future__ import annotations

import pytest

from tests.support.kernels.attention_compile import SPECS, compile_kernel, histogram

# Shared memory that a block may have, and registers of an SM.
SHARED_BYTES = {
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_120a": 99 * 1024,
}
SM_REGISTERS = 65536
HOPPER = "self_attention.f8.hopper"  # wgmma: nothing but sm_90a has it
BUILDS = [(name, arch) for name in SPECS for arch in SHARED_BYTES if not name.startswith(HOPPER)]
BUILDS += [(name, "sm_90a") for name in SPECS if name.startswith(HOPPER)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), BUILDS)
def test_fits(name: str, arch: str) -> None:
    kernel = compile_kernel(name, arch)
    assert kernel.spill_bytes == 0
    assert kernel.scratch_bytes == 0, "expected hidden parameters that may be null"
    assert kernel.shared_bytes <= SHARED_BYTES[arch]
    assert kernel.registers * kernel.threads <= SM_REGISTERS
    if arch == "sm_90a":
        assert kernel.registers <= SPECS[name].max_registers
        assert kernel.shared_bytes <= SPECS[name].max_shared_bytes


@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith("self_attention.f8")])
def test_fp8_loop_on_hopper(name: str) -> None:
    """fp8 products, P from registers to registers, no exponential or conversion too many."""
    kernel = compile_kernel(name, "sm_90a")
    assert kernel.loops, "expected a loop with products"
    for body in kernel.loops:
        count = histogram(body)
        assert body.count("QGMMA.64x128x32.F32.E4M3.E4M3") == 8, "4 steps of QKᵀ, 4 of P·V"
        assert count["MUFU"] == 66, "an exponential per score, one per row's correction"
        assert count["F2FP"] == 32, "two scores a conversion"
        assert count["SHFL"] == 8, "of row maxima and sums; P needs none"
        assert count["FMUL"] <= 4, "scales are of rows, not of keys"
        assert count["IMAD"] < 32, "the next scores go where these were, without 64 moves"
        assert count["STS"] + count["STSM"] + count["LDSM"] == 0, "P and S never in shared memory"


@pytest.mark.parametrize("name", ["self_attention.f8", HOPPER])
def test_softmax_runs_under_a_product(name: str) -> None:
    """Exponentials stand between the products of the next scores and the wait for them."""
    for body in compile_kernel(name, "sm_90a").loops:
        first = body.index("QGMMA.64x128x32.F32.E4M3.E4M3")
        wait = next(i for i, x in enumerate(body) if x == "WARPGROUP.DEPBAR.LE" and i > first)
        under = sum(x == "MUFU.EX2" for x in body[first:wait])
        assert under >= 54, f"expected all but a few of 64 exponentials, got {under}"


def test_warp_groups_of_the_hopper_kernel_share_nothing_but_barriers() -> None:
    kernel = compile_kernel(HOPPER, "sm_90a")
    assert kernel.threads == 3 * 128
    assert len(kernel.loops) == 2, "two consumers"
    for body in kernel.loops:
        count = histogram(body)
        assert count["LDGSTS"] + count["LDG"] == 0, "copies are the producer's"
        assert count["SYNCS"] == 4, "wait and arrive: for a tile, and for the other's exponentials"
        assert len(body) <= 560


def test_the_producer_fences_every_thread_before_it_says_that_a_tile_is_there() -> None:
    """cp.async writes through the generic proxy and wgmma reads through the other: a fence of the
    one thread that arrives would cover its own writes only."""
    names = compile_kernel(HOPPER, "sm_90a").instructions
    producer = names[names.index("LDGDEPBAR") - 250 : names.index("LDGDEPBAR")]
    copied = max(i for i, x in enumerate(producer) if x == "DEPBAR.LE")
    fence = producer.index("FENCE.VIEW.ASYNC.S", copied)
    arrive = next(i for i, x in enumerate(producer) if x.startswith("SYNCS.ARRIVE") and i > fence)
    assert any(x.startswith("BAR.SYNC") for x in producer[fence:arrive])


def test_bf16_loop_on_hopper() -> None:
    (body,) = compile_kernel("self_attention.bf16", "sm_90a").loops
    count = histogram(body)
    assert count["HGMMA"] == 12, "8 steps of QKᵀ for 64 keys, 4 of P·V"
    assert count["MUFU"] == 34
    assert count["STS"] + count["STSM"] + count["LDSM"] == 0


@pytest.mark.parametrize("name", ["cross_attention", "audio_attention"])
def test_bf16_products(name: str) -> None:
    kernel = compile_kernel(name, "sm_90a")
    assert kernel.count("HGMMA") > 0
    assert kernel.count("HMMA") == 0


@pytest.mark.parametrize("arch", ["sm_89", "sm_120a"])
def test_fp8_products_without_wgmma(arch: str) -> None:
    kernel = compile_kernel("self_attention.f8", arch)
    assert kernel.count("QMMA") > 0
    assert kernel.count("HMMA") == 0
