"""Norms, activations, format changes and the epilogue: interpreter, reference, C++ CPU op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases import KernelCase, cases, make_values
from tests.support.kernels import reference
from tests.support.kernels.core_ops import core
from tests.support.kernels.interpreter import f8_from_f32, launch

EPS = 1e-6


def ids(case: KernelCase) -> str:
    return case.name


def small_cases(op: str) -> list[KernelCase]:
    return cases(op, "correctness", "corner")


def check(result: Any, expected: Any, bounded: reference.Bounded | None) -> None:
    """result (kernel) against expected (C++) and, where fp32 does not overflow, the reference."""
    if isinstance(result, tuple):
        reference.check_same_codes(result[0], expected[0])
        torch.testing.assert_close(result[1], expected[1], rtol=1e-5, atol=0)
        if bounded is not None:
            reference.check_f8(*result, bounded)
    else:
        # A sum in another order moves a value by 1e-5 of itself at most: one step of bf16.
        torch.testing.assert_close(result, expected, rtol=2.0**-7, atol=1e-35)
        if bounded is not None:
            reference.check_bf16(result, bounded)


@pytest.mark.parametrize("f8", (True, False), ids=("f8", "bf16"))
@pytest.mark.parametrize("case", small_cases("layer_norm"), ids=ids)
def test_layer_norm(case: KernelCase, f8: bool) -> None:
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    x = make_values(case.values, rows, cols).bfloat16()
    gain, bias = make_values("random", cols, seed=1), make_values("random", cols, seed=2)
    result = norm_outputs(f8, rows, cols)
    launch(
        f"layer_norm.{cols}.{'f8' if f8 else 'bf16'}",
        x=x,
        gain=gain,
        bias=bias,
        out=result[0],
        scale=result[1],
        rows=rows,
        eps=EPS,
    )
    expected = core("layer_norm", x, gain, bias, EPS, "fp8" if f8 else "bf16")
    # 1e30² is infinite in fp32, on every backend alike: 1 / ∞ leaves the bias.
    exact = None if case.values == "huge" else reference.layer_norm(x, gain, bias, EPS)
    check(result if f8 else result[0], expected, exact)


def norm_outputs(f8: bool, rows: int, cols: int) -> tuple[Tensor, Tensor | None]:
    """(out, scale) that start as NaN; no scale for bf16."""
    if f8:
        codes = torch.full((rows, cols), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return codes, torch.full((rows,), float("nan"))
    return torch.full((rows, cols), float("nan"), dtype=torch.bfloat16), None


@pytest.mark.parametrize("x_type", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("cols", (48, 768, 1280))
def test_layer_norm_conditioning(cols: int, x_type: torch.dtype) -> None:
    x = make_values("random", 5, cols).to(x_type)
    gain, bias = make_values("random", cols, seed=1), make_values("random", cols, seed=2)
    out, _ = norm_outputs(False, 5, cols)
    launch(
        f"layer_norm.conditioning.{'f32' if x_type == torch.float32 else 'bf16'}",
        x=x,
        gain=gain,
        bias=bias,
        out=out,
        rows=5,
        cols=cols,
        eps=1e-5,
    )
    expected = core("layer_norm", x, gain, bias, 1e-5, "bf16")
    check(out, expected, reference.layer_norm(x, gain, bias, 1e-5))


@pytest.mark.parametrize("case", small_cases("rms_norm"), ids=ids)
def test_rms_norm_in_place(case: KernelCase) -> None:
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    x = make_values(case.values, rows, cols).bfloat16()
    gain = make_values("random", cols, seed=1)
    out = x.clone()
    launch(f"rms_norm.{cols}.bf16", x=out, gain=gain, out=out, rows=rows, eps=EPS)
    exact = None if case.values == "huge" else reference.rms_norm(x, gain, EPS)
    check(out, core("rms_norm", x, gain, EPS, "bf16"), exact)


@pytest.mark.parametrize("case", small_cases("activate"), ids=ids)
def test_gelu_tanh_f8(case: KernelCase) -> None:
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    x = make_values(case.values, rows, cols).bfloat16()
    out, scale = norm_outputs(True, rows, cols)
    launch(f"activate.gelu_tanh.{cols}.f8", x=x, out=out, scale=scale, rows=rows)
    expected = core("activate", x, "gelu_tanh", "fp8")
    check((out, scale), expected, reference.activate(x, "gelu_tanh"))


@pytest.mark.parametrize("values", ("random", "zero", "tiny", "huge"))
@pytest.mark.parametrize("activation", ("gelu_tanh", "gelu_erf", "relu"))
def test_activate_bf16_in_place(activation: str, values: Any) -> None:
    x = make_values(values, 3, 368).bfloat16()  # 1104: past one block, not a multiple of it
    out = x.clone()
    launch(f"activate.{activation}.bf16", x=out, out=out, size=x.numel())
    exact, error = reference.activate(x, activation)
    # Where 1 + erf cancels, fp32 evaluations differ by an absolute error, as the bound says.
    reference.check_bf16(out, (exact, error))
    reference.check_bf16(core("activate", x, activation, "bf16"), (exact, error))


@pytest.mark.parametrize("activation", ("gelu_tanh", "gelu_erf", "relu"))
def test_activate_of_nan_and_infinity(activation: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 0.0] * 4]).bfloat16()
    out = torch.zeros_like(x)
    launch(f"activate.{activation}.bf16", x=x, out=out, size=x.numel())
    expected = core("activate", x, activation, "bf16")
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert out[0, 0].isnan() and out[0, 1].isinf()


@pytest.mark.parametrize("case", small_cases("quantize"), ids=ids)
def test_quantize_f8(case: KernelCase) -> None:
    """No sum is involved: bits and scales equal the C++ op's, all of them."""
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    x = make_values(case.values, rows, cols).bfloat16()
    result = run_quantize(x)
    expected = core("quantize", x, "fp8")
    assert torch.equal(result[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(result[1], expected[1])
    reference.check_f8(*result, (x.double(), torch.zeros_like(x).double()))


def run_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    out, scale = norm_outputs(True, rows, cols)
    assert scale is not None
    launch(f"quantize.{cols}.bf16.f8", x=x, out=out, scale=scale, rows=rows)
    return out, scale


def test_quantize_of_nan_and_infinity() -> None:
    """Neither is hidden: NaN is a NaN code, infinity an infinite scale, as in the C++ op."""
    x = make_values("random", 3, 256).bfloat16()
    x[0, 7], x[1, 9], x[2, :] = float("nan"), float("inf"), float("nan")
    codes, scale = run_quantize(x)
    expected, expected_scale = core("quantize", x, "fp8")
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
    assert codes[0, 7].float().isnan() and codes[2].float().isnan().all() and scale[1].isinf()


def test_layer_norm_of_nan() -> None:
    x = make_values("random", 2, 256).bfloat16()
    x[0, 3] = float("nan")
    ones = torch.ones(256)
    out, scale = norm_outputs(True, 2, 256)
    launch("layer_norm.256.f8", x=x, gain=ones, bias=ones, out=out, scale=scale, rows=2, eps=EPS)
    assert out[0].float().isnan().all() and not out[1].float().isnan().any()


def test_f8_cast_equals_the_core() -> None:
    """Every representable value, every midpoint between two, and their fp32 neighbours."""
    positive = np.sort(np.arange(127, dtype=np.uint8).view(np.uint8))
    values = torch.from_numpy(positive).view(torch.float8_e4m3fn).float()
    midpoints = (values[1:] + values[:-1]) / 2
    centre = torch.cat((values, midpoints))
    around = [centre, *(torch.nextafter(centre, torch.tensor(s)) for s in (-1e9, 1e9))]
    x = torch.cat([torch.cat(around), -torch.cat(around), torch.full((8,), 448.0)])
    x = torch.cat([x, torch.zeros(-len(x) % 256)]).view(-1, 256).contiguous()
    x[:, -1] = 448.0
    x = x.clamp(-448, 448)  # so that every scale is 1
    codes, scale = core("quantize", x, "fp8")
    assert torch.equal(scale, torch.ones_like(scale))
    ours = f8_from_f32(x.numpy())
    assert np.array_equal(ours, codes.view(torch.uint8).numpy())
    assert np.array_equal(f8_from_f32(np.float32([1e9, -np.inf, np.nan])), [0x7E, 0xFE, 0x7F])
    assert f8_from_f32(np.float32([-7.77]))[0] == 0xD0  # −8, where Triton's own cast says −4


def test_f32_to_bf16() -> None:
    x = torch.randn(1040, generator=torch.Generator().manual_seed(0))
    out = torch.full((1040,), float("nan"), dtype=torch.bfloat16)
    launch("quantize.f32.bf16", x=x, out=out, size=1040)
    assert torch.equal(out, x.bfloat16())
    assert torch.equal(out, core("quantize", x[None], "bf16")[0])


@pytest.mark.parametrize("case", small_cases("apply_epilogue"), ids=ids)
def test_apply_epilogue(case: KernelCase) -> None:
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    acc = make_values("random", rows, cols).bfloat16()
    before = make_values("random", rows, cols, seed=1).bfloat16()
    scale, bias = make_values("random", cols, seed=2), make_values("random", cols, seed=3)
    out = before.clone()
    launch("apply_epilogue.bf16", acc=acc, scale=scale, bias=bias, out=out, rows=rows, cols=cols)
    product = acc.double() * scale.double()
    exact = before.double() + product + bias.double()
    size = before.double().abs() + product.abs() + bias.double().abs()
    reference.check_bf16(out, (exact, 3 * reference.U * size))
    # The C++ linear with the identity as weight has nothing but this epilogue.
    expected = core("linear", acc.float(), torch.eye(cols), scale, bias, before, True)
    assert (out == expected).float().mean() > 0.999

    residual = before.clone()
    given = bias.bfloat16()
    unread = torch.full((1,), float("nan"))
    values = {"acc": acc, "scale": unread, "bias": given, "out": residual}
    launch("apply_epilogue.residual", **values, rows=rows, cols=cols)
    exact = before.double() + acc.double() + given.double()
    size = before.double().abs() + acc.double().abs() + given.double().abs()
    reference.check_bf16(residual, (exact, 3 * reference.U * size))
