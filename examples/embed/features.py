"""Encodes a prompt, a portrait and speech into the files that embed.cpp reads.

    python examples/embed/features.py examples/talker out/features --image examples/portrait.png \
        --audio examples/speech.wav --prompt "A person is speaking." --size 128x128 --blocks 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from liveact import _core
from liveact.blocks import RELEASED_CLOCK, latent_size
from liveact.commands.conditioning import conditioning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--audio", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    config, _ = _core.open_dit(options.checkpoint)
    width, height = map(int, options.size.split("x"))
    found = conditioning(
        options.checkpoint,
        config,
        (width, height),
        options.blocks,
        options.seed,
        prompt=options.prompt,
        image=options.image,
        audio=options.audio,
    )
    generator = torch.Generator().manual_seed(options.seed)
    h, w = latent_size((width, height))
    frames = [RELEASED_CLOCK.latent_frames(block) for block in range(options.blocks)]
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in {
        "prompt": [found.text],
        "portrait": [found.image],
        "condition": [found.y],
        "audio": found.audio,
        # noise and the fresh noise of the two later steps
        "noise": [torch.randn(3, config.out_dim, n, h, w, generator=generator) for n in frames],
    }.items():
        flat = torch.cat([tensor.float().flatten() for tensor in tensors])
        flat.numpy().astype("<f4").tofile(options.folder / f"{name}.f32")


if __name__ == "__main__":
    main()
