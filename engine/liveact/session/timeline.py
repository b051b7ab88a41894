"""Stage timings of a session: how long each took, what overlapped, and a trace for Perfetto.

A `Timeline` is kept by every session; it holds the last few spans only. With a file it also writes
every span as it ends, in the Chrome JSON trace format (open it in ui.perfetto.dev), so that a
trace of any length costs no memory. An unfinished file is still readable: the format allows the
closing bracket to be missing.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from liveact.errors import InputError

_KEPT_SPANS = 16  # per stage; overlap only looks at neighbouring blocks


class Span:
    """One stage of one block. Times in seconds of `time.perf_counter`."""

    def __init__(self, stage: str, block: int) -> None:
        self.stage, self.block = stage, block
        self.start_s = time.perf_counter()
        self.stop_s: float | None = None  # None while it runs

    @property
    def duration_ms(self) -> float:
        return 1e3 * ((self.stop_s or time.perf_counter()) - self.start_s)


class Timeline:
    """Spans of one session, from any thread.

    Raises InputError, also from `span`, when the trace file cannot be written.
    """

    def __init__(self, trace_file: Path | None = None) -> None:
        self._lock = threading.RLock()  # see SessionState.lock
        self._spans: dict[str, deque[Span]] = {}
        self._origin_s = time.perf_counter()
        self._file: IO[str] | None = None
        if trace_file is not None:
            try:
                self._file = trace_file.open("w", encoding="utf-8")
            except OSError as error:
                raise InputError(f"{trace_file}: cannot be written: {error.strerror}") from error
            self._write_line("[")
        self._tracks: dict[str, int] = {}

    @contextmanager
    def span(self, stage: str, block: int, track: str) -> Iterator[Span]:
        """Times a stage of a block; `track` is the row of the trace it is drawn in."""
        span = Span(stage, block)
        with self._lock:
            self._spans.setdefault(stage, deque(maxlen=_KEPT_SPANS)).append(span)
        try:
            yield span
        finally:
            span.stop_s = time.perf_counter()
            self._write(span, track)

    def overlap_ms(self, span: Span, stage: str) -> float:
        """How much of `span` passed while spans of `stage` were running, in milliseconds."""
        now = time.perf_counter()
        stop = span.stop_s or now
        with self._lock:
            others = list(self._spans.get(stage, ()))
        shared = (min(stop, o.stop_s or now) - max(span.start_s, o.start_s) for o in others)
        return 1e3 * sum(max(0.0, s) for s in shared)

    def close(self) -> None:
        """Finishes the trace file; nothing happens when there is none or it is finished."""
        with self._lock:
            self._write_line("{}]")
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write_line(self, line: str) -> None:
        """Every line goes to the system at once: what there is of a trace can be read any time."""
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            broken, self._file = self._file, None
            with contextlib.suppress(OSError):  # it flushes once more, and fails once more
                broken.close()
            raise InputError(f"{broken.name}: cannot be written: {error.strerror}") from error

    def _write(self, span: Span, track: str) -> None:
        with self._lock:
            if self._file is None or span.stop_s is None:
                return
            if track not in self._tracks:
                self._tracks[track] = len(self._tracks) + 1
                name = {"name": "thread_name", "ph": "M", "pid": 1, "tid": self._tracks[track]}
                self._write_line(json.dumps(name | {"args": {"name": track}}) + ",")
            event = {
                "name": span.stage,
                "cat": "block",
                "ph": "X",
                "pid": 1,
                "tid": self._tracks[track],
                "ts": round(1e6 * (span.start_s - self._origin_s), 1),
                "dur": round(1e3 * span.duration_ms, 1),
                "args": {"block": span.block},
            }
            self._write_line(json.dumps(event) + ",")
