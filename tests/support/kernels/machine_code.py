"""Machine code as text, and the names of its instructions."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from triton import knobs


def disassemble(cubin: Path) -> list[str]:
    """The lines of nvdisasm, which comes with Triton."""
    command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def names(lines: Iterable[str]) -> tuple[str, ...]:
    """The instructions in order, with their modifiers."""
    pattern = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z0-9_]+(?:\.[A-Z0-9_x]+)*)")
    return tuple(m.group(1) for line in lines if (m := pattern.search(line)))
