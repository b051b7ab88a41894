"""Blocks of the small DiT on the fake driver, and what they called."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from liveact import _core
from liveact.dit.dit import Dit, DitStream, MemoryPolicy
from liveact.dit.precision import Precision
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import AUDIO_DIM, IMAGE_DIM, core_config

NUM_LAYERS = 2
LATENT = (6, 8)  # F = 12


def open_device(fake: FakeCuda, images: list[dict[str, Any]]) -> _core.Device:
    return _core.open_cuda(0, images, fake.path, fake.path)


def open_stream(
    device: _core.Device,
    weights: dict[str, torch.Tensor],
    precision: Precision = "fp8",
    guidance: float = 1.0,
) -> DitStream:
    dit = Dit(device, core_config(NUM_LAYERS), weights, precision)
    stream = dit.open_stream(LATENT, MemoryPolicy(), guidance, 4)
    stream.set_image(torch.randn(4, IMAGE_DIM), torch.randn(20, 14, *LATENT))
    stream.set_prompt(torch.randn(5, 64))
    return stream


def denoise(stream: DitStream) -> torch.Tensor:
    shape = (16, stream.frames_of_next_block, *LATENT)
    rows = torch.zeros(stream.audio_rows_of_next_block, AUDIO_DIM)
    return stream.denoise(torch.randn(shape), torch.randn(2, *shape), rows)


def calls(log: list[str]) -> Counter[str]:
    return Counter(line.split()[0] for line in log)


def launched(log: list[str]) -> Counter[str]:
    """Launches by kernel."""
    return Counter(line.split()[1] for line in log if line.startswith("cuLaunchKernel "))
