"""Which devices there are, which one is used, and why: no silent fallback."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liveact import _core
from liveact.dit import PRECISIONS
from liveact.errors import DeviceError, InputError


@dataclass(frozen=True)
class Devices:
    """The choice of one engine. `reason` says in one line what was chosen and why."""

    core: _core.Device
    name: str
    vae_name: str
    precision: str
    reason: str

    @property
    def torch_device(self) -> torch.device:
        """Of the encoders."""
        return torch.device(self.name)

    @property
    def vae_torch_device(self) -> torch.device:
        return torch.device(self.vae_name)


def cuda_obstacle() -> str | None:
    """Why CUDA cannot be used for the DiT here, in a few words; None when it can."""
    return "this build has no CUDA backend"


def vae_cuda_obstacle(name: str) -> str | None:
    """Why torch cannot run the VAE on the CUDA device `name`; None when it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    count = torch.cuda.device_count()
    if int(name.removeprefix("cuda:")) >= count:
        return f"torch finds {count} CUDA device(s)"
    return None


def parse_device(name: str) -> str:
    """`cpu`, `cuda` or `cuda:N` → `cpu` or `cuda:N`. Raises InputError."""
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind == "cuda" and (index.isdecimal() or name == "cuda"):
        return f"cuda:{int(index or 0)}"
    raise InputError(f"device: expected cpu or cuda:N, got {name!r}")


def open_devices(device: str | None, vae_device: str | None, precision: str | None) -> Devices:
    """Chooses and opens; None means CUDA where usable, else the CPU, and the precision for it.

    Raises InputError for what no machine has, DeviceError for what this one has not.
    """
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision: expected {', '.join(PRECISIONS)}, got {precision!r}")
    obstacle = cuda_obstacle()
    if device is None:
        name = "cpu" if obstacle else "cuda:0"
        reason = f"{name} (no CUDA: {obstacle})" if obstacle else name
    else:
        name = reason = parse_device(device)
        if name != "cpu" and obstacle:
            raise DeviceError(f"device: expected a usable {name}, found that {obstacle}")
    vae_name = name if vae_device is None else parse_device(vae_device)
    if vae_name != "cpu" and (obstacle := vae_cuda_obstacle(vae_name)):
        raise DeviceError(f"vae-device: expected a usable {vae_name}, found that {obstacle}")
    if precision is None:
        precision = "fp32" if name == "cpu" else "fp8"
    core = _core.open_cpu()
    return Devices(core, name, vae_name, precision, f"{reason}, {precision}; VAE on {vae_name}")
