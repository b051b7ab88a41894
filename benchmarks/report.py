"""What a window on a GPU found: the headline table with the machine's stamp, and a figure.

`python -m benchmarks report OUT` reads the JSON files of OUT/results.tar.gz, which
benchmarks/gpu.sh left there, and of OUT. Every figure stands beside its prediction: predicted,
measured, ratio. Writes OUT/report.txt and, with matplotlib, OUT/report.png.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.headline import Figure
from benchmarks.headline import figures as figures_of
from liveact.errors import InputError


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Name of the stage → result. Raises InputError where there is none."""
    archive = out / "results.tar.gz"
    if archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(out, filter="data")
    results = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    results = {name: r for name, r in results.items() if isinstance(r, dict) and "benchmark" in r}
    if not results:
        raise InputError(f"report: expected results of benchmarks in {out}, found none")
    return results


def stamp(result: dict[str, Any]) -> str:
    """What a result was measured on, in a line."""
    machine, gpu = result["machine"], result["gpu"] or {}
    versions = machine["versions"]
    parts = [gpu.get("name", machine["cpu"])]
    if "name" in gpu:
        throttled = ", ".join(f"{k} {v:.0%}" for k, v in gpu["throttle_reasons"].items())
        parts += [
            f"driver {gpu['driver']}",
            f"SM {gpu['sm_mhz']['median']:.0f} of {gpu['max_sm_mhz']} MHz",
            f"{gpu['power_w']['median']:.0f} of {gpu['power_cap_w']:.0f} W",
            f"throttled: {throttled or 'no'}",
        ]
    parts += [f"torch {versions['torch']}", f"commit {machine['commit']}", machine["date"][:10]]
    return ", ".join(parts)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row a figure."""
    lines = ["| stage | figure | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for name, result in results.items():
        for f in figures_of(result):
            ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
            measured = f"{f.measured:.4g} {f.unit}"
            lines.append(f"| {name} | {f.name} | {f.predicted} | {measured} | {ratio} |")
    return "\n".join([*lines, *_ratios(results)])


def _ratios(results: dict[str, dict[str, Any]]) -> list[str]:
    """Of plain PyTorch to the engine's faster block."""
    blocks = [r["ms_per_block"]["median"] for r in results.values() if r["benchmark"] == "block"]
    return [
        f"| {name} | {r['name']}, times as long as the engine | | "
        f"{r['ms_per_block']['median'] / min(blocks):.2f} | |"
        for name, r in results.items()
        if r["benchmark"] == "plain" and blocks
    ]


def choices(results: dict[str, dict[str, Any]]) -> list[str]:
    """What was chosen by trial, a line each."""
    said = {f"{k}: {v}" for r in results.values() for k, v in r.get("choices", {}).items()}
    return [f"- {line}" for line in sorted(said)]


def report(out: Path) -> str:
    """The text; written to OUT/report.txt, its figure to OUT/report.png."""
    results = read(out)
    stamps = dict.fromkeys(stamp(result).rsplit(", SM", 1)[0] for result in results.values())
    text = "\n".join(
        [
            "# Measured",
            "",
            *(f"On {line}." for line in stamps),
            f"First result: {stamp(next(iter(results.values())))}.",
            "",
            table(results),
            "",
            "Chosen by trial:",
            "",
            *(choices(results) or ["- nothing"]),
            "",
        ]
    )
    (out / "report.txt").write_text(text)
    compared: list[tuple[str, Figure]] = [
        (name, f) for name, r in results.items() for f in figures_of(r) if f.ratio is not None
    ]
    if compared:
        figures.predictions(compared, stamp(next(iter(results.values()))), out / "report.png")
    return text
