"""The GPU kernels that were packaged with the engine: their manifest, checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from liveact import _core
from liveact.errors import DeviceError

PACKAGED = Path(__file__).resolve().parent.parent / "gpu"  # gpu/<architecture>/manifest.json
FORMAT = 1


def available(directory: Path = PACKAGED) -> list[str]:
    """Architectures that kernels were packaged for."""
    return sorted(path.parent.name for path in directory.glob("*/manifest.json"))


def load(architecture: str, directory: Path = PACKAGED) -> list[dict[str, Any]]:
    """The kernels for an architecture as `_core.open_cuda` takes them.

    Raises DeviceError where there are none, or a file is not what the manifest says.
    """
    folder = directory / architecture
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        found = ", ".join(available(directory)) or "none"
        raise DeviceError(
            f"kernels: expected some compiled for {architecture}, found {found}"
        ) from error
    if manifest.get("format") != FORMAT or manifest.get("arch") != architecture:
        raise DeviceError(
            f"{folder}/manifest.json: expected format {FORMAT} for {architecture}, found format "
            f"{manifest.get('format')} for {manifest.get('arch')}"
        )
    kernels = []
    for kernel in manifest["kernels"]:
        file = folder / kernel["file"]
        try:
            cubin = file.read_bytes()
        except OSError as error:
            raise DeviceError(f"{file}: expected a kernel, found none") from error
        digest = hashlib.sha256(cubin).hexdigest()
        if digest != kernel["sha256"]:
            raise DeviceError(f"{file}: expected SHA-256 {kernel['sha256']}, found {digest}")
        kernels.append({**kernel, "cubin": cubin})
    return kernels


def launcher(device: _core.Device, torch_device: torch.device) -> Callable[..., None]:
    """launch(kernel name, **parameters): enqueues one of the kernels that `device` was opened with
    on the stream that torch uses at the time.

    A tensor stands for its address, None for a null pointer. Raises DeviceError for an unknown
    kernel, missing or further parameters, and alignments the kernel was not compiled for.
    """

    def launch(name: str, **arguments: torch.Tensor | int | float | None) -> None:
        values = {
            key: value.data_ptr() if isinstance(value, torch.Tensor) else value or 0
            for key, value in arguments.items()
        }
        stream = torch.cuda.current_stream(torch_device).cuda_stream
        _core.launch(device, name, stream, values)

    return launch
