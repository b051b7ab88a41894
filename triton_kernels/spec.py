"""What a kernel needs to be compiled ahead of time and launched from C++: its spec.

A spec is one specialisation: a Triton function, the type of every runtime parameter, the values of
its constexprs, warps and stages, and the launch grid as a rule over its own integer parameters.
Runtime parameters keep their order in the ABI; constexprs vanish from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALIGNMENT_BYTES = 16  # promised for every pointer; the launcher checks it
DIVISOR = 16  # promised for every `i32:16` parameter; the launcher checks it

# Runtime parameter types: pointers `*f8`, `*bf16`, `*f32`, `*i32`, `*u8`; scalars `i32`, `i32:16`
# (a multiple of 16), `f32`. NOTE: never promise an i32 to be 1: Triton would drop it from the ABI.
TRITON_TYPES = {
    "*f8": "*fp8e4nv",
    "*bf16": "*bf16",
    "*f32": "*fp32",
    "*i32": "*i32",
    "*u8": "*u8",
    "i32": "i32",
    "i32:16": "i32",
    "f32": "fp32",
}


@dataclass(frozen=True)
class Ceil:
    """One factor of a grid dimension: ⌈parameter / divisor⌉."""

    parameter: str
    divisor: int = 1


@dataclass(frozen=True)
class Launch:
    """The numbers that tuning chooses, for one architecture."""

    num_warps: int
    num_stages: int = 1
    constexprs: Mapping[str, Any] = field(default_factory=dict)  # tile sizes


@dataclass(frozen=True)
class Spec:
    """One compiled kernel.

    name: unique; `<op>` or `<op>.<variant>`, the name the C++ launcher asks for.
    function: the @triton.jit function.
    parameters: runtime parameters in the function's order → type (keys of TRITON_TYPES).
    constexprs: the rest of its arguments, fixed by the model's sizes or the variant.
    launch: warps, stages and tile sizes per architecture; "default" must be there.
    grid: three products of factors; a factor is an int, a Ceil, or the name of a constexpr tile
        given as Ceil(parameter, divisor) with the tile's value filled in by `grid_for`.
    reason: why these numbers; one or two sentences, with the limiting resource.
    ops: names of the ops in csrc/ops.h that launch it.
    max_registers, max_shared_bytes: the gate on sm_90a; spills are never allowed.
    """

    name: str
    function: Any
    parameters: Mapping[str, str]
    constexprs: Mapping[str, Any]
    launch: Mapping[str, Launch]
    grid: tuple[tuple[int | Ceil, ...], tuple[int | Ceil, ...], tuple[int | Ceil, ...]]
    reason: str
    ops: tuple[str, ...]
    max_registers: int = 255
    max_shared_bytes: int = 227 * 1024

    def launch_for(self, arch: str) -> Launch:
        return self.launch.get(arch, self.launch["default"])

    def grid_for(self, arguments: Mapping[str, int]) -> tuple[int, int, int]:
        """The grid for these integer arguments, as the C++ launcher computes it."""
        x, y, z = (
            math.prod(
                factor
                if isinstance(factor, int)
                else -(-arguments[factor.parameter] // factor.divisor)
                for factor in dimension
            )
            for dimension in self.grid
        )
        return x, y, z
