"""Ahead-of-time compilation without a GPU: everything compiles, within its gates, reproducibly."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernel_cases import CASES, VAE_CASES
from tests.support import builds
from tests.support.kernels.machine_code import disassemble, names
from tests.support.paths import REPOSITORY
from triton_kernels.compile import CAPABILITIES, compile_all, compile_spec, key_of, source_of
from triton_kernels.registry import all_specs, specs_for
from triton_kernels.sizes import SMALL
from triton_kernels.spec import TRITON_TYPES, Ceil, Launch, Parameter, Spec, Tiles

PRODUCT = "sm_90a"
OTHERS = sorted(set(CAPABILITIES) - {PRODUCT})
COMPILER = REPOSITORY / "triton_kernels" / "compile.py"  # how a spec is compiled

# Ops of csrc/core/op_list.h that launch no kernel of ours, and why.
WITHOUT_KERNEL = {
    "upload": "a copy by the driver",
    "download": "a copy by the driver",
    "export_kv": "for inspection: downloads the segment and converts it on the CPU",
    "idle": "a question to the driver",
    "turn": "a lock",
    "replay": "CUDA graphs",
    "begin_record": "CUDA graphs",
    "end_record": "CUDA graphs",
    "forget": "CUDA graphs",
    "begin_plan": "choice of the products' algorithms",
    "end_plan": "choice of the products' algorithms",
    "mark": "events",
    "marked_ms": "events",
}


@pytest.fixture(scope="module")
def product_kernels(compiled_kernels: Path) -> Path:
    """Every kernel for the product's architecture; no more than what these sources give."""
    return compiled_kernels


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / PRODUCT / "manifest.json").read_text())


def ops_of_header() -> set[str]:
    text = (REPOSITORY / "csrc" / "core" / "op_list.h").read_text()
    return set(re.findall(r"^LIVEACT_(?:OP|QUEUE_CALL)\([^,]+, (\w+),", text, re.MULTILINE))


def test_ops_and_specs_cover_each_other() -> None:
    launched = {op for spec in all_specs().values() for op in spec.ops}
    # linear is a cuBLASLt product; only the epilogue of its bf16 path is a kernel of ours.
    assert launched | set(WITHOUT_KERNEL) == ops_of_header()
    assert not launched & set(WITHOUT_KERNEL)
    assert len(ops_of_header()) >= 26


def test_every_kernel_has_cases_of_every_group() -> None:
    attention = {"self_attention", "cross_attention", "audio_attention"}  # have their own list
    between = {"barrier"}  # of two devices: tests/kernels/interpreted/test_two_devices.py
    kernels = {spec.name.split(".")[0] for spec in all_specs().values()} - attention - between
    for group in ("correctness", "corner", "performance"):
        cases = (*CASES, *VAE_CASES)
        assert {case.op for case in cases if case.group == group} == kernels


@pytest.mark.parametrize("name", all_specs())
def test_spec_is_consistent(name: str) -> None:
    """Parameters and constexprs are the function's arguments; the grid names what exists."""
    spec = all_specs()[name]
    # Those without an op of their name: the bf16 path of `linear`, `signal` and `wait`, and what
    # liveact.vae.ops launches.
    others = {"apply_epilogue", "barrier", *(case.op for case in VAE_CASES)}
    assert name.split(".")[0] in {*spec.ops, *others} and spec.reason
    assert re.fullmatch(r"[a-z0-9_.]+", name)
    for arch in spec.arches or CAPABILITIES:
        source_of(spec, arch)  # raises where they differ
        for dimension in spec.grid_rule(arch):
            for factor in dimension:
                if not isinstance(factor, int):
                    parameter = Parameter.parse(factor[0], spec.parameters[factor[0]])
                    assert parameter.type == "i32" and factor[1] >= 1


def test_gates_on_the_product_architecture(product_kernels: Path) -> None:
    found = {}
    for kernel in manifest(product_kernels)["kernels"]:
        spec = all_specs()[kernel["name"]]
        if (
            kernel["registers"] > spec.max_registers
            or kernel["shared_bytes"] > spec.max_shared_bytes
            or kernel["spill_bytes"] > 0
        ):
            found[spec.name] = (kernel["registers"], kernel["shared_bytes"], kernel["spill_bytes"])
    assert not found, f"beyond their gates (registers, shared bytes, spill bytes): {found}"


def test_the_barrier_is_ordered_for_the_whole_system(product_kernels: Path) -> None:
    """A signal makes what was stored before it visible to both devices, and only then raises the
    count; a wait reads the count past every cache and drops what the L1 cache had."""
    signal, wait = (
        names(disassemble(product_kernels / PRODUCT / f"barrier.{name}.cubin"))
        for name in ("signal", "wait")
    )
    raised = signal.index("REDG.E.MAX.S64.STRONG.SYS")
    assert "MEMBAR.ALL.SYS" in signal[:raised]
    assert not any(name.startswith("ST") for name in signal[raised:])
    reads = [i for i, name in enumerate(wait) if name == "LDG.E.64.STRONG.SYS"]
    assert reads and all(wait[i + 1] == "CCTL.IVALL" for i in reads)


