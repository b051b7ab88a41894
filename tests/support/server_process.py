"""`liveact serve` as a process of its own, with the tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.pipeline import ONE_THREAD, demo_checkpoint


class Process:
    """The command, with its standard output and error."""

    def __init__(self, folder: Path, *options: object) -> None:
        self.errors = folder / "errors"
        arguments = ["--checkpoint", demo_checkpoint(), "--size", "32x32", "--port", 0, *options]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "liveact", "serve", *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=ONE_THREAD,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"liveact serves at (http://\S+)/\n", line)
        assert found, (line, self.errors.read_text())
        self.url = found[1]

    def stop(self, number: int, within_s: float = 60.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(within_s)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.errors.read_text().splitlines()]
