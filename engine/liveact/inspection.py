"""`liveact inspect` and `liveact doctor`: what a checkpoint needs, what this machine can do."""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from liveact import _core
from liveact.checkpoint import read_json
from liveact.devices import cublaslt_library, cuda_obstacle
from liveact.dit import RELEASED_SLOTS, check_precision, open_weights
from liveact.encoders import ImageEncoder
from liveact.engine import VAE_FILE
from liveact.errors import DeviceError, InputError
from liveact.media import check_size
from liveact.precision import choose_precision, converted_precision, core_precision
from liveact.vae import SPATIAL_STRIDE, WanVAE

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pillow", "av", "soxr")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def inspect_checkpoint(
    directory: Path, size: tuple[int, int], given: str | None, audio_guidance: float
) -> Table:
    """Sizes, parameter counts and memory of one session in a precision. Raises InputError."""
    width, height = size
    check_size(width, height)
    config, tensors = open_weights(directory)
    precision = choose_precision(given, directory) or "fp32"
    check_precision(tensors, config, precision, directory)
    table = Table(title=str(directory), title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value")
    if read_json(directory / "config.json").get("_demo"):
        table.add_row("weights", "random (made by demo-checkpoint): the picture is texture")
    parameters = sum(math.prod(shape) for shape in _core.expected_tensors(config).values())
    table.add_row("DiT", f"{parameters / 1e6:,.1f} M parameters, {config.num_layers} layers")
    heads = f"{config.num_heads} heads × {config.dim // config.num_heads}"
    table.add_row("", f"width {config.dim} = {heads}, FFN {config.ffn_dim}")
    files = {tensors.file_of(name) for name in tensors}
    stored_in = converted_precision(directory)
    table.add_row(
        "DiT files",
        f"{_gib(sum(file.stat().st_size for file in files))} in {len(files)}, "
        + ("as released" if stored_in is None else f"converted: {stored_in}, loads as it lies"),
    )
    vae = WanVAE.load(directory / VAE_FILE)
    table.add_row("VAE", f"{vae.parameter_count / 1e6:,.1f} M parameters")
    tokens = (width // 16) * (height // 16)
    table.add_row("picture", f"{width}×{height}: {tokens} tokens per latent frame")
    latent_size = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    stored = "bf16" if tensors.dtype("head.head.weight") == torch.bfloat16 else "fp32"
    image_tokens = ImageEncoder.load(directory).tokens
    try:
        weight_bytes, stream_bytes = _core.required_bytes(
            _core.open_cpu(),
            config,
            core_precision(precision),
            stored,
            *latent_size,
            RELEASED_SLOTS,
            audio_guidance,
            image_tokens,
        )
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
    table.add_row("precision", str(precision))
    short = precision if isinstance(precision, str) else "policy"
    table.add_row(f"DiT weights, {short}", _gib(weight_bytes))
    table.add_row(f"one session, {short}", f"{_gib(stream_bytes)} beside the weights, constant")
    in_fp32 = vae.decoder_bytes(latent_size)
    in_bf16 = vae.decoder_bytes(latent_size, dtype=torch.bfloat16)
    table.add_row(
        "one session, VAE decode", f"{_gib(in_fp32)} on a CPU, {_gib(in_bf16)} on a GPU (bf16)"
    )
    return table


def _gpu() -> str:
    try:
        found = _core.cuda_versions(0, cublaslt=cublaslt_library())
    except DeviceError as error:
        return f"none: {error}"
    return f"{found['device']}, driver for CUDA {found['driver']}, cuBLASLt {found['cublaslt']}"


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
        _core.open_cpu()
        threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
        table.add_row(
            "cpu backend", f"usable: fp32, bf16, fp8 (emulated), policy files; {threads} threads"
        )
    except DeviceError as error:
        table.add_row("cpu backend", f"[red]not usable: {error}[/red]")
    obstacle = cuda_obstacle()
    table.add_row("cuda backend", f"not usable: {obstacle}" if obstacle else "usable")
    table.add_row("GPU", _gpu())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        table.add_row("CUDA in torch", ", ".join(names))
    else:
        table.add_row("CUDA in torch", "no device: VAE and encoders on the CPU")
    return table
