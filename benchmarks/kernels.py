"""Every op of csrc/core/ops.h by itself: time, rate, share of what the device can do, and peers.

Sizes are the product's on a GPU and small on the CPU, where only the code path and the results mean
something. Every time is of one call, after a buffer larger than the caches was written: `cold`, or
`warm` with the call once more in between (see timing.py). Inputs are random. The share is that of
the nearer of two limits, the products at the rate of a large product and the bytes at the rate of a
copy, both measured in this run. Bytes are what must be read and written once, whatever a kernel
does beyond that.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import figures, kernel_heads, kernel_ops, peaks, spread
from benchmarks.kernel_cases import CASES, MATRIX_CASES, KernelCase
from benchmarks.kernel_ops import TOLERANCE, Prepared
from benchmarks.peers import COMPILED, open_peers
from benchmarks.timing import FLUSH_BYTES, Clock
from liveact import _core, _core_dev
from liveact.device.devices import Devices, open_devices
from liveact.errors import InputError, LiveActError

BUILDERS = kernel_ops.BUILDERS | kernel_heads.BUILDERS
_TIMES = {"cold_ms": spread.FIELDS, "warm_ms": spread.FIELDS}
FIELDS: dict[str, Any] = {
    "peak": peaks.FIELDS,
    "rows": [
        {
            "case": str,
            "op": str,
            "format": str,
            "flop": int,
            "bytes": int,
            **_TIMES,
            "tflops": float,
            "tb_per_s": float,
            "bound_by": str,
            "share_measured": float,
            "share_datasheet": (float, type(None)),
            "peers": [{"name": str, **_TIMES, "ratio": float}],
            "missing": dict,
            "error": (float, type(None)),  # relative RMS, with --check
            "tolerance": float,
            "checked_against": (str, type(None)),
            "repro": str,
        }
    ],
    "failures": dict,  # case -> why it did not run, or that its result is wrong
}
# Formats in which the layers of a product-size model use an op; elsewhere that of the activations.
_FP8_OPS = frozenset(
    {"layer_norm", "activate", "quantize", "linear", "split_qkv", "update_memory", "self_attention"}
)
_FP32_OPS = frozenset({"sampler_step", "guide", "all_finite", "unpatchify"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="without the peers that torch.compile makes, seconds each",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare results too; exit code 1 where one is off"
    )


def formats(op: str, on_gpu: bool) -> tuple[str, ...]:
    plain = "bf16" if on_gpu else "fp32"
    if op in _FP32_OPS:
        return ("fp32",)
    if op == "quantize":
        return ("fp8",)
    return ("fp8", plain) if op in _FP8_OPS else (plain,)


def selected(on_gpu: bool, only: str) -> list[tuple[KernelCase, str]]:
    """(case, format) of this device's group whose name has `only` in it."""
    group = "performance" if on_gpu else "correctness"
    found = [
        (case, fmt)
        for case in (*MATRIX_CASES, *CASES)
        if case.group == group and case.op in BUILDERS
        for fmt in formats(case.op, on_gpu)
        if only in f"{case.name}.{fmt}"
    ]
    if not found:
        raise InputError(f"only: expected part of the name of a case, found {only!r}")
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    devices = open_devices(options.device, None, None)
    on_gpu = devices.name != "cpu"
    chosen = selected(on_gpu, options.only)
    clock = Clock(devices.torch_device)
    peak = peaks.measure(clock, ("bf16", "fp8") if on_gpu else ("fp32",))
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for case, fmt in chosen:
        name = f"{case.name}.{fmt}"
        try:
            row = measure_case(case, fmt, devices, clock, peak, options)
        except LiveActError as error:  # the others are measured all the same
            failures[name] = str(error)
            continue
        if row["error"] is not None and not row["error"] <= row["tolerance"]:
            failures[name] = (
                f"expected results within {row['tolerance']:.1e} of those of "
                f"{row['checked_against']}, found {row['error']:.1e}"
            )
            if not math.isfinite(row["error"]):  # is no JSON
                row["error"] = None
        repro = f"--seed {options.seed} --repeat {options.repeat} --only {name}"
        row["repro"] = f"python -m benchmarks kernels --device {devices.name} {repro}"
        rows.append(row)
    return {
        "timed": "one call of each op, operands on the device, by events of its queue",
        "not_timed": "launch from the host, operands on their way to the device; for a quantised "
        "product, the quantisation of its input (an op of its own)",
        "device": devices.name,
        "precision": None,
        "sizes": {"cases": len(rows)},
        "memory_policy": None,
        "weights": None,
        "peak": peak,
        "rows": rows,
        "failures": failures,
    }


