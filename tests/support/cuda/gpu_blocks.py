"""A few blocks of a tiny model on the GPU, for tools that watch a process.

    python -m tests.support.cuda.gpu_blocks BLOCKS

Exit code 1 where the result is not finite.
"""

from __future__ import annotations

import sys

import torch

from liveact import _core
from liveact.device import kernels
from liveact.device.devices import cublaslt_library
from liveact.dit.dit import Dit, MemoryPolicy
from tests.support.cuda.small import AUDIO_DIM, IMAGE_DIM, core_config, random_weights

LATENT = (6, 8)  # F = 12


def run(device: _core.Device, blocks: int) -> bool:
    """Whether every latent is finite."""
    torch.manual_seed(0)
    dit = Dit(device, core_config(1), random_weights(1), "fp8")
    stream = dit.open_stream(LATENT, MemoryPolicy(), 1.5, 4)
    stream.set_image(torch.randn(4, IMAGE_DIM), torch.randn(20, 14, *LATENT))
    stream.set_prompt(torch.randn(5, 64))
    finite = True
    for _ in range(blocks):
        shape = (16, stream.frames_of_next_block, *LATENT)
        rows = torch.randn(stream.audio_rows_of_next_block, AUDIO_DIM)
        latent = stream.denoise(torch.randn(shape), torch.randn(2, *shape), rows)
        finite = finite and bool(latent.isfinite().all())
    return finite


def main() -> int:
    images = kernels.load(_core.cuda_architecture(0))
    device = _core.open_cuda(0, images, cublaslt=cublaslt_library())
    return 0 if run(device, int(sys.argv[1])) else 1


if __name__ == "__main__":
    sys.exit(main())
