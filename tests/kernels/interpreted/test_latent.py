"""patchify, unpatchify, sampler_step, guide, all_finite: interpreter, torch, C++ CPU op."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases import KernelCase, cases, make_values
from tests.support.kernels.core_ops import core
from tests.support.kernels.interpreter import launch


def ids(case: KernelCase) -> str:
    return case.name


@pytest.mark.parametrize("case", cases("patchify", "correctness", "corner"), ids=ids)
def test_patchify(case: KernelCase) -> None:
    n, h, w = (case.sizes[key] for key in ("n", "h", "w"))
    y_frames, y_first = n + 3, 2
    z, y = make_values("random", 16, n, h, w), make_values("random", 20, y_frames, h, w, seed=1)
    tokens = torch.full((n * h * w // 4, 144), float("nan")).bfloat16()
    launch(
        "patchify",
        z=z,
        y=y,
        tokens=tokens,
        z_channels=16,
        y_channels=20,
        y_frames=y_frames,
        y_first=y_first,
        n=n,
        h=h,
        w=w,
        size=tokens.numel(),
    )
    joined = torch.cat((z, y[:, y_first : y_first + n]))
    patches = joined.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2))  # [36, n, r, ph, c, pw]
    expected = patches.permute(1, 2, 4, 0, 3, 5).reshape(tokens.shape)
    assert torch.equal(tokens, expected.bfloat16())
    assert torch.equal(tokens, core("patchify", z, y, y_first, "bf16"))


@pytest.mark.parametrize("case", cases("unpatchify", "correctness", "corner"), ids=ids)
def test_unpatchify(case: KernelCase) -> None:
    n, h, w = (case.sizes[key] for key in ("n", "h", "w"))
    tokens = make_values("random", n * h * w // 4, 64)
    v = torch.full((16, n, h, w), float("nan"))
    launch("unpatchify", tokens=tokens, v=v, channels=16, n=n, h=h, w=w, size=v.numel())
    patches = tokens.view(n, h // 2, w // 2, 2, 2, 16)
    assert torch.equal(v, patches.permute(5, 0, 1, 3, 2, 4).reshape(v.shape))
    assert torch.equal(v, core("unpatchify", tokens, 16, n, h, w))


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("case", cases("sampler_step", "correctness", "corner"), ids=ids)
def test_sampler_step(case: KernelCase, last: bool) -> None:
    size = case.sizes["size"]
    z, v, noise = (make_values(case.values, size, seed=s) for s in range(3))
    sigma, next_sigma = 0.9375, 0.0 if last else 0.8333333
    out = z.clone()
    launch(
        f"sampler_step.{'last' if last else 'renoise'}",
        z=out,
        v=v,
        noise=None if last else noise,
        sigma=sigma,
        next_sigma=next_sigma,
        size=size,
    )
    x0 = z.double() - sigma * v.double()
    exact = (1 - next_sigma) * x0 + next_sigma * noise.double()
    # Products and sums round once each, 6 of them; inputs are of order one times the case's scale.
    bound = 6 * 2.0**-24 * (z.abs() + v.abs() + noise.abs()).double() + 2.0**-24
    expected = core("sampler_step", z, v, None if last else noise, sigma, next_sigma)
    assert ((out.double() - exact).abs() <= bound).all()
    assert ((expected.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("case", cases("guide", "correctness", "corner"), ids=ids)
def test_guide(case: KernelCase) -> None:
    size = case.sizes["size"]
    v, v_null = (make_values(case.values, size, seed=s) for s in range(2))
    out = v.clone()
    launch("guide", v=out, v_null=v_null, guidance=1.7, size=size)
    exact = v_null.double() + 1.7 * (v.double() - v_null.double())
    bound = 4 * 2.0**-24 * 1.7 * (v.abs() + v_null.abs()).double()
    assert ((out.double() - exact).abs() <= bound).all()
    assert ((core("guide", v, v_null, 1.7).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bad", (None, float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("size", (16, 1040, 2 * 16384 + 16))
def test_all_finite(size: int, bad: float | None) -> None:
    x = make_values("huge", size).clamp(-3e38, 3e38)
    x[0] = torch.finfo(torch.float32).max
    if bad is not None:
        x[-1] = bad
    flag = torch.full((1,), -1, dtype=torch.int32)
    launch("all_finite", x=x, flag=flag, size=size)
    assert flag.item() == (1 if bad is None else 0)
    assert core("all_finite", x) == bool(flag.item())
