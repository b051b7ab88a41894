"""The recorded DiT on any device: its weights, a stream with its conditioning, its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from liveact import _core
from liveact.blocks import audio_rows
from liveact.device import kernels
from liveact.device.devices import cublaslt_library
from liveact.dit.dit import Dit, DitStream, MemoryPolicy
from liveact.dit.weights import open_weights


def open_cuda(index: int = 0) -> _core.Device:
    images = kernels.load(_core.cuda_architecture(index))
    return _core.open_cuda(index, images, cublaslt=cublaslt_library())


def load_dit(golden: Path, devices: _core.Device | Sequence[_core.Device], precision: str) -> Dit:
    config, tensors = open_weights(golden / "dit")
    return Dit(devices, config, tensors, precision)


def open_stream(dit: Dit, recorded: dict[str, torch.Tensor], **options: Any) -> DitStream:
    y = recorded["y"][0]
    stream = dit.open_stream(
        (y.shape[2], y.shape[3]), MemoryPolicy(), image_tokens=recorded["clip"].shape[1], **options
    )
    stream.set_image(recorded["clip"][0], y)
    stream.set_prompt(recorded["text"])
    return stream


def denoise(stream: DitStream, recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    """The next block; blocks past the recording repeat its last one."""
    block = stream.next_block
    source = min(block, 4)
    renoise = torch.stack([recorded[f"renoise.{source}.{i}"] for i in range(2)])
    rows = audio_rows(recorded["audio"], source)
    return stream.denoise(recorded[f"noise.{source}"], renoise, rows)
