"""Triton's CPU interpreter, made to compute what a GPU computes. Import it before any kernel.

What is put right, in the interpreter only, never in a tolerance:
- fp32 → fp8: Triton 3.6 loses the carry of a rounding into the next power of two: −7.77 gives −4.
- fp32 → bf16: it truncates; the hardware rounds to nearest even.
- dot: it multiplies the bit patterns of bf16 as integers, and fp8 as float16.
- maximum, minimum, clamp: the hardware's pass over a NaN unless told otherwise; NumPy's do not.
- fp8 → fp32: it decodes NaN as 480.
- a loop bound may be a runtime value: NumPy 2.4 no longer makes an int of an array of one element.

And every load and store is checked to lie inside one of the launch's tensors, which is what
compute-sanitizer does on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("the interpreter must be chosen before triton is imported")

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

from triton_kernels.registry import all_specs


def f8_from_f32(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round to nearest even, saturating at ±448, NaN to 0x7f: f8_from_f32 of liveact/dtype.h."""
    values = np.ascontiguousarray(values, np.float32)
    nan = np.isnan(values)
    magnitude = np.minimum(np.abs(np.where(nan, 0, values)), np.float32(448))
    bits = magnitude.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = np.rint(magnitude * 512)  # multiples of 2⁻⁹; rint takes ties to even
    codes = np.where(magnitude < 2.0**-6, subnormal, normal).astype(np.uint8)
    codes |= (np.signbit(values) << 7).astype(np.uint8)
    return np.where(nan, np.uint8(0x7F), codes)


def bf16_from_f32(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even: bf16_from_f32 of include/liveact/dtype.h."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


_F8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


class _Bounds:
    """The tensors of the launch in progress."""

    def __init__(self) -> None:
        self.starts = self.ends = np.zeros(1, np.uint64)

    def enter(self, tensors: list[Tensor]) -> None:
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
        self.starts, self.ends = (
            np.array(column, np.uint64) for column in zip(*spans, strict=True)
        )

    def check(self, what: str, pointers: Any, mask: Any, element_bytes: int) -> None:
        at = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.uint64)
        index = np.searchsorted(self.starts, at, side="right").astype(np.int64) - 1
        inside = (index >= 0) & (at + np.uint64(element_bytes) <= self.ends[np.maximum(index, 0)])
        assert inside.all(), f"{what} outside of every tensor: {int((~inside).sum())} elements"


_bounds = _Bounds()


def _repair() -> None:
    convert, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.float8e4nv:
            return f8_from_f32(data)
        if source == tl.float32 and target == tl.bfloat16:
            return bf16_from_f32(data)
        if source == tl.float8e4nv and target == tl.float32:
            return _F8_VALUES[data.view(np.uint8)]
        return convert(data, source, target, rounding)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        _bounds.check("load", pointers.data, mask.data, size)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        _bounds.check("store", pointers.data, mask.data, size)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load = checked_load
    builder.create_masked_store = checked_store
    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_lang_tensor

    def dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        left, right = (
            x.data if x.dtype == tl.float32 else convert_operand(x.data, x.dtype) for x in (a, b)
        )
        return interpreter.TensorHandle(left @ right + acc.data, acc.dtype.scalar)

    def convert_operand(data: Any, dtype: Any) -> Any:
        if dtype == tl.float8e4nv:
            return _F8_VALUES[data.view(np.uint8)]
        return convert(data, dtype, tl.float32, None).view(np.float32)

    builder.create_dot = dot
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)

    def clamp(self: Any, x: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
        keeps = propagate_nan == tl.PropagateNan.ALL
        most, least = (np.maximum, np.minimum) if keeps else (np.fmax, np.fmin)
        return self.binary_op(self.binary_op(x, low, most), high, least)

    builder.create_clampf = clamp


class _Kept:
    def restore(self) -> None:
        pass


def _patch_once() -> None:
    """Triton replaces the functions of its language at every call of a function, and puts them back
    behind every launch: 3 of 10 seconds. This process does nothing but interpret."""
    patch, done = interpreter._patch_lang, set[int]()

    @functools.cache
    def languages(function: Any) -> set[int]:
        return {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}

    def patch_lang(function: Any) -> _Kept:
        if not languages(function) <= done:
            patch(function)
            done.update(languages(function))
        return _Kept()

    interpreter._patch_lang = patch_lang


def without_overflow_checks() -> None:
    """As on a GPU, and a quarter faster. The tests of single kernels keep them."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


_repair()
_patch_once()


def launch(name: str, tiles: Mapping[str, int] | None = None, /, **arguments: Any) -> None:
    """Runs a kernel as the C++ launcher would: by its spec's order, promises and grid.

    tiles: tile sizes in place of the tuned ones. The interpreter's time goes by programs, not by
    elements, so a large case wants large tiles.
    """
    spec = all_specs()[name]
    if tiles is not None:
        tuned = spec.launch_for("default")
        chosen = {key: tiles.get(key, value) for key, value in tuned.constexprs.items()}
        spec = replace(spec, launch={"default": replace(tuned, constexprs=chosen)})
    assert list(arguments) == list(spec.parameters), f"{name}: expected {list(spec.parameters)}"
    for parameter in spec.abi():
        value = arguments[parameter.name]
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if parameter.type != "f32" and address is not None:
            assert address % parameter.promise == 0, f"{name}: {parameter.name} breaks its promise"
    grid = spec.grid_for(arguments)
    if 0 in grid:
        return
    # The interpreter has no null pointers; a kernel must not touch what it is not given.
    given = {key: torch.empty(0) if value is None else value for key, value in arguments.items()}
    _bounds.enter([value for value in given.values() if isinstance(value, Tensor)])
    spec.function[grid](**given, **spec.constexprs_for("default"))
