"""The GPU kernels that were packaged with the engine, and launching them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from liveact import _core

PACKAGED = Path(__file__).resolve().parent.parent / "gpu"  # gpu/<architecture>/manifest.json


def available(directory: Path = PACKAGED) -> list[str]:
    """Architectures that kernels were packaged for."""
    return _core.kernel_architectures(directory)


def load(architecture: str, directory: Path = PACKAGED) -> list[_core.KernelImage]:
    """The kernels for an architecture as `_core.open_cuda` takes them.

    Raises DeviceError where there are none, or a file is not what the manifest says.
    """
    return _core.load_kernels(directory, architecture)


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
