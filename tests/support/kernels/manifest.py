"""Manifests of kernels as tests see them: entries by hand, independent of the runtime's reader."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def read_manifest(architecture: str, folder: Path) -> list[dict[str, Any]]:
    """The kernels that were compiled for an architecture, `cubin` being their bytes."""
    place = folder / architecture
    kernels = json.loads((place / "manifest.json").read_text())["kernels"]
    return [{**kernel, "cubin": (place / kernel["file"]).read_bytes()} for kernel in kernels]


def write_named_kernels(folder: Path, kernels: list[dict[str, Any]]) -> None:
    """`folder` for sm_90a with these kernels, whose cubins are their names: by those the fake
    driver knows them."""
    place = folder / "sm_90a"
    place.mkdir(parents=True)
    entries = []
    for kernel in kernels:
        cubin = kernel["name"].encode() + b"\0"
        (place / kernel["file"]).write_bytes(cubin)
        entry = {key: value for key, value in kernel.items() if key != "cubin"}
        entries.append(entry | {"sha256": hashlib.sha256(cubin).hexdigest()})
    manifest = {"format": 1, "arch": "sm_90a", "kernels": entries}
    (place / "manifest.json").write_text(json.dumps(manifest))
