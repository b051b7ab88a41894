"""What `liveact generate` prints of its blocks: a line or a progress bar each, then a table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from liveact.session.chunk import Chunk


@dataclass
class BlockRow:
    """One line of the table."""

    block: int
    frames: int = 0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    overlap: float = 0.0  # share of the decoding that passed while a block was denoised
    # Seconds that it plays / seconds since the block before was complete; above 1 it keeps up.
    real_time: float = 0.0


class Report:
    """A progress bar on a terminal, else one line per block."""

    def __init__(self, stream: TextIO, expected_blocks: int | None, started_s: float) -> None:
        self._stream = stream
        self._console = Console(file=stream)
        self._expected = expected_blocks
        self._last_s = started_s
        self._progress = Progress(
            TextColumn("block {task.completed}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Report:
        self._progress.start()
        self._task = self._progress.add_task("", total=self._expected)
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def add(self, chunk: Chunk, fps: Fraction, rows: list[BlockRow]) -> None:
        if not rows or rows[-1].block != chunk.block:
            rows.append(BlockRow(chunk.block))
        row = rows[-1]
        row.frames += len(chunk.frames)
        if (timings := chunk.timings.block) is None:
            return
        row.denoise_ms = timings.denoise_ms
        row.decode_ms = timings.decode_ms
        row.overlap = timings.overlap_ms / max(row.decode_ms, 1e-9)
        now = time.perf_counter()
        row.real_time = row.frames / (float(fps) * max(now - self._last_s, 1e-9))
        self._last_s = now
        line = (
            f"denoise {row.denoise_ms:.0f} ms, decode {row.decode_ms:.0f} ms, "
            f"overlap {row.overlap:.0%}, {row.real_time:.2f}x real time"
        )
        if self._console.is_terminal:
            self._progress.update(self._task, advance=1, description=line)
        else:
            total = f"/{self._expected}" if self._expected else ""
            # Not through the console, which would wrap it.
            print(f"block {row.block + 1}{total}: {line}", file=self._stream, flush=True)


def table(rows: list[BlockRow]) -> Table:
    """The table of all blocks; of a long video the first and last ones."""
    result = Table(title="Blocks", title_justify="left")
    for column in ("block", "frames", "denoise ms", "decode ms", "overlap", "x real time"):
        result.add_column(column, justify="right")
    shown = rows if len(rows) <= 40 else [*rows[:20], *rows[-20:]]
    for previous, row in zip([None, *shown], shown, strict=False):
        if previous is not None and row.block != previous.block + 1:
            result.add_row(*["…"] * 6)
        result.add_row(
            str(row.block),
            str(row.frames),
            f"{row.denoise_ms:.1f}",
            f"{row.decode_ms:.1f}",
            f"{row.overlap:.0%}",
            f"{row.real_time:.2f}",
        )
    return result
