"""Figures of results, as PNG files. matplotlib is a development tool, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.headline import Figure
from liveact.errors import InputError

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9772b", "#8a8a8a"


def _subplots(count: int, width: float, height: float, title: str) -> tuple[Any, Any]:
    try:
        matplotlib = import_module("matplotlib")
        matplotlib.use("Agg")  # no display needed
        pyplot = import_module("matplotlib.pyplot")
    except ImportError:
        raise InputError("plot: expected matplotlib (pip install matplotlib), found none") from None
    figure, axes = pyplot.subplots(1, count, figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis in axes:
        axis.grid(True, which="major", color="#e0e0e0", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    import_module("matplotlib.pyplot").close(figure)


def _subtitle(result: dict[str, Any]) -> str:
    gpu = result["gpu"] or {}
    name = gpu.get("name", result["machine"]["cpu"])
    return f"{name}, commit {result['machine']['commit']}, {result['machine']['date'][:10]}"


def roofline(result: dict[str, Any], path: Path) -> None:
    """Left: rate over intensity under the measured limits. Right: every op's share of its limit."""
    rows, peak = result["rows"], result["peak"]
    height = max(4.5, 0.24 * len(rows) + 1.5)
    figure, (roof, shares) = _subplots(2, 13, height, f"Kernels, {_subtitle(result)}")
    products = [row for row in rows if row["flop"]]
    intensities = [row["flop"] / row["bytes"] for row in products] or [1.0]
    low, high = min(intensities) / 4, max(intensities) * 4
    for index, (fmt, tflops) in enumerate(peak["tflops"].items()):
        knee = tflops / peak["tb_per_s"]
        points = sorted({low, min(max(knee, low), high), high})
        limit = [min(tflops, x * peak["tb_per_s"]) for x in points]
        style = ("-", "--", ":")[index % 3]
        roof.plot(points, limit, style, color=_GREY, label=f"measured: copy, {fmt} product")
    for row, x in zip(products, intensities, strict=False):
        fp8 = row["format"] == "fp8"
        roof.plot(x, row["tflops"], "o" if fp8 else "s", color=_BLUE if fp8 else _ORANGE, ms=6)
    for op in dict.fromkeys(row["op"] for row in products):  # one label each, at the fastest
        best = max((row for row in products if row["op"] == op), key=lambda row: row["tflops"])
        at = best["flop"] / best["bytes"], best["tflops"]
        roof.annotate(op, at, textcoords="offset points", xytext=(6, 5), fontsize=8)
    roof.plot([], [], "o", color=_BLUE, label="op, fp8")
    roof.plot([], [], "s", color=_ORANGE, label="op, other format")
    roof.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s, cold caches")
    roof.legend(frameon=False, fontsize=8, loc="lower right")

    names = [f"{row['case']}.{row['format']}".replace(".random", "") for row in rows]
    values = [100 * row["share_measured"] for row in rows]
    colours = [_BLUE if row["bound_by"] == "products" else _ORANGE for row in rows]
    shares.barh(range(len(rows)), values, color=colours, height=0.7)
    shares.set_yticks(range(len(rows)), names, fontsize=6)
    shares.set_ylim(len(rows) - 0.4, -0.6)
    shares.set(xlabel="% of the nearer limit (blue products, orange memory)")
    _save(figure, path)


def scaling(result: dict[str, Any], path: Path) -> None:
    """Left: cost of a video frame over the picture. Right: time of every block of a session."""
    figure, (sizes, blocks) = _subplots(2, 11, 4.2, f"Scaling, {_subtitle(result)}")
    resolution = result["resolution"]
    tokens = [entry["tokens_per_frame"] for entry in resolution]
    ms = [entry["ms_per_frame"] for entry in resolution]
    sizes.plot(tokens, ms, "o-", color=_BLUE, label="measured")
    # Through the largest: what the FLOP count alone would say.
    flop = [entry["tflop_per_frame"] for entry in resolution]
    expected = [ms[-1] * f / flop[-1] for f in flop]
    sizes.plot(tokens, expected, "--", color=_GREY, label="the largest, scaled by FLOP")
    for entry, x, y in zip(resolution, tokens, ms, strict=True):
        label = "×".join(str(n) for n in entry["picture"])
        sizes.annotate(label, (x, y), textcoords="offset points", xytext=(5, -11), fontsize=8)
    sizes.set(xlabel="tokens per latent frame", ylabel="ms per video frame", ylim=(0, None))
    sizes.legend(frameon=False, fontsize=8)
    series = result["blocks_ms"]
    first = result["first_block"]
    blocks.plot(range(first, first + len(series)), series, ".", color=_BLUE, ms=4)
    blocks.set(xlabel="block", ylabel="ms per block", ylim=(0, None))
    _save(figure, path)


def predictions(compared: list[tuple[str, Figure]], subtitle: str, path: Path) -> None:
    """Measured over predicted: a dot for each figure, a bar for the predicted range."""
    height = max(2.5, 0.35 * len(compared) + 1.2)
    figure, (axis, empty) = _subplots(2, 10, height, f"Measured over predicted, {subtitle}")
    empty.set_axis_off()
    for row, (_, f) in enumerate(compared):
        middle = ((f.low or 0.0) + (f.high or 0.0)) / 2
        low, high = (f.low or 0.0) / middle, (f.high or 0.0) / middle
        axis.barh(row, high - low, left=low, color="#cccccc", height=0.6)
        axis.plot(f.measured / middle, row, "o", color=_BLUE)
        text = f"{f.measured:.4g} {f.unit} (expected {f.predicted})"
        empty.text(0.0, row, text, va="center", fontsize=8)
    names = [f"{stage}: {f.name}" for stage, f in compared]
    axis.axvline(1.0, color=_GREY, linewidth=0.8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    empty.set_ylim(len(names) - 0.4, -0.6)
    axis.set(xlabel="1 is the middle of what was predicted; grey is the range")
    _save(figure, path)
