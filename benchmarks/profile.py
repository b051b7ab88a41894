"""Runs a session for a profiler, and what looking at it costs.

Sessions without pace alternate between instrumentation off and on (the Chrome trace of `liveact
generate --trace`): the block period must not change, and what overlaps must still overlap. In the
last session the CUDA profiler is started before block A of `--blocks A-B` and stopped after block
B, so that Nsight records these blocks only (profile_nsys.sh, profile_ncu.sh).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import models, session, spread
from benchmarks.options import add_model
from liveact.dit.dit import MemoryPolicy
from liveact.session.chunk import Chunk
from liveact.session.timeline import Timeline

# Blocks between the arrival of a whole block and the first that cannot have been begun by then:
# one is decoded, one waits in the queue, one is denoised (LATENT_QUEUE_BLOCKS in
# engine/liveact/session/state.py).
IN_FLIGHT = 3
STAGES_PER_BLOCK = 11  # wait for audio, audio, denoise, and 8 times decode

_RUN = {"block_period_ms": spread.FIELDS, "overlap": float}
FIELDS: dict[str, Any] = {
    "off": _RUN,
    "trace": _RUN,
    "trace_to_off": float,
    "span_us": {"off": float, "trace": float},  # what one stage costs to look at
    "window": (list, type(None)),  # first and last block that the CUDA profiler saw
}


def block_range(text: str) -> tuple[int, int]:
    """`5-6` or `5` → (5, 6) or (5, 5), for argparse."""
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"expected FIRST-LAST such as 5-6, found {text!r}")
    return int(first), int(last or first)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--blocks", type=block_range, metavar="A-B", help="what Nsight is to record (CUDA only)"
    )


def span_us(trace: Path | None, count: int = 2000) -> float:
    """Microseconds that one span of a Timeline takes: more telling than sessions where others use
    the machine too."""
    timeline = Timeline(trace)
    start = time.perf_counter()
    for block in range(count):
        with timeline.span("stage", block, "worker"):
            pass
    elapsed_s = time.perf_counter() - start
    timeline.close()
    return 1e6 * elapsed_s / count


class Window:
    """Starts a profiler before block `first` begins, stops it when block `last` is complete."""

    def __init__(
        self, first: int, last: int, start: Callable[[], None], stop: Callable[[], None]
    ) -> None:
        self._first, self._last, self._start, self._stop = first, last, start, stop
        self._running = False
        if first < IN_FLIGHT:
            self._begin()

    def _begin(self) -> None:
        self._start()
        self._running = True

    def see(self, chunk: Chunk) -> None:
        """Every chunk, as it arrives."""
        if not chunk.last_of_block:
            return
        if chunk.block == self._first - IN_FLIGHT:
            self._begin()
        if chunk.block == self._last and self._running:
            self._stop()
            self._running = False


def measure(options: argparse.Namespace) -> dict[str, Any]:
    loaded = models.load(options)
    engine = models.open_engine(loaded)
    blocks = max(session.STEADY_BLOCK + 8, options.blocks[1] + 2 if options.blocks else 0)
    seconds = blocks * session.BLOCK_FRAMES / session.FPS
    how: dict[str, Any] = {"live": False, "size": loaded.size, "seed": loaded.seed}
    periods: dict[str, list[float]] = {"off": [], "trace": []}
    overlaps: dict[str, list[float]] = {"off": [], "trace": []}
    with tempfile.TemporaryDirectory() as folder:
        traces = {"off": None, "trace": Path(folder) / "trace.json"}
        for turn in range(options.repeat):
            # In turn who is first: what the first pays for both is then paid by both.
            for name in sorted(traces, reverse=turn % 2 == 1):
                recorder, _ = session.run(engine, seconds, **how, trace=traces[name])
                found = session.evaluate(recorder, None, loaded.size)
                periods[name].append(found["block_period_ms"]["median"])
                overlaps[name].append(found["overlap"])
        spans = {"off": span_us(None), "trace": span_us(Path(folder) / "spans.json")}
    if options.blocks and not loaded.on_cpu:
        profiler = torch.cuda.profiler
        first, last = options.blocks
        window = Window(first, last, profiler.start, profiler.stop)
        session.run(engine, seconds, **how, see=window.see)
    runs = {
        name: {
            "block_period_ms": spread.spread(periods[name]),
            "overlap": spread.percentile(overlaps[name], 50),
        }
        for name in periods
    }
    return {
        "timed": "period of steady blocks of sessions without pace, and the share of decoding that "
        "passed under denoising; with the Chrome trace on and off in turn",
        "not_timed": "the session in which the CUDA profiler runs",
        **loaded.described(),
        "memory_policy": asdict(MemoryPolicy()),
        **runs,
        "trace_to_off": spread.median_ratio(periods["trace"], periods["off"]),
        "span_us": spans,
        "window": list(options.blocks) if options.blocks and not loaded.on_cpu else None,
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title="What instrumentation costs", title_justify="left")
    for column in ("instrumentation", "ms per block", "decoding under denoising", "ratio"):
        table.add_column(column, justify="left" if column == "instrumentation" else "right")
    for name, ratio in (("off", 1.0), ("trace", result["trace_to_off"])):
        run = result[name]
        period = f"{run['block_period_ms']['median']:.1f}"
        table.add_row(name, period, f"{run['overlap']:.0%}", f"{ratio:.3f}")
    console.print(table)
    spans = result["span_us"]
    console.print(
        f"one stage costs {spans['off']:.1f} µs to look at, {spans['trace']:.1f} µs with the "
        f"trace; a block has {STAGES_PER_BLOCK}"
    )
    if result["window"]:
        console.print("the CUDA profiler ran during blocks {} to {}".format(*result["window"]))
    elif "--blocks" in result["command"]:
        console.print("--blocks is for CUDA: nothing was recorded")
    console.print(f"timed: {result['timed']}; not timed: {result['not_timed']}")
