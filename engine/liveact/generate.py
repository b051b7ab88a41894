"""`liveact generate`: a portrait and an audio file in, an mp4 out, with a table per block."""

from __future__ import annotations

import itertools
import math
import re
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from liveact.audio.front_end import BLOCK_FRAMES
from liveact.errors import InputError, SessionError
from liveact.media import AudioFile, Mp4Writer
from liveact.session.session import Session
from liveact.session.workers import Chunk

WHOLE_CLIP_S = 60.0  # clips up to this length are encoded whole, exactly as in the released code


@dataclass(frozen=True)
class Edit:
    """Blocks first..last are made with another prompt."""

    first: int
    last: int
    prompt: str

    @classmethod
    def parse(cls, text: str) -> Edit:
        """From `7-8:laughing` or `7:laughing`. Raises InputError."""
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?:\s*(\S.*)", text, re.DOTALL)
        if match is None:
            raise InputError(
                f"edit: expected FIRST-LAST:PROMPT such as 7-8:laughing, got {text!r:.80}"
            )
        first, last, prompt = int(match[1]), int(match[2] or match[1]), match[3].rstrip()
        if last < first:
            raise InputError(f"edit: expected first block <= last block, got {text!r:.80}")
        return cls(first, last, prompt)


@dataclass
class BlockRow:
    """One line of the table."""

    block: int
    frames: int = 0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    overlap: float = 0.0  # share of the decoding that passed while a block was denoised
    real_time: float = 0.0  # seconds since the block before was complete / seconds it plays


def num_blocks(seconds: float, fps: Fraction) -> int:
    """⌊seconds·fps/32⌋ + 1"""
    return math.floor(seconds * fps / BLOCK_FRAMES) + 1


def unreached(edits: list[Edit], audio: AudioFile, fps: Fraction) -> list[str]:
    """A line for each edit that begins after the last block, where the length is known."""
    if audio.duration_s is None:
        return []
    count = num_blocks(audio.duration_s, fps)
    return [
        f"edit of block {edit.first}: never reached, {audio.path} makes {count} blocks"
        for edit in edits
        if edit.first >= count
    ]


def audio_mode(audio: AudioFile) -> Literal["stream", "whole"]:
    """`whole` for clips that are known to be short."""
    return (
        "whole" if audio.duration_s is not None and audio.duration_s <= WHOLE_CLIP_S else "stream"
    )


def write_video(
    session: Session, audio: AudioFile, out: Path, size: tuple[int, int], terminal: TextIO
) -> list[BlockRow]:
    """Feeds the audio file, writes what comes out; returns the table.

    `out` appears only when it is complete. An error of the file, the session or the disk ends
    everything and is raised.
    """
    errors: list[BaseException] = []
    started_s = time.perf_counter()
    feeder = threading.Thread(target=_feed, args=(session, audio, errors), daemon=True)
    feeder.start()
    rows: list[BlockRow] = []
    try:
        first = next(session)
        writer = Mp4Writer(out, *size, session.fps, first.sample_rate_hz, first.pcm.shape[1])
        expected = num_blocks(audio.duration_s, session.fps) if audio.duration_s else None
        with writer, _Report(terminal, expected, started_s) as report:
            for chunk in itertools.chain([first], session):
                writer.write(chunk.frames, chunk.pcm)
                report.add(chunk, session.fps, rows)
    except SessionError as error:
        if errors:
            raise _named(errors[0], audio) from None
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise _named(cause, audio) from None
    except StopIteration:
        raise InputError(f"{audio.path}: expected audio to make a block of, got none") from None
    finally:
        session.close()
        feeder.join()
    return rows


def _named(error: BaseException, audio: AudioFile) -> BaseException:
    """Bad input, with the file that it came from: a session knows samples only."""
    if isinstance(error, InputError) and str(audio.path) not in str(error):
        return InputError(f"{audio.path}: {error}")
    return error


def _feed(session: Session, audio: AudioFile, errors: list[BaseException]) -> None:
    try:
        for piece in audio:
            session.push_audio(piece, audio.sample_rate_hz, block=True)
        session.end_of_audio()
    except SessionError:
        pass  # the session's own error reaches whoever iterates over it
    except BaseException as error:  # whatever it is, who waits for chunks must not wait on
        errors.append(error)
        session.close()


class _Report:
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

    def __enter__(self) -> _Report:
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
        if not chunk.last_of_block:
            return
        row.denoise_ms = chunk.timings["denoise_ms"]
        row.decode_ms = chunk.timings["block_decode_ms"]
        row.overlap = chunk.timings["overlap_ms"] / max(row.decode_ms, 1e-9)
        now = time.perf_counter()
        row.real_time = (now - self._last_s) * float(fps) / row.frames
        self._last_s = now
        line = (
            f"denoise {row.denoise_ms:.0f} ms, decode {row.decode_ms:.0f} ms, "
            f"overlap {row.overlap:.0%}, {1 / row.real_time:.1f}x real time"
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
    for column in ("block", "frames", "denoise ms", "decode ms", "overlap", "real-time factor"):
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
