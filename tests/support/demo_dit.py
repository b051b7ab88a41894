"""The DiT of the demo checkpoint: streams on it, blocks of them, precision policies for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from liveact import _core
from liveact.dit.dit import Dit, DitStream, MemoryPolicy
from liveact.dit.precision import PRODUCTS, Choice, Precision, PrecisionPolicy
from tests.support.pipeline import demo_checkpoint

AUDIO_DIM = 192
NUM_LAYERS = 2
ALL = [(layer, product) for layer in range(NUM_LAYERS) for product in PRODUCTS]


def open_stream(dit: Dit, side: int = 4, guidance: float = 1.0, seed: int = 0) -> DitStream:
    generator = torch.Generator().manual_seed(seed)
    stream = dit.open_stream((side, side), MemoryPolicy(), guidance)
    y = torch.randn(20, 14, side, side, generator=generator)
    stream.set_image(torch.randn(257, 64, generator=generator), y)
    stream.set_prompt(torch.randn(7, 64, generator=generator))
    return stream


def denoise(stream: DitStream, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 16, stream.frames_of_next_block, *stream.latent_size)
    noise = torch.randn(shape, generator=generator)
    rows = torch.randn(stream.audio_rows_of_next_block, AUDIO_DIM, generator=generator)
    return stream.denoise(noise[0], noise[1:], rows)


def policy(*narrow: tuple[int, str]) -> PrecisionPolicy:
    """bf16, but fp8 for these (layer, product)."""
    return PrecisionPolicy(
        tuple(
            {p: Choice("fp8" if (layer, p) in narrow else "bf16", 0.04) for p in PRODUCTS}
            for layer in range(NUM_LAYERS)
        )
    )


def two_blocks(precision: Precision, directory: Path | None = None) -> Tensor:
    """Of the demo checkpoint, or of one in its size."""
    dit = Dit.load(directory or demo_checkpoint(), _core.open_cpu(), precision)
    stream = open_stream(dit)
    return torch.cat([denoise(stream, block) for block in range(2)], dim=1)
