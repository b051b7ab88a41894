"""One block of the DiT in steady state, beside the same mathematics in plain PyTorch.

Both run in this process on the same weights, inputs and number of threads, block by block in turn.
Steady state starts with block 2, when the memory is full. What is timed is `denoise`: 3 steps, all
layers, and everything that follows from the block's audio; not the encoders, not the VAE, not
opening the stream (which makes the keys of text and image once; the plain version makes them at
every step, as the released code does).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import weights_hash
from benchmarks.plain_torch import PlainDiT, PlainStream
from liveact import _core
from liveact.demo_weights import random_checkpoint
from liveact.dit import PRECISIONS, Dit, MemoryPolicy, audio_rows
from liveact.errors import InputError

FIRST_STEADY_BLOCK = 2
VIDEO_FRAMES = 32

# A middle size: large enough that the products dominate, small enough for two CPU cores.
SIZES: dict[str, Any] = {
    "model_type": "i2v",
    "in_dim": 36,
    "out_dim": 16,
    "dim": 1024,
    "ffn_dim": 2816,
    "num_heads": 8,
    "num_layers": 4,
    "text_dim": 512,
    "text_len": 512,
    "freq_dim": 256,
    "intermediate_dim": 128,
    "output_dim": 768,
    "context_tokens": 32,
    "audio_window": 5,
    "vae_scale": 4,
    "patch_size": [1, 2, 2],
    "eps": 1e-6,
}
LATENT_SIZE = (32, 32)  # F = 256
PROMPT_TOKENS = 40
IMAGE_TOKENS, IMAGE_DIM = 257, 1280


def core_config(sizes: dict[str, Any]) -> _core.ModelConfig:
    """The runtime's configuration of the same sizes."""
    config = _core.ModelConfig()
    for key in set(sizes) & {name for name in dir(config) if not name.startswith("_")}:
        setattr(config, key, sizes[key])
    config.image_dim = IMAGE_DIM
    return config


FIELDS: dict[str, Any] = {
    "ms_per_block": float,
    "plain_torch_ms_per_block": float,
    "ratio_to_plain_torch": float,
    "relative_difference": float,
    "step_ms": [float],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times `repeat` steady blocks of both."""
    device, precision = options.device or "cpu", options.precision
    repeat, seed = options.repeat, options.seed
    if device != "cpu":
        raise InputError(f"device: expected cpu in this build, got {device}")
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = {name: t.float() for name, t in random_checkpoint(SIZES, seed).items()}
    h, w = LATENT_SIZE
    text, clip = random(PROMPT_TOKENS, SIZES["text_dim"]), random(IMAGE_TOKENS, IMAGE_DIM)
    y, audio = random(20, 14, h, w), random(32 * (FIRST_STEADY_BLOCK + repeat), 12, 768)

    dit = Dit(_core.open_cpu(), core_config(SIZES), weights, precision)
    ours = dit.open_stream(LATENT_SIZE, MemoryPolicy(), 1.0, IMAGE_TOKENS)
    ours.set_image(clip, y)
    ours.set_prompt(text)
    plain = PlainStream(PlainDiT(SIZES, weights), text=text, clip=clip, y=y, audio=audio)

    ms: dict[str, list[float]] = {"ours": [], "plain": []}
    difference = 0.0
    for block in range(FIRST_STEADY_BLOCK + repeat):
        n = ours.frames_of_next_block
        noise, renoise = random(16, n, h, w), random(3, 16, n, h, w)
        rows = audio_rows(audio, block, n)
        start = time.perf_counter()
        latent = ours.denoise(noise, renoise[:2], rows)
        middle = time.perf_counter()
        expected = plain.denoise(noise, list(renoise))
        stop = time.perf_counter()
        if block >= FIRST_STEADY_BLOCK:
            ms["ours"].append(1e3 * (middle - start))
            ms["plain"].append(1e3 * (stop - middle))
        difference = ((latent - expected).norm() / expected.norm()).item()
    ratios = [p / o for p, o in zip(ms["plain"], ms["ours"], strict=True)]
    return {
        "timed": "denoise of one steady block: 3 steps, all layers, audio projection",
        "not_timed": "audio, text and image encoders, VAE, opening the stream",
        "device": device,
        "precision": precision,
        "sizes": {k: SIZES[k] for k in ("dim", "ffn_dim", "num_heads", "num_layers")}
        | {"tokens_per_latent_frame": h * w // 4, "prompt_tokens": PROMPT_TOKENS},
        "memory_policy": asdict(MemoryPolicy()),
        "weights": {"source": f"random, seed {seed}", "sha256": weights_hash(weights)},
        "ms_per_block": statistics.median(ms["ours"]),
        "plain_torch_ms_per_block": statistics.median(ms["plain"]),
        "ratio_to_plain_torch": statistics.median(ratios),
        "relative_difference": difference,
        "step_ms": ours.timings["step_ms"],
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title="One steady block of the DiT", title_justify="left")
    for column in ("", "ms per block", "ms per video frame", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key, ratio in (
        (f"liveact, {result['device']} {result['precision']}", "ms_per_block", "1.00"),
        ("plain PyTorch fp32", "plain_torch_ms_per_block", f"{result['ratio_to_plain_torch']:.2f}"),
    ):
        ms = result[key]
        table.add_row(name, f"{ms:.0f}", f"{ms / VIDEO_FRAMES:.1f}", ratio)
    console.print(table)
    console.print(f"timed: {result['timed']}; not timed: {result['not_timed']}")
    machine = result["machine"]
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}; "
        f"median of {result['repeat']} block(s); results differ by "
        f"{result['relative_difference']:.1e}"
    )
