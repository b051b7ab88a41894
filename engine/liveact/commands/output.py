"""Standard output that may break: a full disk, a reader that goes away, or none from the start.

What a command prints is a log; what it makes are files. So a log that cannot be written is lost and
the work goes on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class Output:
    """Stands in for `sys.stdout`. Where writing fails, all that follows goes nowhere.

    Attributes:
        lost: why, else None.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Says that all was written, also when it was not."""
        if self.lost is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """As `write`."""
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        # Without its traceback, which would hold the session until Python ends.
        self.lost = error.with_traceback(None)
        # What is still buffered would fail again when Python ends.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Printer(logging.Handler):
    """Prints what the engine warns of, such as a prompt that is too long."""

    def emit(self, record: logging.LogRecord) -> None:
        print(" ".join(record.getMessage().split()), flush=True)


@contextlib.contextmanager
def standard_output() -> Iterator[Output]:
    """`sys.stdout` for the time of a command; warnings of the engine are printed there too."""
    before = sys.stdout
    if before is None:  # closed, as by `>&-`
        _occupy_standard_files()
        stream: TextIO = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    else:
        stream = before
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a terminal that has no ×, a file name
    output, printer = Output(stream), _Printer()
    sys.stdout = cast(TextIO, output)
    logging.getLogger("liveact").addHandler(printer)
    try:
        yield output
    finally:
        output.flush()
        logging.getLogger("liveact").removeHandler(printer)
        sys.stdout = before


def _occupy_standard_files() -> None:
    """Files 0 to 2 exist from here on: else the film would become file 1, and whatever a library
    prints would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