def test_manifest_is_the_abi(product_kernels: Path) -> None:
    """Entries agree with their files and specs; hidden parameters need no memory."""
    whole = manifest(product_kernels)
    assert (whole["format"], whole["arch"]) == (1, PRODUCT)
    names = [kernel["name"] for kernel in whole["kernels"]]
    assert names == sorted(specs_for(PRODUCT))
    for kernel in whole["kernels"]:
        cubin = (product_kernels / PRODUCT / kernel["file"]).read_bytes()
        assert hashlib.sha256(cubin).hexdigest() == kernel["sha256"]
        assert kernel["symbol"].encode() in cubin
        assert kernel["threads"] == 32 * kernel["num_warps"] <= 1024
        spec = all_specs()[kernel["name"]]
        assert [p["name"] for p in kernel["parameters"]] == list(spec.parameters)
        for parameter in kernel["parameters"]:
            assert parameter["type"] in TRITON_TYPES
            keys = set(parameter) - {"name", "type"}
            wanted = {"i32": {"divisible_by"}, "f32": set()}
            assert keys == wanted.get(parameter["type"], {"align_bytes"})
        hidden = kernel["hidden_parameters"]
        assert [h["name"] for h in hidden] == ["global_scratch", "profile_scratch"]
        assert all(h["bytes_per_program"] == 0 for h in hidden)


def test_hidden_parameters_are_the_last_two() -> None:
    """As Triton's own launcher passes them: two pointers behind the runtime parameters."""
    ptx = compile_spec(all_specs()["guide"], PRODUCT).ptx
    declared = re.findall(r"\.param \.(\w+)", ptx[: ptx.index("{")])
    assert declared == ["u64", "u64", "f32", "u32", "u64", "u64"]


def test_second_run_compiles_nothing_and_changes_nothing(
    product_kernels: Path, tmp_path: Path
) -> None:
    shutil.copytree(product_kernels / PRODUCT, tmp_path / PRODUCT)
    before = (tmp_path / PRODUCT / "manifest.json").read_bytes()
    assert compile_all([PRODUCT], tmp_path) == {PRODUCT: 0}
    assert (tmp_path / PRODUCT / "manifest.json").read_bytes() == before


def test_damaged_and_stale_files_are_replaced(tmp_path: Path) -> None:
    names = ["guide", "all_finite"]
    assert compile_all([PRODUCT], tmp_path, names) == {PRODUCT: 2}, "from cold"
    folder = tmp_path / PRODUCT
    before = (folder / "manifest.json").read_bytes()
    (folder / "guide.cubin").write_bytes(b"damaged")
    (folder / "gone.cubin").write_bytes(b"of a kernel that is no more")
    assert compile_all([PRODUCT], tmp_path, names) == {PRODUCT: 1}
    assert (folder / "manifest.json").read_bytes() == before  # equal sources, equal bits
    assert sorted(path.name for path in folder.glob("*.cubin")) == [
        "all_finite.cubin",
        "guide.cubin",
    ]


def is_small(spec: Spec) -> bool:
    """The small model's variant of a kernel, or the only one."""
    numbers = {int(part) for part in spec.name.split(".") if part.isdigit()}
    return numbers <= {SMALL.dim, SMALL.ffn_dim}


def spill_bytes(name: str, arch: str) -> int:
    """Compiled unless that has been done: equal keys give equal bits, as is tested above."""
    spec = all_specs()[name]
    key = builds.digest(key_of(spec, arch), COMPILER)
    return builds.cached_json(
        f"spills-{arch}-{name}", key, lambda: compile_spec(spec, arch).spill_bytes
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", OTHERS)
def test_small_kernels_compile_everywhere_without_spills(arch: str) -> None:
    names = [spec.name for spec in specs_for(arch).values() if is_small(spec)]
    with get_context("spawn").Pool(builds.compilers()) as pool:
        spills = pool.starmap(spill_bytes, [(name, arch) for name in names], chunksize=1)
    assert len(spills) == len(names) == 46
    assert not [name for name, spilt in zip(names, spills, strict=True) if spilt > 0]


def test_key_depends_on_what_the_cubin_depends_on() -> None:
    spec = all_specs()["guide"]
    wider = {"default": Launch(num_warps=8, constexprs={"BLOCK": 512})}
    longer = {"default": Launch(num_warps=4, constexprs={"BLOCK": 1024})}
    promised = {**spec.parameters, "size": "i32"}
    variants = [
        spec,
        replace(spec, launch=wider),
        replace(spec, launch=longer),
        replace(spec, parameters=promised),
    ]
    keys = {key_of(variant, arch) for variant in variants for arch in ("sm_90a", "sm_89")}
    assert len(keys) == 8
    assert key_of(replace(spec, reason="another"), "sm_90a") == key_of(spec, "sm_90a")


def test_grid_rules() -> None:
    spec = replace(
        all_specs()["guide"],
        grid=((Ceil("size", "BLOCK"), 3), (Tiles(1300, "BLOCK"),), (Ceil("size", 1000),)),
    )
    assert spec.grid_for({"size": 2000}) == (12, 3, 2)
    assert spec.grid_for({"size": 0}) == (0, 3, 0)


def test_unknown_parameter_type_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        Parameter.parse("x", "*f64")
