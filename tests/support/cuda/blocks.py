"""Blocks of the small DiT on the fake driver, and what they called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from liveact import _core
from liveact.dit.dit import Dit, DitStream, MemoryPolicy
from liveact.dit.precision import Precision
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import AUDIO_DIM, IMAGE_DIM, core_config

NUM_LAYERS = 2
LATENT = (6, 8)  # F = 12


def open_device(fake: FakeCuda, images: list[_core.KernelImage], index: int = 0) -> _core.Device:
    return _core.open_cuda(index, images, fake.path, fake.path)


def open_stream(
    device: _core.Device | Sequence[_core.Device],
    weights: dict[str, torch.Tensor],
    precision: Precision = "fp8",
    guidance: float = 1.0,
) -> DitStream:
    dit = Dit(device, core_config(NUM_LAYERS), weights, precision)
    stream = dit.open_stream(LATENT, MemoryPolicy(), guidance, 4)
    condition(stream)
    return stream


def set_image(stream: DitStream) -> None:
    stream.set_image(torch.randn(4, IMAGE_DIM), torch.randn(20, 14, *LATENT))


def set_prompt(stream: DitStream) -> None:
    stream.set_prompt(torch.randn(5, 64))


def condition(stream: DitStream) -> None:
    set_image(stream)
    set_prompt(stream)


def denoise(stream: DitStream) -> torch.Tensor:
    shape = (16, stream.frames_of_next_block, *LATENT)
    rows = torch.zeros(stream.audio_rows_of_next_block, AUDIO_DIM)
    return stream.denoise(torch.randn(shape), torch.randn(2, *shape), rows)


def calls(log: list[str]) -> Counter[str]:
    return Counter(line.split()[0] for line in log)


def launched(log: list[str]) -> Counter[str]:
    """Launches by kernel."""
    return Counter(line.split()[1] for line in log if line.startswith("cuLaunchKernel "))
