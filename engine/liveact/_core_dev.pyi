"""Types of the extension module of tests and benchmarks (bindings/dev), which no wheel has."""

from pathlib import Path
from typing import Any

from liveact._core import Device

ops: Any  # the submodule of single ops, one function each

class TimedDevice(Device):
    def __init__(
        self, device: Device, flush_bytes: int, samples: int = 1, warm: bool = False
    ) -> None: ...
    def take(self) -> list[tuple[str, float]]: ...

def update_table(
    slots: tuple[int, int, int, int], memory: str, block: int
) -> dict[int, list[int]]: ...
def read_policy(file: Path) -> tuple[list[dict[str, str]], bool]: ...
def precision_of(directory: Path, name: str, device: Device) -> list[dict[str, str]]: ...
