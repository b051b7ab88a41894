"""`liveact calibrate`: what FP8 costs each product of a checkpoint, and the policy that follows.

The DiT runs some blocks in bf16. Beside every product of a layer, and every self-attention, the
same is done in fp8 on the same activations (csrc/measure/calibrate.h); the error is
‖fp8 − bf16‖ / ‖bf16‖ over all steps and blocks. A product is fp8 in the policy where its error is
at most the threshold, self-attention where it is at most √2 times that: it is two products, whose
errors add in squares. Then the blocks run again with the whole policy, and in fp32 on a CPU, for
the error of the velocity that all choices make together.

Activations depend on what the session is about: the prompt, image and speech that are given go
through the checkpoint's own encoders (conditioning.py).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table

from liveact import _core
from liveact.blocks import check_size
from liveact.commands.conditioning import Conditioning, conditioning
from liveact.commands.options import check_output, on_terminal, parse_size
from liveact.device.devices import open_devices, parse_devices
from liveact.dit.dit import STEPS, Dit
from liveact.dit.precision import PRODUCTS, Choice, Precision, PrecisionPolicy
from liveact.dit.weights import open_weights
from liveact.errors import InputError
from liveact.files import whole_file

# Rounding to 3 mantissa bits costs a product of well-behaved operands 3.8 % (docs/precision.md).
THRESHOLD = 0.05
BLOCKS = 3  # the third is the first whose context was compressed
_MAX_BLOCKS = 1000

Array = np.ndarray[Any, np.dtype[np.float32]]
Velocities = list[Array]
# (evaluated blocks, blocks in all)
Report = Callable[[int, int], None]


def run(options: argparse.Namespace) -> None:
    """Measures with a progress bar, writes the policy, prints the tables."""
    size = parse_size(options.size)
    check_arguments(size, options.blocks, options.threshold)
    inputs = [path for path in (options.image, options.audio) if path is not None]
    check_output(options.out, inputs)
    if options.device is not None and len(parse_devices(options.device)) > 1:
        raise InputError(f"device: expected one to measure on, found {options.device!r:.80}")
    devices = open_devices(options.device, None, "bf16")
    config, _ = open_weights(options.directory)
    given = conditioning(
        options.directory,
        config,
        size,
        options.blocks,
        options.seed,
        prompt=options.prompt,
        image=options.image,
        audio=options.audio,
        wav2vec=options.wav2vec,
    )
    print(f"device: {devices.core.name}; {given.origin}")
    with Progress(disable=not on_terminal()) as bar:
        task = bar.add_task("blocks", total=None)
        result = calibrate(
            options.directory,
            devices.core,
            given,
            threshold=options.threshold,
            seed=options.seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    with whole_file(options.out) as partial:
        partial.write_text(result.policy.text(), encoding="utf-8")
    Console().print(tables(result))
    print(f"{options.out}: {result.policy}")


@dataclass
class Calibration:
    """What was found.

    Attributes:
        policy: what follows.
        velocity: per block, errors of the velocity over all three steps.
    """

    policy: PrecisionPolicy
    velocity: list[dict[str, float]] = field(default_factory=list)


# --------------------------------------------------------------------------------- measuring


def calibrate(
    checkpoint: Path,
    device: _core.Device,
    given: Conditioning,
    *,
    threshold: float = THRESHOLD,
    seed: int = 42,
    progress: Report | None = None,
) -> Calibration:
    """Measures as many blocks as `given` has audio for. Raises InputError.

    threshold: the largest relative error of one product that still becomes fp8.
    """
    exact = device.name == "cpu"
    blocks = len(given.audio)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, (3 if exact else 2) * blocks)

    def run(precision: Precision) -> Velocities:
        return _velocities(Dit.load(checkpoint, device, precision), given, seed, step)

    measuring = _core.CalibrationDevice(device)
    dit = Dit.load(checkpoint, measuring, "bf16")
    measuring.watch(dit.model)
    wide = _velocities(dit, given, seed, step)
    layers = tuple(_choose(sums, threshold) for sums in measuring.errors())
    del dit, measuring  # before the next model takes its room
    narrow = run(PrecisionPolicy(layers))
    found = {"policy - bf16": (narrow, wide)}
    if exact:
        full = run("fp32")
        found |= {"policy - fp32": (narrow, full), "bf16 - fp32": (wide, full)}
    velocity = [
        {name: _relative(a[block], b[block]) for name, (a, b) in found.items()}
        for block in range(blocks)
    ]
    measured = {
        "by": f"liveact-engine {version('liveact-engine')}",
        "device": device.name,
        "conditioning": given.origin,
        "latent_size": list(given.y.shape[2:]),
        "blocks": blocks,
        "seed": seed,
        "threshold": threshold,
        "velocity": [
            {name: float(f"{error:.3g}") for name, error in errors.items()} for errors in velocity
        ],
    }
    return Calibration(PrecisionPolicy(layers, "calibrated", measured), velocity)


def _velocities(dit: Dit, given: Conditioning, seed: int, step: Callable[[], None]) -> Velocities:
    """[steps, out_dim, n, h, w] of every block."""
    generator = torch.Generator().manual_seed(seed)
    h, w = given.y.shape[2:]
    stream = dit.open_stream((h, w), image_tokens=len(given.image))
    stream.set_image(given.image, given.y)
    stream.set_prompt(given.text)
    results = []
    for rows in given.audio:
        shape = stream.latent_shape
        noise = torch.randn(STEPS, *shape, generator=generator)
        velocities = np.zeros((STEPS, *shape), np.float32)
        stream.denoise(noise[0], noise[1:], rows, velocities=velocities)
        results.append(velocities)
        step()
    stream.close()
    return results


def _choose(sums: dict[str, list[tuple[float, float]]], threshold: float) -> dict[str, Choice]:
    """sums: ‖fp8 − bf16‖² and ‖bf16‖² of each linear of a product; the worst of them counts."""
    result = {}
    for product in PRODUCTS:
        errors = [math.sqrt(d / r) if r > 0 else math.nan for d, r in sums[product]]
        limit = math.sqrt(2) * threshold if product == "attention" else threshold
        # NaN is no error that is within a limit: nothing ran, or fp8 has no value for it.
        narrow = all(error <= limit for error in errors)
        known = max(errors) if all(math.isfinite(error) for error in errors) else None
        result[product] = Choice("fp8" if narrow else "bf16", known)
    return result


def _relative(a: Array, b: Array) -> float:
    wide = b.astype(np.float64)
    return float(np.linalg.norm(a - wide) / np.linalg.norm(wide))


# -------------------------------------------------------------------------------- reporting


def tables(calibration: Calibration) -> Group:
    """What `liveact calibrate` prints."""
    layers = calibration.policy.layers
    products = Table(title="fp8 against bf16, one product at a time", title_justify="left")
    for column in ("product", "median", "worst", "in layer", "layers in fp8"):
        products.add_column(column, justify="left" if column == "product" else "right")
    for product in PRODUCTS:
        errors = {i: layer[product].error for i, layer in enumerate(layers)}
        known = {i: error for i, error in errors.items() if error is not None}
        worst = max(known, key=lambda i: known[i], default=None)
        products.add_row(
            product,
            f"{median(known.values()):.2%}" if known else "not measured",
            "" if worst is None else f"{known[worst]:.2%}",
            "" if worst is None else str(worst),
            f"{sum(layer[product].format == 'fp8' for layer in layers)} of {len(layers)}",
        )
    velocity = Table(title="velocity with the whole policy", title_justify="left")
    velocity.add_column("block", justify="right")
    for name in calibration.velocity[0]:
        velocity.add_column(name, justify="right")
    for block, found in enumerate(calibration.velocity):
        velocity.add_row(str(block), *(f"{error:.2%}" for error in found.values()))
    return Group(products, velocity)


def check_arguments(size: tuple[int, int], blocks: int, threshold: float) -> None:
    """Raises InputError before anything is loaded."""
    check_size(*size)
    if not 0 < threshold <= 1:
        raise InputError(f"threshold: expected more than 0 and at most 1, found {threshold}")
    if not 1 <= blocks <= _MAX_BLOCKS:
        raise InputError(f"blocks: expected 1 to {_MAX_BLOCKS}, found {blocks}")
