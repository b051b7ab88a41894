"""Which devices there are, which one is used, and why: no silent fallback."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from liveact import _core
from liveact.device import kernels
from liveact.device.placement import Placement, choose
from liveact.dit.precision import AUTO, Precision, PrecisionPolicy, choose_precision
from liveact.errors import DeviceError, InputError

_CUBLASLT = "libcublasLt.so.13"


@dataclass(frozen=True)
class Devices:
    """The choice of one engine. `reason` says in one line what was chosen and why."""

    cores: tuple[_core.Device, ...]  # of the DiT: one, or two that share every block
    name: str  # of them, such as `cuda:0` or `cuda:0,cuda:1`
    encoder_name: str
    vae_name: str
    precision: Precision
    reason: str
    vae_core: _core.Device | None = None  # launches the kernels of the VAE; None: it is on the CPU

    @property
    def core(self) -> _core.Device:
        """The first one of the DiT."""
        return self.cores[0]

    @property
    def vae_launch(self) -> Callable[..., None] | None:
        """How the VAE launches its kernels; None on the CPU."""
        if self.vae_core is None:
            return None
        return kernels.launcher(self.vae_core, self.vae_torch_device)

    @property
    def torch_device(self) -> torch.device:
        """Of the encoders."""
        return torch.device(self.encoder_name)

    @property
    def vae_torch_device(self) -> torch.device:
        return torch.device(self.vae_name)


def _index(name: str) -> int:
    return int(name.removeprefix("cuda:"))


def cublaslt_library() -> str:
    """Where cuBLASLt is: in the package that comes with torch, else by its name."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for found in Path(folder).glob(f"*/lib/{_CUBLASLT}"):
            return str(found)
    return _CUBLASLT


def cuda_obstacle(name: str = "cuda:0") -> str | None:
    """Why the DiT cannot run on this CUDA device, in a few words; None when it can."""
    try:
        architecture = _core.cuda_architecture(_index(name))
    except DeviceError as error:
        return str(error)
    if architecture not in (packaged := kernels.available()):
        found = ", ".join(packaged) or "none"
        return f"{name} needs kernels for {architecture}, packaged are {found} (make kernels)"
    return None


def torch_cuda_obstacle(name: str) -> str | None:
    """Why torch cannot use the CUDA device `name`; None when it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if _index(name) >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} CUDA device(s)"
    return None


def parse_device(name: str) -> str:
    """`cpu`, `cuda` or `cuda:N` → `cpu` or `cuda:N`. Raises InputError."""
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    number = index.isascii() and index.isdecimal() and len(index) <= 4
    if kind == "cuda" and (number or name == "cuda"):
        return f"cuda:{int(index or 0)}"
    raise InputError(f"device: expected cpu or cuda:N, found {name!r:.80}")


def parse_devices(text: str) -> tuple[str, ...]:
    """One device, or two alike with a comma between them. Raises InputError."""
    names = tuple(parse_device(name.strip()) for name in text.split(","))
    if len(names) == 1:
        return names
    pair = "two devices: expected cuda:N,cuda:M (or cpu,cpu)"
    if len(names) > 2 or len({name == "cpu" for name in names}) > 1:
        raise InputError(f"{pair}, found {text!r:.80}")
    if names[0] == names[1] != "cpu":
        raise InputError(f"{pair} of different GPUs, found {names[0]} twice")
    return names


def placement() -> Placement | None:
    """What is used of the GPUs of this machine where nobody says; None: the CPU."""
    if cuda_obstacle():
        return None
    gpus = [f"cuda:{index}" for index in range(min(2, _core.cuda_device_count()))]
    usable = [gpus[0], *(name for name in gpus[1:] if not cuda_obstacle(name))]
    return choose(usable, _core.cuda_peer_obstacle(0, 1) if len(usable) > 1 else "")


def check_peers(names: tuple[str, ...]) -> None:
    """Raises DeviceError where two GPUs cannot share a block."""
    if len(names) == 1 or names[0] == "cpu":
        return
    if obstacle := _core.cuda_peer_obstacle(_index(names[0]), _index(names[1])):
        raise DeviceError(f"{' and '.join(names)}: expected {obstacle}")


def open_devices(
    device: str | None,
    vae_device: str | None,
    precision: str | Path | PrecisionPolicy | None,
    checkpoint: Path | None = None,
) -> Devices:
    """Chooses and opens. None means CUDA where usable, else the CPU, and the precision for it; of
    two GPUs what `placement` says.

    device: `cpu`, `cuda:N`, or two with a comma between them, which share every block. precision:
    a name, a policy or the file of one; None: what the checkpoint was converted to, if it was, else
    what suits the device.

    Raises InputError for what no machine has, DeviceError for what this one has not.
    """
    chosen = choose_precision(precision, checkpoint)
    vae_name = None if vae_device is None else parse_device(vae_device)
    because = ""
    if device is not None:
        names = parse_devices(device)
        for name in names:
            if name != "cpu" and (obstacle := cuda_obstacle(name)):
                raise DeviceError(f"device: expected a usable {name}, found that {obstacle}")
    elif (found := placement()) is None:
        names, because = ("cpu",), f" (no CUDA: {cuda_obstacle()})"
    else:
        names, because = found.dit, f" ({found.reason})" if found.vae else ""
        vae_name = vae_name or found.vae
        if vae_name and vae_name != "cpu" and torch_cuda_obstacle(vae_name):
            vae_name = None  # as without a second GPU: the VAE needs torch
    check_peers(names)
    name, first = ",".join(names), names[0]
    if chosen is None:
        chosen = "fp32" if first == "cpu" else AUTO
    if first != "cpu" and chosen == "fp32":
        raise InputError(
            f"precision: expected auto, fp8 or bf16 on {name}, found fp32 (which is cpu only)"
        )
    encoder_name = "cpu" if first == "cpu" or torch_cuda_obstacle(first) else first
    if vae_name is None:  # the last one has no encoders
        vae_name = "cpu" if first == "cpu" or torch_cuda_obstacle(names[-1]) else names[-1]
    elif vae_name != "cpu" and (
        obstacle := torch_cuda_obstacle(vae_name) or cuda_obstacle(vae_name)
    ):
        raise DeviceError(f"vae-device: expected a usable {vae_name}, found that {obstacle}")
    cores = tuple(_open(each) for each in names)
    vae_core = None
    if vae_name != "cpu":
        vae_core = dict(zip(names, cores, strict=True)).get(vae_name) or _open(vae_name)
    reason = f"{name}{because}, {chosen}; encoders on {encoder_name}, VAE on {vae_name}"
    return Devices(cores, name, encoder_name, vae_name, chosen, reason, vae_core)


def _open(name: str) -> _core.Device:
    try:
        if name == "cpu":
            return _core.open_cpu()
        index = _index(name)
        images = kernels.load(_core.cuda_architecture(index))
        return _core.open_cuda(index, images, cublaslt=cublaslt_library())
    except DeviceError as error:
        raise DeviceError(f"device: expected a usable {name}, found that {error}") from None
