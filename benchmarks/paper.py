"""The paper's Tables 3 and 5 measured here, beside what was published, and how cost scales.

Table 3 compares systems: frames per second, latency, GPUs, TFLOP per frame. Table 5 varies how many
latent frames the memory and a block have. Further: what the ConvKV memory costs (1.9 % in the
paper), the cost of a frame over the size of the picture, and of a block over its number: block 1000
must cost what block 3 does.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import figures, flops, models, op_groups, session, spread
from benchmarks.block import inputs, open_stream
from benchmarks.models import PROMPT_TOKENS, Loaded
from benchmarks.options import add_model, positive
from benchmarks.timing import Clock
from liveact.dit.dit import MemoryPolicy

STEADY_BLOCK = 3
PUBLISHED_TABLE_3 = [  # Table 3 of arXiv 2603.11746
    {"system": "InfiniteTalk", "fps": 25.0, "latency_s": 3.20, "gpus": 8, "tflop_per_frame": 50.2},
    {"system": "Live-Avatar", "fps": 20.0, "latency_s": 2.89, "gpus": 5, "tflop_per_frame": 39.1},
    {"system": "LiveAct", "fps": 20.0, "latency_s": 0.94, "gpus": 2, "tflop_per_frame": 27.2},
]
PUBLISHED_CONVKV = 0.019  # share of inference time
# Memory and block in latent frames → the paper's milliseconds per frame, and our slots
# (reference, long-term, short-term, current). The first block is as long as the memory.
TABLE_5 = {
    "6/6": (52.0, (2, 2, 2, 6)),
    "8/8": (60.0, (2, 4, 2, 8)),
    "6/8": (49.0, (2, 2, 2, 8)),
}
RESOLUTIONS = {
    "cpu": ((64, 64), (96, 96), (128, 128)),
    "cuda": ((256, 256), (384, 384), (512, 512), (720, 416)),
}

_TABLE_3 = {
    "system": str,
    "fps": float,
    "latency_s": float,
    "gpus": int,
    "tflop_per_frame": float,
}
FIELDS: dict[str, Any] = {
    "table_3": {"published": [_TABLE_3], "here": _TABLE_3},
    "table_5": [
        {
            "memory_block": str,
            "slots": [int],
            "published_ms_per_frame": float,
            "ms_per_frame": float,
            "ms_per_block": spread.FIELDS,
        }
    ],
    "convkv": {"published_share": float, "share": float, "ms_per_block": float},
    "resolution": [
        {
            "picture": [int],
            "tokens_per_frame": int,
            "ms_per_frame": float,
            "tflop_per_frame": float,
        }
    ],
    "first_block": int,  # whose time is the first of blocks_ms
    "blocks_ms": [float],
    "late_to_early": float,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--blocks", type=positive, default=40, help="how far to follow a session (default 40)"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    loaded = models.load(options)
    clock = Clock(loaded.devices.torch_device)
    ops = op_groups.measure(loaded, MemoryPolicy())
    convkv = op_groups.share_of("update_memory", ops)
    series = steady_ms([(loaded, MemoryPolicy())], max(options.blocks, 8), clock)[0]
    quarter = len(series) // 4
    return {
        "timed": "Table 3: a session without pace, everything from audio to pictures; latency is "
        "one block's audio encoding and denoising and its first decoded pictures. Elsewhere: "
        "denoise of steady blocks, host to host",
        "not_timed": "text and image encoder (once per session), video encoding, network",
        **loaded.described(),
        "memory_policy": asdict(MemoryPolicy()),
        "table_3": {"published": PUBLISHED_TABLE_3, "here": table_3(loaded, options.repeat)},
        "table_5": table_5(loaded, options.repeat, clock),
        "convkv": {
            "published_share": PUBLISHED_CONVKV,
            "share": convkv,
            "ms_per_block": convkv * statistics.median(series),
        },
        "resolution": by_resolution(loaded, options.repeat, clock),
        "first_block": STEADY_BLOCK,
        "blocks_ms": series,
        "late_to_early": statistics.median(series[-quarter:]) / statistics.median(series[:quarter]),
    }


def table_3(loaded: Loaded, repeat: int) -> dict[str, Any]:
    """Our row."""
    engine = models.open_engine(loaded)
    seconds = (session.STEADY_BLOCK + repeat + 1) * session.BLOCK_FRAMES / session.FPS
    recorder, _ = session.run(engine, seconds, live=False, size=loaded.size, seed=loaded.seed)
    evaluated = session.evaluate(recorder, None, loaded.size)
    stages = evaluated["stages_ms"]
    # A block's pictures come in eighths.
    latency_ms = stages["audio_ms"] + stages["denoise_ms"] + stages["block_decode_ms"] / 8
    shape = flops.BlockShape(loaded.tokens_per_frame, prompt_tokens=PROMPT_TOKENS)
    work = flops.engine_block(loaded.config, shape, int(loaded.dit.config.audio_dim))
    return {
        "system": f"this engine, {loaded.devices.name}, {loaded.devices.precision}",
        "fps": evaluated["frames_per_second"],
        "latency_s": latency_ms / 1e3,
        "gpus": len({loaded.devices.name, loaded.devices.vae_name} - {"cpu"}),
        "tflop_per_frame": flops.tera_per_frame(work),
    }


def table_5(loaded: Loaded, repeat: int, clock: Clock) -> list[dict[str, Any]]:
    policies = [MemoryPolicy(slots=slots) for _, slots in TABLE_5.values()]
    series = steady_ms([(loaded, policy) for policy in policies], repeat, clock)
    return [
        {
            "memory_block": name,
            "slots": list(slots),
            "published_ms_per_frame": published,
            "ms_per_frame": statistics.median(times) / (4 * slots[3]),
            "ms_per_block": spread.spread(times),
        }
        for (name, (published, slots)), times in zip(TABLE_5.items(), series, strict=True)
    ]


def by_resolution(loaded: Loaded, repeat: int, clock: Clock) -> list[dict[str, Any]]:
    """The same weights on other pictures."""
    resized = [replace(loaded, size=size) for size in RESOLUTIONS[clock.device.type]]
    series = steady_ms([(variant, MemoryPolicy()) for variant in resized], repeat, clock)
    entries = []
    for variant, times in zip(resized, series, strict=True):
        shape = flops.BlockShape(variant.tokens_per_frame, prompt_tokens=PROMPT_TOKENS)
        work = flops.engine_block(loaded.config, shape, int(loaded.dit.config.audio_dim))
        entries.append(
            {
                "picture": list(variant.size),
                "tokens_per_frame": variant.tokens_per_frame,
                "ms_per_frame": statistics.median(times) / (4 * shape.current),
                "tflop_per_frame": flops.tera_per_frame(work),
            }
        )
    return entries


def steady_ms(
    variants: Sequence[tuple[Loaded, MemoryPolicy]], count: int, clock: Clock
) -> list[list[float]]:
    """Milliseconds of `count` blocks of each variant from its first steady one on: in turn on a
    CPU, one variant after the other on a GPU."""
    if clock.device.type == "cuda" and len(variants) > 1:  # they do not fit beside each other
        return [steady_ms([variant], count, clock)[0] for variant in variants]
    streams = [
        (loaded, open_stream(loaded, inputs(loaded, 1, sum(policy.slots)), policy))
        for loaded, policy in variants
    ]
    generator = torch.Generator().manual_seed(variants[0][0].seed)
    times: list[list[float]] = [[] for _ in streams]
    for _ in range(STEADY_BLOCK + count):
        for (loaded, stream), series in zip(streams, times, strict=True):
            shape = (16, stream.frames_of_next_block, *loaded.latent_size)
            noise = torch.randn((3, *shape), generator=generator)
            rows = (stream.audio_rows_of_next_block, int(loaded.dit.config.audio_dim))
            audio = torch.randn(rows, generator=generator)
            _, ms = clock.block(stream.denoise, noise[0], noise[1:], audio)
            series.append(ms)
    return [series[STEADY_BLOCK:] for series in times]


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title="Table 3", title_justify="left")
    for column in ("", "FPS", "latency s", "GPUs", "TFLOP per frame"):
        table.add_column(column, justify="right" if column else "left")
    here = result["table_3"]["here"]
    for row in (*result["table_3"]["published"], here):
        system = row["system"] + ("" if row is here else ", published")
        numbers = (f"{row['fps']:.3g}", f"{row['latency_s']:.2f}", str(row["gpus"]))
        table.add_row(system, *numbers, f"{row['tflop_per_frame']:.3g}")
    console.print(table)
    table = Table(title="Table 5, ms per frame", title_justify="left")
    for column in ("memory / block", "slots", "published", "here", "to 6/8, published", "here"):
        table.add_column(column, justify="right")
    base = next(row for row in result["table_5"] if row["memory_block"] == "6/8")
    for row in result["table_5"]:
        table.add_row(
            row["memory_block"],
            " ".join(str(s) for s in row["slots"]),
            f"{row['published_ms_per_frame']:.0f}",
            f"{row['ms_per_frame']:.3g}",
            f"{row['published_ms_per_frame'] / base['published_ms_per_frame']:.2f}",
            f"{row['ms_per_frame'] / base['ms_per_frame']:.2f}",
        )
    console.print(table)
    convkv = result["convkv"]
    console.print(
        f"ConvKV memory: {convkv['share']:.2%} of a block, {convkv['ms_per_block']:.2f} ms "
        f"(published {convkv['published_share']:.1%})"
    )
    sizes = ", ".join(
        f"{e['picture'][0]}×{e['picture'][1]} {e['ms_per_frame']:.3g} ms"
        for e in result["resolution"]
    )
    console.print(f"per frame: {sizes}")
    console.print(
        f"{len(result['blocks_ms'])} blocks: the last quarter takes {result['late_to_early']:.3f} "
        "times as long as the first"
    )
    sizes_of_model = result["sizes"]
    console.print(
        f"model: dim {sizes_of_model['dim']}, {sizes_of_model['num_layers']} layers, picture "
        f"{sizes_of_model['picture']}; published values are of the released size on other GPUs\n"
        f"timed: {result['timed']}\nnot timed: {result['not_timed']}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Cost over the size of the picture, and over the number of the block."""
    figures.scaling(result, path)
