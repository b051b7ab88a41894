"""Ahead-of-time compiler: every spec to a cubin, and a manifest that the C++ launcher reads.

    python -m triton_kernels.compile --arch sm_90a --out build/kernels

Needs neither a GPU nor a CUDA toolkit. README.md beside this file is the manifest's reference. What
a cubin was compiled from is kept in the manifest as a hash, so a second run compiles only what has
changed; Triton's own cache is not used, and line information (absolute paths) is left out, so equal
sources give equal files anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from triton_kernels import common
from triton_kernels.registry import all_specs, specs_for
from triton_kernels.spec import TRITON_TYPES, Spec

MANIFEST_FORMAT = 1
CAPABILITIES = {"sm_89": 89, "sm_90a": 90, "sm_100a": 100, "sm_120a": 120}
WARP_SIZE = 32


@dataclass(frozen=True)
class Compiled:
    """What came out of compiling one spec for one architecture."""

    cubin: bytes
    ptx: str
    symbol: str
    num_warps: int
    shared_bytes: int
    global_scratch: tuple[int, int]  # bytes per program, alignment in bytes
    profile_scratch: tuple[int, int]
    registers: int
    spill_bytes: int  # per thread: stack and local memory

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.cubin).hexdigest()


def source_of(spec: Spec, arch: str) -> ASTSource:
    """The spec as Triton wants it: types, constexprs, and the promises as attributes."""
    constexprs = spec.constexprs_for(arch)
    types = {p.name: TRITON_TYPES[p.type] for p in spec.abi()}
    names = spec.function.arg_names
    expected = [name for name in names if name not in constexprs]
    if expected != list(types):
        raise ValueError(f"{spec.name}: expected parameters {expected}, got {list(types)}")
    promises = {p.name: p.promise for p in spec.abi()}
    source = GluonASTSource if spec.is_gluon else ASTSource
    return source(
        fn=spec.function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constexprs,
        # Only 16 means something to Triton; any other promise is for the launcher's own checks.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, promise in promises.items()
            if promise % 16 == 0
        },
    )


def options_of(spec: Spec, arch: str) -> dict[str, int]:
    """What the compiler is told beside the source."""
    launch = spec.launch_for(arch)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return options if spec.start_registers is None else options | {"maxnreg": spec.start_registers}


# NOTE: Triton 3.6 leaves the constants of a function out of its caller's hash, unless the function
# was hashed before. So the functions that kernels share are, in one order, before any kernel.
for _shared in vars(common).values():
    if isinstance(_shared, triton.JITFunction):
        _ = _shared.cache_key


def key_of(spec: Spec, arch: str) -> str:
    """Hash of everything that the cubin depends on."""
    parts = [
        MANIFEST_FORMAT,
        triton.__version__,
        arch,
        spec.name,  # is in the file name
        source_of(spec, arch).hash(),
        *options_of(spec, arch).values(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compile_spec(spec: Spec, arch: str) -> Compiled:
    """Compiles one spec for one architecture (a key of CAPABILITIES)."""
    target = GPUTarget("cuda", CAPABILITIES[arch], WARP_SIZE)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True
        source, options = source_of(spec, arch), options_of(spec, arch)
        kernel = triton.compile(source, target=target, options=options)
        cubin = kernel.asm["cubin"]
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        registers, spill_bytes = resource_usage(file)
    metadata = kernel.metadata
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl:
        raise ValueError(f"{spec.name}: the launcher knows plain launches only")
    return Compiled(
        cubin=cubin,
        ptx=kernel.asm["ptx"],
        symbol=metadata.name,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        global_scratch=(metadata.global_scratch_size, metadata.global_scratch_align),
        profile_scratch=(metadata.profile_scratch_size, metadata.profile_scratch_align),
        registers=registers,
        spill_bytes=spill_bytes,
    )


def resource_usage(cubin: Path) -> tuple[int, int]:
    """(registers, stack + local bytes) per thread, as cuobjdump reports them."""
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG, STACK and LOCAL, got {text!r}")
    registers, stack_bytes, local_bytes = map(int, found.groups())
    return registers, stack_bytes + local_bytes


# ------------------------------------------------------------------------------------ manifest


def _file_name(spec: Spec) -> str:
    return f"{spec.name}.cubin"


def _described(spec: Spec, arch: str) -> dict[str, Any]:
    """The part of a manifest entry that the spec itself says."""
    launch = spec.launch_for(arch)
    parameters = []
    for p in spec.abi():
        entry: dict[str, Any] = {"name": p.name, "type": p.type}
        if p.is_pointer:
            entry["align_bytes"] = p.promise
        elif p.type == "i32":
            entry["divisible_by"] = p.promise
        parameters.append(entry)
    return {
        "name": spec.name,
        "ops": list(spec.ops),
        "file": _file_name(spec),
        "grid": [
            [f if isinstance(f, int) else {"parameter": f[0], "divisor": f[1]} for f in dimension]
            for dimension in spec.grid_rule(arch)
        ],
        "parameters": parameters,
        "constexprs": spec.constexprs_for(arch),
        "num_stages": launch.num_stages,
        "reason": spec.reason,
        "key": key_of(spec, arch),
    }


def _measured(compiled: Compiled) -> dict[str, Any]:
    """The part of a manifest entry that compiling tells."""
    hidden = (
        ("global_scratch", compiled.global_scratch),
        ("profile_scratch", compiled.profile_scratch),
    )
    return {
        "sha256": compiled.sha256,
        "symbol": compiled.symbol,
        "num_warps": compiled.num_warps,
        "threads": compiled.num_warps * WARP_SIZE,
        "shared_bytes": compiled.shared_bytes,
        "hidden_parameters": [
            {"name": name, "type": "*u8", "bytes_per_program": size, "align_bytes": align}
            for name, (size, align) in hidden
        ],
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
    }


MEASURED_FIELDS = (
    "sha256",
    "symbol",
    "num_warps",
    "threads",
    "shared_bytes",
    "hidden_parameters",
    "registers",
    "spill_bytes",
)


def _usable(folder: Path) -> dict[str, dict[str, Any]]:
    """Key → entry of the manifest in `folder`, for the entries whose file is what it says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != MANIFEST_FORMAT:
            return {}
        return {
            entry["key"]: entry
            for entry in manifest["kernels"]
            if hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        }
    except (OSError, ValueError, KeyError):  # none yet, or cut short: compile everything
        return {}


