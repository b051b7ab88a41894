"""Compiles attention specs, Triton or Gluon, and counts instructions in the machine code."""

from __future__ import annotations

import collections
import pickle
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from tests.support import builds
from tests.support.kernels.machine_code import disassemble, names
from triton_kernels import (
    audio_attention,
    cross_attention,
    self_attention,
    self_attention_hopper,
)
from triton_kernels.compile import (
    CAPABILITIES,
    WARP_SIZE,
    key_of,
    options_of,
    resource_usage,
    source_of,
)

SPECS = {
    spec.name: spec
    for spec in (
        *self_attention.SPECS,
        *self_attention_hopper.SPECS,
        *cross_attention.SPECS,
        *audio_attention.SPECS,
    )
}


@dataclass(frozen=True)
class Kernel:
    """A cubin, what it uses, and its instructions in order (names with their modifiers)."""

    cubin: bytes
    symbol: str
    threads: int
    shared_bytes: int
    scratch_bytes: int
    registers: int
    spill_bytes: int
    instructions: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]  # bodies of the loops that multiply matrices, innermost

    def count(self, name: str) -> int:
        return sum(i == name or i.startswith(f"{name}.") for i in self.instructions)


@cache
def compile_kernel(name: str, arch: str) -> Kernel:
    """The spec of this name compiled, now or before, for a key of CAPABILITIES."""

    def write(path: Path) -> None:
        path.write_bytes(pickle.dumps(_compile(name, arch)))

    key = builds.digest(key_of(SPECS[name], arch), Path(__file__))
    kernel: Kernel = pickle.loads(
        builds.cached(f"attention-{arch}-{name}", key, write).read_bytes()
    )
    return kernel


def _compile(name: str, arch: str) -> Kernel:
    spec = SPECS[name]
    target = GPUTarget("cuda", CAPABILITIES[arch], WARP_SIZE)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True
        source, options = source_of(spec, arch), options_of(spec, arch)
        kernel = triton.compile(source, target=target, options=options)
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        registers, spill_bytes = resource_usage(file)
        lines = disassemble(file)
    metadata = kernel.metadata
    return Kernel(
        cubin=kernel.asm["cubin"],
        symbol=metadata.name,
        threads=metadata.num_warps * WARP_SIZE,
        shared_bytes=metadata.shared,
        scratch_bytes=metadata.global_scratch_size + metadata.profile_scratch_size,
        registers=registers,
        spill_bytes=spill_bytes,
        instructions=names(lines),
        loops=_product_loops(lines),
    )


def _product_loops(lines: list[str]) -> tuple[tuple[str, ...], ...]:
    """The bodies of innermost loops: from a label to a branch back to it, with products within.

    The slow path of a barrier's wait also branches back, from behind the end of the kernel.
    """
    labels: dict[str, int] = {}
    ranges = []
    for i, line in enumerate(lines):
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m.group(1)] = i
        m = re.search(r"BRA(?:\.\w+)*\s+(?:!?U?P\d+, )?`\((\.L_x_\d+)\)", line)
        if m and m.group(1) in labels:
            body = names(lines[labels[m.group(1)] : i + 1])
            if any("GMMA" in name for name in body) and "EXIT" not in body:
                ranges.append((labels[m.group(1)], i, body))
    return tuple(
        body
        for a, b, body in ranges
        if not any(a <= x and y <= b and (x, y) != (a, b) for x, y, _ in ranges)
    )


def histogram(body: tuple[str, ...]) -> collections.Counter[str]:
    """Instructions by name without modifiers."""
    return collections.Counter(name.split(".")[0] for name in body)
