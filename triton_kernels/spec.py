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

ALIGNMENT_BYTES = 16  # promised for a pointer that says nothing else; the launcher checks it

# Runtime parameter types → Triton's name. Scalars: `i32`, `f32`; the rest are pointers. A suffix
# is a promise that the launcher checks: `i32:16` is a multiple of 16, `*f32:4` is aligned to 4
# bytes only. NOTE: never promise an i32 to be 1: Triton would drop it from the ABI.
TRITON_TYPES = {
    "*f8": "*fp8e4nv",
    "*bf16": "*bf16",
    "*f32": "*fp32",
    "*i32": "*i32",
    "*i64": "*i64",
    "*u8": "*u8",
    "i32": "i32",
    "f32": "fp32",
}


@dataclass(frozen=True)
class Parameter:
    """One runtime parameter as it is in the ABI."""

    name: str
    type: str  # key of TRITON_TYPES
    promise: int  # alignment in bytes of a pointer, divisor of an i32, 1 for an f32

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")

    @classmethod
    def parse(cls, name: str, text: str) -> Parameter:
        type_name, _, suffix = text.partition(":")
        if type_name not in TRITON_TYPES:
            raise ValueError(f"parameter {name}: expected one of {list(TRITON_TYPES)}, got {text}")
        default = ALIGNMENT_BYTES if type_name.startswith("*") else 1
        return cls(name, type_name, int(suffix) if suffix else default)


@dataclass(frozen=True)
class Ceil:
    """One factor of a grid dimension: ⌈parameter / divisor⌉.

    The divisor is a number or the name of a constexpr (a tile size that tuning chooses).
    """

    parameter: str
    divisor: int | str = 1


@dataclass(frozen=True)
class Launch:
    """The numbers that tuning chooses, for one architecture."""

    num_warps: int
    num_stages: int = 1
    constexprs: Mapping[str, Any] = field(default_factory=dict)  # tile sizes


@dataclass(frozen=True)
class Tiles:
    """One factor of a grid dimension that only tuning changes: ⌈extent / the constexpr `tile`⌉."""

    extent: int
    tile: str


Factor = int | Ceil | Tiles


@dataclass(frozen=True)
class Spec:
    """One compiled kernel.

    name: unique; `<op>` or `<op>.<variant>`, the name the C++ launcher asks for.
    function: the @triton.jit function.
    parameters: runtime parameters in the function's order → type (see TRITON_TYPES).
    constexprs: the rest of its arguments, fixed by the model's sizes or the variant.
    launch: warps, stages and tile sizes per architecture; "default" must be there.
    grid: x, y, z, each a product of factors.
    reason: why these numbers; one or two sentences, with the limiting resource.
    ops: names of the ops in csrc/core/ops.h that launch it.
    max_registers, max_shared_bytes: the gate on sm_90a; spills are never allowed.
    arches: those that it is compiled for; None: all.
    start_registers: of a Gluon kernel, per thread before its warp groups share them out anew; None:
        a Triton kernel.
    """

    name: str
    function: Any
    parameters: Mapping[str, str]
    constexprs: Mapping[str, Any]
    launch: Mapping[str, Launch]
    grid: tuple[tuple[Factor, ...], tuple[Factor, ...], tuple[Factor, ...]]
    reason: str
    ops: tuple[str, ...]
    max_registers: int = 255
    max_shared_bytes: int = 227 * 1024
    arches: tuple[str, ...] | None = None
    start_registers: int | None = None

    @property
    def is_gluon(self) -> bool:
        return self.start_registers is not None

    def launch_for(self, arch: str) -> Launch:
        return self.launch.get(arch, self.launch["default"])

    def abi(self) -> list[Parameter]:
        """The runtime parameters in the order of the ABI, without the hidden ones."""
        return [Parameter.parse(name, text) for name, text in self.parameters.items()]

    def constexprs_for(self, arch: str) -> dict[str, Any]:
        """All constexprs: the spec's own and the tuned ones of this architecture."""
        return {**self.constexprs, **self.launch_for(arch).constexprs}

    def grid_rule(self, arch: str) -> list[list[int | tuple[str, int]]]:
        """The grid with tiles resolved: a factor is an int or (parameter, divisor)."""
        tiles: dict[str, int] = self.constexprs_for(arch)

        def resolve(factor: Factor) -> int | tuple[str, int]:
            if isinstance(factor, int):
                return factor
            if isinstance(factor, Tiles):
                return -(-factor.extent // tiles[factor.tile])
            divisor = factor.divisor
            return factor.parameter, tiles[divisor] if isinstance(divisor, str) else divisor

        return [[resolve(factor) for factor in dimension] for dimension in self.grid]

    def grid_for(self, arguments: Mapping[str, Any], arch: str = "default") -> tuple[int, int, int]:
        """The grid for these arguments, as the C++ launcher computes it."""
        x, y, z = (
            math.prod(
                factor if isinstance(factor, int) else -(-arguments[factor[0]] // factor[1])
                for factor in dimension
            )
            for dimension in self.grid_rule(arch)
        )
        return x, y, z
