"""What a talker of the family of `training/` does, measured on its films through the engine.

Each row is a table of its own: `--rows sync,prompts`. Voices, texts and half of the people are held
out; mouths, expressions and persons are found by comparing films with drawings
(`training.measure`). An hour of drift is `--rows drift --minutes 60`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import weights_hash
from benchmarks.options import positive
from liveact.checkpoint.layout import DIT_STEM
from liveact.checkpoint.tensors import open_tensors
from liveact.errors import InputError

TALKER = Path(__file__).resolve().parent.parent / "examples" / "talker"
ROWS = {  # what is aimed at
    "autoencoder": "drawings through it: PSNR >= 32 dB, >= 28 dB around the mouth",
    "sync": "correlation >= 0.8, lag within 1 frame, lips closed >= 85 %",
    "recorded": "correlation >= 0.6 on recorded human speech",
    "silence": "mouth closed in >= 95 % of frames",
    "prompts": "shown as asked in >= 90 % of seconds, sync kept",
    "seams": "blocks begin as smoothly as they go on",
    "memory": "variants of the memory, and what they cost",
    "precision": "formats against fp32",
    "drift": "no trend: zero within the interval of each slope",
}
FIELDS: dict[str, Any] = {"rows": dict, "films": int, "minutes": float}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=TALKER, help="%(default)s")
    parser.add_argument(
        "--rows",
        type=row_names,
        default=[name for name in ROWS if name != "drift"],
        metavar="NAME,...",
        help=f"of {', '.join(ROWS)}; default: all but drift",
    )
    parser.add_argument("--films", type=positive, default=8, help="of a row (default 8)")
    parser.add_argument("--minutes", type=float, default=15.0, help="of drift (default 15)")
    parser.set_defaults(repeat=1)


def row_names(text: str) -> list[str]:
    """Names of `ROWS` with commas between them, for argparse."""
    names = text.split(",")
    for name in names:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(ROWS)}, found {name!r}")
    return names


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The rows that are asked for."""
    if not (options.checkpoint / "config.json").is_file():
        raise InputError(f"{options.checkpoint}: expected a checkpoint, found no config.json")
    tensors = open_tensors(options.checkpoint, DIT_STEM)
    # Here, as they need what only training needs; the other benchmarks run without it.
    from benchmarks import quality_drift, quality_rows

    rows = {
        name: getattr(quality_drift if name == "drift" else quality_rows, name)(options)
        for name in options.rows
    }
    device = options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    return {
        "timed": "denoising, in the rows that have ms",
        "not_timed": "everything else",
        "device": device,
        "precision": None,  # the engine's own choice, but for the row of this name
        "sizes": {"width": 128, "height": 128},
        "memory_policy": None,
        "weights": {"source": options.checkpoint.name, "sha256": weights_hash(tensors)},
        "films": options.films,
        "minutes": options.minutes,
        "rows": rows,
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    for name, rows in result["rows"].items():
        table = Table(title=f"{name}: {ROWS[name]}", title_justify="left")
        for key in rows[0]:
            table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
        for row in rows:
            table.add_row(*(shown(value) for value in row.values()))
        console.print(table)


def shown(value: Any) -> str:
    """A cell."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