def _compile_into(name: str, arch: str, folder: Path) -> dict[str, Any]:
    """Runs in a worker: compiles a spec, writes its cubin, returns the measured fields."""
    spec = all_specs()[name]
    compiled = compile_spec(spec, arch)
    (folder / _file_name(spec)).write_bytes(compiled.cubin)
    return _measured(compiled)


def compile_all(
    arches: Sequence[str],
    out: Path,
    names: Sequence[str] | None = None,
    left_out: Sequence[str] = (),
) -> dict[str, int]:
    """Brings `out` up to date; returns how many kernels were compiled per architecture.

    names: the specs to compile; all that there are for an architecture by default, but for those
    left out and their variants. Files of kernels that are no longer in the list are removed.
    """
    counts = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for arch in arches:
            folder = out / arch
            folder.mkdir(parents=True, exist_ok=True)
            known = _usable(folder)
            chosen = set(all_specs() if names is None else names) - _with_variants(left_out)
            described = {
                name: _described(spec, arch)
                for name, spec in specs_for(arch).items()
                if name in chosen
            }
            jobs = {
                name: pool.submit(_compile_into, name, arch, folder)
                for name, entry in described.items()
                if entry["key"] not in known
            }
            kernels = []
            for name, entry in described.items():
                if name in jobs:
                    entry |= jobs[name].result()
                else:
                    entry |= {field: known[entry["key"]][field] for field in MEASURED_FIELDS}
                kernels.append(entry)
            manifest = {
                "format": MANIFEST_FORMAT,
                "arch": arch,
                "triton": triton.__version__,
                "kernels": kernels,
            }
            text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
            (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")
            for stale in set(folder.glob("*.cubin")) - {folder / k["file"] for k in kernels}:
                stale.unlink()
            counts[arch] = len(jobs)
    return counts


def _with_variants(names: Sequence[str]) -> set[str]:
    return {
        name
        for name in all_specs()
        if any(name == given or name.startswith(f"{given}.") for given in names)
    }


def _print_list() -> None:
    for spec in all_specs().values():
        signature = ", ".join(f"{name}: {text}" for name, text in spec.parameters.items())
        print(f"{spec.name}({signature})")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="triton_kernels.compile", description=__doc__)
    parser.add_argument("--arch", action="append", choices=sorted(CAPABILITIES), default=[])
    parser.add_argument("--out", type=Path, help="folder; gets one folder per architecture")
    parser.add_argument(
        "--list", action="store_true", help="print the kernels and their signatures"
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        choices=sorted(all_specs()),
        default=[],
        metavar="NAME",
        help="a kernel, with what has more behind that name",
    )
    options = parser.parse_args(arguments)
    if options.list:
        _print_list()
        return 0
    if not options.arch or options.out is None:
        parser.error("expected --arch and --out, or --list")
    start = time.monotonic()
    counts = compile_all(options.arch, options.out, left_out=options.leave_out)
    for arch, compiled in counts.items():
        kernels = len(set(specs_for(arch)) - _with_variants(options.leave_out))
        print(f"{options.out / arch}: {kernels} kernels, {compiled} compiled")
    print(f"{time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