def measure_case(
    case: KernelCase,
    fmt: str,
    devices: Devices,
    clock: Clock,
    peak: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One row of the result, but for `repro`."""
    prepared, repeat = BUILDERS[case.op](case, fmt, clock.device), options.repeat
    times: dict[str, Any] = {}
    out: Any = None
    for name, warm in (("cold_ms", False), ("warm_ms", True)):
        timed = _core_dev.TimedDevice(
            devices.core, FLUSH_BYTES[clock.device.type], samples=repeat + 1, warm=warm
        )
        out = call(prepared, timed)
        # The first call of a kernel may load it.
        times[name] = spread.spread([ms for _, ms in timed.take()][1:])
    calls, missing = open_peers(
        [peer for peer in prepared.peers if not (options.no_compile and peer[0] == COMPILED)]
    )
    peers = []
    for name, peer in calls.items():
        cold, warm_ms = (
            spread.spread(clock.samples_ms(peer, repeat, cold=cold)) for cold in (True, False)
        )
        ratio = cold["median"] / times["cold_ms"]["median"]
        peers.append({"name": name, "cold_ms": cold, "warm_ms": warm_ms, "ratio": ratio})
    traffic = prepared.bytes_moved or bytes_of(prepared.arguments) + bytes_of(out)
    error, against = compare(prepared, case, fmt, devices) if options.check else (None, None)
    return {
        "case": case.name,
        "op": case.op,
        "format": fmt,
        "flop": prepared.flop,
        "bytes": traffic,
        **times,
        **rates(prepared.flop, traffic, fmt, times["cold_ms"]["median"], peak),
        "peers": peers,
        "missing": missing,
        "error": error,
        "tolerance": TOLERANCE[prepared.fmt],
        "checked_against": against,
    }


def rates(flop: int, traffic: int, fmt: str, ms: float, peak: dict[str, Any]) -> dict[str, Any]:
    """Rates, and the share of the roofline: the time that the nearer limit allows over `ms`."""

    def limits_ms(tflops: float, tb_per_s: float) -> tuple[float, float]:
        return flop / tflops / 1e9, traffic / tb_per_s / 1e9

    measured = peak["tflops"]
    compute, memory = limits_ms(
        measured[fmt if fmt in measured else next(iter(measured))], peak["tb_per_s"]
    )
    share = None
    if (sheet := peak["datasheet"]) is not None:
        key = f"{fmt}_tflops" if f"{fmt}_tflops" in sheet else "bf16_tflops"
        share = max(limits_ms(sheet[key], sheet["tb_per_s"])) / ms
    return {
        "tflops": flop / ms / 1e9,
        "tb_per_s": traffic / ms / 1e9,
        "bound_by": "products" if compute > memory else "memory",
        "share_measured": max(compute, memory) / ms,
        "share_datasheet": share,
    }


# ---------------------------------------------------------------------------- calling the runtime


def call(prepared: Prepared, device: _core.Device) -> Any:
    """The op on a device; tensors out."""
    function = getattr(_core_dev.ops, prepared.op)
    return _to_tensor(function(device, *(_to_core(a) for a in prepared.arguments)))


def _to_core(value: Any) -> Any:
    """Tensor → array, bf16 and fp8 as their bits; anything else stays what it is."""
    if isinstance(value, tuple):
        return tuple(_to_core(v) for v in value)
    if not isinstance(value, Tensor):
        return value
    views = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return np.ascontiguousarray(value.view(views.get(value.dtype, value.dtype)).numpy())


def _to_tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_to_tensor(v) for v in value)
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(value)
    views = {torch.uint16: torch.bfloat16, torch.uint8: torch.float8_e4m3fn}
    return tensor.view(views.get(tensor.dtype, tensor.dtype))


def bytes_of(value: Any) -> int:
    if isinstance(value, tuple | list):
        return sum(bytes_of(v) for v in value)
    return int(value.nbytes) if isinstance(value, Tensor) else 0


def compare(prepared: Prepared, case: KernelCase, fmt: str, devices: Devices) -> tuple[float, str]:
    """(relative RMS difference, what from): the torch line, else the CPU op on the same case."""
    found = prepared.result(call(prepared, devices.core)).cpu().double()
    if prepared.reference is not None:
        expected, against = prepared.reference().cpu().double(), "torch"
    else:
        on_cpu = BUILDERS[case.op](case, fmt, torch.device("cpu"))
        expected, against = on_cpu.result(call(on_cpu, _core.open_cpu())).double(), "the CPU op"
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return error, against


# ---------------------------------------------------------------------------- showing it


def print_table(result: dict[str, Any], console: Console) -> None:
    peak = result["peak"]
    rates = ", ".join(f"{f} product {t:.3g} TFLOP/s" for f, t in peak["tflops"].items())
    console.print(f"measured here: copy {peak['tb_per_s']:.3g} TB/s, {rates}")
    table = Table(title=f"Kernels on {result['device']}", title_justify="left")
    for column in ("case", "µs cold", "p10–p90", "µs warm", "TFLOP/s", "TB/s", "share", "ratio"):
        justify: Any = "left" if column == "case" else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for row in result["rows"]:
        sheet = row["share_datasheet"]
        share = f"{row['share_measured']:.0%} {row['bound_by']}"
        if sheet is not None:
            share += f", {sheet:.0%} datasheet"
        table.add_row(*_cells(f"{row['case']}.{row['format']}", row, row), share, "")
        for peer in row["peers"]:
            cells = _cells(f"  {peer['name']}", peer, row)
            table.add_row(*cells, "", f"{peer['ratio']:.2f}", style="dim")
    console.print(table)
    console.print(
        "share: of the nearer limit measured here; ratio: how many times as long as the engine's op"
    )
    missing = {f"{name}: {why}" for row in result["rows"] for name, why in row["missing"].items()}
    for line in sorted(missing):
        console.print(f"missing peer, {line}")
    checked = [row for row in result["rows"] if row["error"] is not None]
    if checked:
        worst = max(checked, key=lambda row: row["error"] / row["tolerance"])
        console.print(
            f"checked {len(checked)} results; the furthest off is {worst['case']}.{worst['format']}"
            f" with {worst['error']:.1e} from {worst['checked_against']}"
        )
    console.print(f"timed: {result['timed']}; not timed: {result['not_timed']}")
    for row in result["rows"][:1]:
        console.print(f"one of them alone: {row['repro']}")


def verify(result: dict[str, Any]) -> None:
    """Raises LiveActError that names what failed."""
    if failures := result["failures"]:
        lines = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise LiveActError(f"{len(failures)} of the cases failed: {lines}")


def _cells(name: str, times: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Name, times and rates of the engine or of a peer on the work of a row."""
    cold, warm = times["cold_ms"], times["warm_ms"]
    tflops, tb_per_s = (row[work] / cold["median"] / 1e9 for work in ("flop", "bytes"))
    return [
        name,
        f"{1e3 * cold['median']:.1f}",
        f"{1e3 * cold['p10']:.1f}–{1e3 * cold['p90']:.1f}",
        f"{1e3 * warm['median']:.1f}",
        f"{tflops:.3g}" if row["flop"] else "",
        f"{tb_per_s:.3g}",
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """The roofline and every op's share of it."""
    figures.roofline(result, path)
