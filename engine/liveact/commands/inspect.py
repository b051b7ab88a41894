"""`liveact inspect`: every file of a checkpoint checked, sizes and memory; nothing is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from liveact import _core
from liveact.blocks import RELEASED_SLOTS, SIDE_MULTIPLE, check_size, latent_size
from liveact.checkpoint.layout import DIT_CONFIG_FILE
from liveact.checkpoint.opened import OpenedCheckpoint, open_checkpoint
from liveact.checkpoint.tensors import Tensors
from liveact.commands.options import parse_size
from liveact.dit.precision import (
    AUTO,
    ROOMY_PRODUCT,
    Precision,
    auto_policy,
    choose_precision,
    converted_precision,
    core_precision,
)
from liveact.dit.weights import check_precision
from liveact.errors import InputError
from liveact.files import read_json


def run(options: argparse.Namespace) -> None:
    """Prints the table. Raises InputError."""
    size = parse_size(options.size)
    Console().print(
        inspect_checkpoint(
            options.directory, size, options.precision, options.audio_guidance, options.wav2vec
        )
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def inspect_checkpoint(
    directory: Path,
    size: tuple[int, int],
    given: str | None,
    audio_guidance: float,
    wav2vec: Path | None = None,
) -> Table:
    """Sizes, parameter counts and memory of one session in a precision. Raises InputError."""
    check_size(*size)
    opened = open_checkpoint(directory, wav2vec)
    config, tensors, vae = opened.dit_config, opened.dit, opened.vae
    precision = choose_precision(given, directory) or "fp32"
    check_precision(tensors, config, precision, directory)
    table = Table(title=str(directory), title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value")
    if read_json(directory / DIT_CONFIG_FILE).get("_demo"):
        table.add_row("weights", "random (made by demo-checkpoint): the picture is texture")
    for row in _dit_rows(directory, config, tensors):
        table.add_row(*row)
    for row in _other_rows(opened):
        table.add_row(*row)
    width, height = size
    tokens = (width // SIDE_MULTIPLE) * (height // SIDE_MULTIPLE)
    table.add_row("picture", f"{width}×{height}: {tokens} tokens per latent frame")
    formats = [precision]
    if precision == AUTO:
        formats = [auto_policy(config.num_layers, roomy) for roomy in ("bf16", "fp8")]
    found = [
        _dit_bytes(directory, opened, one, latent_size(size), audio_guidance) for one in formats
    ]
    stream_bytes = found[0][1]
    short = precision if isinstance(precision, str) else "policy"
    weights = _gib(found[0][0])
    if precision == AUTO:
        weights += (
            f" with {ROOMY_PRODUCT} in bf16, {_gib(found[1][0])} in fp8 where that is too much"
        )
    table.add_row("precision", str(precision))
    table.add_row(f"DiT weights, {short}", weights)
    table.add_row(f"one session, {short}", f"{_gib(stream_bytes)} beside the weights, constant")
    in_fp32 = vae.stream_bytes(latent_size(size))
    in_bf16 = vae.stream_bytes(latent_size(size), dtype=torch.bfloat16)
    table.add_row(
        "one session, VAE decode", f"{_gib(in_fp32)} on a CPU, {_gib(in_bf16)} on a GPU (bf16)"
    )
    return table


def _dit_rows(
    directory: Path, config: _core.ModelConfig, tensors: Tensors
) -> Iterator[tuple[str, str]]:
    parameters = sum(math.prod(shape) for shape in _core.expected_tensors(config).values())
    yield "DiT", f"{parameters / 1e6:,.1f} M parameters, {config.num_layers} layers"
    heads = f"{config.num_heads} heads × {config.dim // config.num_heads}"
    yield "", f"width {config.dim} = {heads}, FFN {config.ffn_dim}"
    files = {tensors.file_of(name) for name in tensors}
    stored_in = converted_precision(directory)
    origin = "as released" if stored_in is None else f"converted: {stored_in}, loads as it lies"
    size = _gib(sum(file.stat().st_size for file in files))
    yield "DiT files", f"{size} in {len(files)}, {origin}"


def _other_rows(opened: OpenedCheckpoint) -> Iterator[tuple[str, str]]:
    """Parameters and size of everything but the DiT."""
    parameters, files = opened.parameters(), opened.files()
    for what in ("text encoder", "image encoder", "audio encoder", "VAE"):
        size = _gib(sum(file.stat().st_size for file in files[what]))
        yield what, f"{parameters[what] / 1e6:,.1f} M parameters, {size}"


def _dit_bytes(
    directory: Path,
    opened: OpenedCheckpoint,
    precision: Precision,
    latent: tuple[int, int],
    audio_guidance: float,
) -> tuple[int, int]:
    """Device memory of the weights and of one session."""
    stored = "bf16" if opened.dit.dtype("head.head.weight") == torch.bfloat16 else "fp32"
    try:
        return _core.required_bytes(
            _core.open_cpu(),
            opened.dit_config,
            core_precision(precision),
            stored,
            *latent,
            RELEASED_SLOTS,
            audio_guidance,
            opened.image.sizes.tokens,
        )
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
