"""`liveact calibrate`: what FP8 costs each product of a checkpoint, and the policy that follows.

The DiT runs some blocks in bf16. Beside every product of a layer, and every self-attention, the
same is done in fp8 on the same activations (csrc/measure); the error is ‖fp8 − bf16‖ / ‖bf16‖
over all steps and blocks. A product is fp8 in the policy where its error is at most the threshold,
self-attention where it is at most √2 times that: it is two products, whose errors add in squares.
Then the blocks run again with the whole policy, and in fp32 on a CPU, for the error of the velocity
that all choices make together.

Activations depend on what the session is about. The prompt, image and speech that are given go
through the checkpoint's own encoders; for what is not given there are random features that look
alike: of unit variance, those of the speech smooth in time.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from liveact import _core
from liveact.audio import AudioFrontEnd, block_feature_range, exact_fps
from liveact.dit import RELEASED_SLOTS, STEPS, Dit
from liveact.encoders import AudioEncoder, ImageEncoder, TextEncoder
from liveact.engine import VAE_FILE, WAV2VEC_DIRECTORY, condition_on
from liveact.errors import InputError
from liveact.media import check_size, open_audio, read_image
from liveact.precision import PRODUCTS, Choice, Precision, PrecisionPolicy
from liveact.vae import SPATIAL_STRIDE, WanVAE

# Rounding to 3 mantissa bits costs a product of well-behaved operands 3.8 % (docs/precision.md).
THRESHOLD = 0.05
BLOCKS = 3  # the third is the first whose context was compressed
FPS = 20.0
_TEXT_TOKENS = 20
_IMAGE_TOKENS = 257
_MAX_BLOCKS = 1000

Array = np.ndarray[Any, np.dtype[np.float32]]
Velocities = list[Array]
# (evaluated blocks, blocks in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conditioning:
    """What the DiT of a session is given.

    text [tokens, text_dim]; image [tokens, image_dim]; y [in_dim − out_dim, frames, h, w]; audio
    one [25 or 36, audio_dim] per block. origin: what of it was encoded and what is random.
    """

    text: Tensor
    image: Tensor
    y: Tensor
    audio: list[Tensor]
    origin: str


@dataclass
class Calibration:
    """policy: what follows. velocity: per block, errors of the velocity over all three steps."""

    policy: PrecisionPolicy
    velocity: list[dict[str, float]] = field(default_factory=list)


# -------------------------------------------------------------------------------- conditioning


def conditioning(
    checkpoint: Path,
    config: _core.ModelConfig,
    size: tuple[int, int],
    blocks: int,
    seed: int,
    *,
    prompt: str | None = None,
    image: Path | None = None,
    audio: Path | None = None,
    wav2vec: Path | None = None,
) -> Conditioning:
    """Encodes what is given (on the CPU: it is done once), and draws the rest.

    size: width and height of the picture. Raises InputError for bad files, or audio too short.
    """
    generator = torch.Generator().manual_seed(seed)
    if prompt is not None:
        text = TextEncoder.load(checkpoint).encode(prompt, config.text_len)
    else:
        tokens = min(_TEXT_TOKENS, config.text_len)
        text = torch.randn(tokens, config.text_dim, generator=generator)
    if image is not None:
        picture = read_image(image, size)
        features = ImageEncoder.load(checkpoint).encode(picture[None])[0]
        y = condition_on(WanVAE.load(checkpoint / VAE_FILE), picture)
    else:
        features = torch.randn(_IMAGE_TOKENS, config.image_dim, generator=generator)
        y = _random_y(config, size, generator)
    if audio is not None:
        rows = _encode_audio(audio, wav2vec or checkpoint / WAV2VEC_DIRECTORY, blocks)
    else:
        rows = _random_audio(config, blocks, generator)
    given = {"prompt": prompt, "image": image, "audio": audio}
    encoded = [name for name, value in given.items() if value is not None]
    random = [name for name, value in given.items() if value is None]
    parts = [(encoded, "encoded"), (random, "random")]
    origin = "; ".join(f"{', '.join(names)}: {how}" for names, how in parts if names)
    return Conditioning(text, features, y, rows, origin)


def _random_y(
    config: _core.ModelConfig, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """As of an image: the mask of the first latent frame; one picture, then one grey for all."""
    channels = config.in_dim - config.out_dim
    frames = sum(RELEASED_SLOTS)
    width, height = (n // SPATIAL_STRIDE for n in size)
    mask_channels = min(4, channels - 1)
    y = torch.zeros(channels, frames, height, width)
    y[:mask_channels, 0] = 1.0
    grey = torch.randn(channels - mask_channels, 1, 1, 1, generator=generator)
    y[mask_channels:] = grey
    y[mask_channels:, 0] = torch.randn(channels - mask_channels, height, width, generator=generator)
    return y


def _random_audio(
    config: _core.ModelConfig, blocks: int, generator: torch.Generator
) -> list[Tensor]:
    """Five new values a second, as syllables are, with the features between them interpolated."""
    last = block_feature_range(blocks - 1)[1]
    count = last + 3  # from feature −2 on
    points = torch.randn(1, config.audio_dim, count // 5 + 2, generator=generator)
    smooth = F.interpolate(points, size=count, mode="linear", align_corners=True)[0].T
    features = smooth / smooth.std()
    ranges = [block_feature_range(block) for block in range(blocks)]
    return [features[first + 2 : stop + 3] for first, stop in ranges]


def _encode_audio(path: Path, wav2vec: Path, blocks: int) -> list[Tensor]:
    file = open_audio(path)
    front_end = AudioFrontEnd(AudioEncoder.load(wav2vec), exact_fps(FPS))
    needed_s = (32 * blocks + 8) / FPS  # the last window looks two video frames ahead
    pushed = 0
    for piece in file:
        front_end.push(piece, file.sample_rate_hz)
        pushed += len(piece)
        if pushed >= needed_s * file.sample_rate_hz:
            break
    front_end.end()
    found = front_end.num_blocks() or 0
    if found < blocks:
        raise InputError(f"{path}: expected audio for {blocks} blocks, found {found}")
    return [front_end.block_features(block).flatten(1) for block in range(blocks)]


# --------------------------------------------------------------------------------- measuring


def calibrate(
    checkpoint: Path,
    device: _core.Device,
    given: Conditioning,
    *,
    threshold: float = THRESHOLD,
    seed: int = 42,
    progress: Progress | None = None,
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
        shape = (dit.config.out_dim, stream.frames_of_next_block, h, w)
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


def write_policy(path: Path, policy: PrecisionPolicy) -> None:
    """The file appears complete or not at all. Raises InputError."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(policy.text(), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def check_arguments(size: tuple[int, int], blocks: int, threshold: float) -> None:
    """Raises InputError before anything is loaded."""
    check_size(*size)
    if not 0 < threshold <= 1:
        raise InputError(f"threshold: expected more than 0 and at most 1, got {threshold}")
    if not 1 <= blocks <= _MAX_BLOCKS:
        raise InputError(f"blocks: expected 1 to {_MAX_BLOCKS}, got {blocks}")
