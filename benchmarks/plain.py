"""One steady block of plain PyTorch alone: a variant of the baseline (benchmarks/baseline.py).

The weights and the blocks are those that `python -m benchmarks block` has with the same options.
Give its `--latents` file, and the latents of the first blocks are compared. On a GPU neither the
engine nor another variant fits beside this one, so each has a process of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import models, spread
from benchmarks.baseline import VARIANTS, open_alone
from benchmarks.block import FIRST_STEADY_BLOCK, Blocks, inputs
from benchmarks.options import add_model
from benchmarks.timing import Clock
from liveact.blocks import RELEASED_SLOTS
from liveact.dit.precision import PrecisionPolicy
from liveact.errors import InputError

FIELDS: dict[str, Any] = {
    "variant": str,
    "name": str,
    "ms_per_block": spread.FIELDS,
    "relative_difference": (float, type(None)),  # of the latents of block 2; null without --latents
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--variant", choices=VARIANTS, default="plain")
    parser.add_argument("--latents", type=Path, help="of the engine, see `block`")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.checkpoint is not None:
        raise InputError("plain: expected random weights, found a checkpoint")
    loaded = models.load(options, plain=True)
    if isinstance(loaded.devices.precision, PrecisionPolicy):
        raise InputError("plain: expected the name of a precision, found a policy")
    described = loaded.described()
    clock = Clock(loaded.devices.torch_device)
    first_timed = FIRST_STEADY_BLOCK + 1  # block 3 may compile
    given = inputs(loaded, first_timed + 1 + options.repeat)
    blocks = Blocks(loaded, given)
    latents = {} if options.latents is None else load_file(options.latents)
    name, denoise = open_alone(loaded, options.variant, given)
    times: list[float] = []
    difference: float | None = None
    for block in range(first_timed + options.repeat):
        frames = RELEASED_SLOTS.current if block else RELEASED_SLOTS.context
        noise, renoise, _ = blocks.next(frames)
        latent, ms = clock.block(denoise, noise, renoise)
        if block >= first_timed:
            times.append(ms)
        if (found := latents.get(f"latent.{block}")) is not None:
            difference = _difference(found, latent.cpu())
    return {
        "timed": "denoise of one steady block by plain PyTorch: 3 steps, all layers",
        "not_timed": "encoders, compiling, video encoding, network",
        **described,
        "memory_policy": None,
        "variant": options.variant,
        "name": name,
        "ms_per_block": spread.spread(times),
        "relative_difference": difference,
    }


def _difference(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def print_table(result: dict[str, Any], console: Console) -> None:
    ms, difference = result["ms_per_block"], result["relative_difference"]
    console.print(f"{result['name']}: {ms['median']:.0f} ms per block ({ms['n']} blocks)")
    if difference is not None:
        console.print(f"the engine's latents differ by {difference:.1e} in block 2")
    console.print(f"timed: {result['timed']}\nnot timed: {result['not_timed']}")
