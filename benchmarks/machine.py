"""What a result was measured on: without it a number means nothing."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, `+` where the work tree differs; None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()


def stamp() -> dict[str, Any]:
    """Machine, versions and commit, for the JSON of a result."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),  # of the whole machine: others may share it
        "versions": {p: _version(p) for p in ("liveact-engine", "torch", "triton", "numpy")}
        | {"cuda": torch.version.cuda},
        "commit": _commit(),
    }


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, format, shape and the first 4 KiB of every tensor, wherever it lies: a
    moment's work for 28 GB, and another checkpoint or another seed gives another hash."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        start = tensor.reshape(-1)[: 4096 // tensor.element_size()].cpu()
        digest.update(start.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
