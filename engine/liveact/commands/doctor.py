"""`liveact doctor`: what is usable on this machine, and why not where it is not."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from liveact import _core
from liveact.device.devices import cublaslt_library, cuda_obstacle, placement
from liveact.dit.dit import auto_bytes
from liveact.dit.precision import AUTO, ROOMY_PRODUCT
from liveact.errors import DeviceError

_PACKAGES = (
    "torch",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "av",
    "soxr",
    "rich",
    "cachetools",
    "ftfy",
)


def run(options: argparse.Namespace) -> None:
    """Prints the table."""
    Console().print(doctor())


def _gpu() -> str:
    try:
        found = _core.cuda_versions(0, cublaslt=cublaslt_library())
    except DeviceError as error:
        return f"none: {error}"
    return f"{found['device']}, driver for CUDA {found['driver']}, cuBLASLt {found['cublaslt']}"


def _placement() -> str:
    found = placement()
    if found is None:
        return "all on the CPU"
    where = f"DiT on {','.join(found.dit)}" + (f", VAE on {found.vae}" if found.vae else "")
    return f"{where}: {found.reason}"


def _torch_waits() -> str:
    policy = os.environ.get("OMP_WAIT_POLICY")  # set by importing liveact, unless torch came first
    if policy is None:
        return "spin while they wait: torch was imported before liveact"
    asleep = policy.upper() == "PASSIVE"
    return "sleep while they wait" if asleep else f"OMP_WAIT_POLICY is {policy}"


def doctor() -> Table:
    """What is usable on this machine, and why not where it is not."""
    table = Table(title="LiveAct engine", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("state")
    table.add_row("version", f"{version('liveact-engine')}, runtime {_core.__version__}")
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "[red]not installed[/red]")
    try:
        threads = _core.open_cpu().threads
        table.add_row(
            "cpu backend", f"usable: fp32, bf16, fp8 (emulated), policy files; {threads} threads"
        )
    except DeviceError as error:
        table.add_row("cpu backend", f"[red]not usable: {error}[/red]")
    table.add_row("torch on the CPU", f"{torch.get_num_threads()} threads, {_torch_waits()}")
    table.add_row("GPU", _gpu())
    obstacle = cuda_obstacle()
    table.add_row("cuda backend", f"not usable: {obstacle}" if obstacle else "usable")
    table.add_row("placement", _placement())
    released = _core.ModelConfig()
    wide_gb = sum(auto_bytes(_core.open_cpu(), released)) / 1e9
    table.add_row(
        "precision on a GPU",
        f"{AUTO}: fp8, but {ROOMY_PRODUCT} in bf16 where the weights and a session fit "
        f"(released model: {wide_gb:.1f} GB)",
    )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        table.add_row("CUDA in torch", ", ".join(names))
    else:
        table.add_row("CUDA in torch", "no device: VAE and encoders on the CPU")
    return table
