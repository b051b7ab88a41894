"""The streaming VAE decode of one block, beside the released way in plain PyTorch.

The clock runs from latents on the host to uint8 pictures on the host: 8 latent frames, 32 pictures.
The released way (reference/vae_stream.py) decodes 11 latent frames for the same 32 pictures. Both
run in this process, on the same weights and threads, block by block in turn, after one block each
that is not counted. On a GPU both are bf16; the released way then runs in channels-last memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks.machine import weights_hash
from benchmarks.options import picture_size, positive
from benchmarks.spread import FIELDS as SPREAD
from benchmarks.spread import median_ratio, spread
from benchmarks.timing import Clock
from liveact.blocks import SPATIAL_STRIDE
from liveact.checkpoint.layout import VAE_FILE
from liveact.checkpoint.random import random_vae
from liveact.checkpoint.tensors import PthTensors, load_pth
from liveact.device.devices import open_devices
from liveact.errors import LiveActError
from liveact.vae.ops import without_tf32
from liveact.vae.vae import Vae, VaeStream
from reference import VAEStream, to_uint8

LATENT_FRAMES, FIRST_LATENT_FRAMES = 8, 6
PICTURES = 4 * LATENT_FRAMES
# Of one output pixel: 2 · multiply-adds of all convolutions of the released decoder.
RELEASED_FLOP_PER_PIXEL = 8.5e6

FIELDS: dict[str, Any] = {
    "ms_per_block": float,
    "ms": SPREAD,
    "released_ms_per_block": float,
    "released_ms": SPREAD,
    "ratio_to_released": float,
    "first_pictures_ms": float,  # of a block: until its first 4·frames_per_call are on the host
    "frames_per_call": int,
    "sweep": [{"frames_per_call": int, "ms_per_block": float, "first_pictures_ms": float}],
    "psnr_db": (float, type(None)),  # of the first block against fp32; null where it is fp32
    "relative_difference": float,  # to the released way, first block, before rounding to uint8
    "state_bytes": int,
    "parameters": int,
    # Each shape of convolution as conv3d and as conv2d of three frames side by side.
    "convolutions": [{"shape": str, "count": int, "conv3d_tflops": float, "conv2d_tflops": float}],
    "endurance": {"blocks": int, "early_ms": float, "late_ms": float, "base_width": int},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=picture_size, metavar="WxH", help="default: 512x512 on CUDA")
    parser.add_argument("--checkpoint", type=Path, help="directory with Wan2.1_VAE.pth")
    parser.add_argument("--base-width", type=positive, default=96, help="of random weights")
    parser.add_argument("--frames-per-call", type=positive, default=1, help="latent frames at once")
    parser.add_argument("--endurance-blocks", type=positive, default=100)
    parser.set_defaults(repeat=2)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result of `python -m benchmarks vae`."""
    devices = open_devices(options.device, None, None)
    device = devices.vae_torch_device
    on_cpu = device.type == "cpu"
    width, height = size = options.size or ((64, 64) if on_cpu else (512, 512))
    latent_size = height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
    tensors, source = _weights(options)
    vae = Vae.from_tensors(tensors, device, devices.vae_launch)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    plain = VAEStream({name: _plain_form(tensors[name], device, dtype) for name in tensors})
    generator = torch.Generator().manual_seed(options.seed)
    count = FIRST_LATENT_FRAMES + LATENT_FRAMES * (1 + options.repeat)
    latents = torch.randn(16, count, *latent_size, generator=generator)
    first, *blocks = latents.split_with_sizes(
        [FIRST_LATENT_FRAMES, *[LATENT_FRAMES] * (1 + options.repeat)], dim=1
    )

    ours = vae.open_stream(options.frames_per_call)
    expected = plain.decode_block(first).float().cpu()
    found = torch.cat(list(ours.decode_video(first)), dim=1).cpu().clamp(-1, 1)
    times: dict[str, list[float]] = {"ours": [], "first": [], "released": []}
    for block in blocks:
        whole_ms, first_ms = _time_ours(ours, block)
        start = time.perf_counter()
        to_uint8(plain.decode_block(block))
        times["released"].append(1e3 * (time.perf_counter() - start))
        times["ours"].append(whole_ms)
        times["first"].append(first_ms)
    counted = {name: samples[1:] for name, samples in times.items()}
    sweep = [] if on_cpu else [_sweep(vae, n, blocks) for n in (1, 2, 4, 8)]
    return {
        "timed": "decode of one block: latents on the host to uint8 RGB on the host",
        "not_timed": "the DiT, encoders, loading, the first block",
        "device": devices.vae_name,
        "precision": "fp32" if on_cpu else "bf16",
        "memory_policy": None,
        "sizes": {"picture": list(size), "base_width": vae.base_width, "pictures": PICTURES},
        "weights": {"source": source, "sha256": weights_hash(tensors)},
        "ms_per_block": statistics.median(counted["ours"]),
        "ms": spread(counted["ours"]),
        "released_ms_per_block": statistics.median(counted["released"]),
        "released_ms": spread(counted["released"]),
        "ratio_to_released": median_ratio(counted["released"], counted["ours"]),
        "first_pictures_ms": statistics.median(counted["first"]),
        "frames_per_call": options.frames_per_call,
        "sweep": sweep,
        "psnr_db": None if on_cpu else _psnr_db(found, _in_fp32(tensors, device, first)),
        "relative_difference": ((found - expected).norm() / expected.norm()).item(),
        "state_bytes": ours.size_bytes,
        "parameters": vae.parameter_count,
        "convolutions": _convolutions(vae, latent_size, options.frames_per_call, dtype),
        "endurance": _endurance(vae, options, latent_size, on_cpu),
    }


def _weights(options: argparse.Namespace) -> tuple[PthTensors, str]:
    if options.checkpoint is not None:
        return load_pth(options.checkpoint / VAE_FILE), options.checkpoint.name
    drawn = random_vae(options.base_width, options.seed)
    source = f"random, base width {options.base_width}, seed {options.seed}"
    return PthTensors(drawn, Path("random")), source


def _plain_form(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensor.to(device, dtype)
    if device.type == "cuda" and tensor.dim() == 5:
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    return tensor


def _time_ours(decoder: VaeStream, block: torch.Tensor) -> tuple[float, float]:
    """Milliseconds for all pictures of a block, and until the first."""
    start = time.perf_counter()
    pieces = decoder.decode(block)
    next(pieces)
    first_ms = 1e3 * (time.perf_counter() - start)
    for _ in pieces:
        pass
    return 1e3 * (time.perf_counter() - start), first_ms


def _sweep(vae: Vae, frames_per_call: int, blocks: list[torch.Tensor]) -> dict[str, Any]:
    """The same blocks with another number of latent frames at a time, after two to warm up."""
    decoder = vae.open_stream(frames_per_call)
    times = [_time_ours(decoder, block) for block in [blocks[0]] * 3 + blocks][3:]
    whole, first = (statistics.median(column) for column in zip(*times, strict=True))
    return {"frames_per_call": frames_per_call, "ms_per_block": whole, "first_pictures_ms": first}


def _in_fp32(tensors: PthTensors, device: torch.device, latents: torch.Tensor) -> torch.Tensor:
    vae = Vae.from_tensors(tensors, device)
    with without_tf32():
        video = torch.cat(list(vae.open_stream().decode_video(latents)), dim=1)
    return video.cpu().clamp(-1, 1)


def _psnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of pictures in [−1, 1], whose peak-to-peak is 2."""
    error = (found - expected).square().mean().item()
    if error == 0:
        raise LiveActError("vae: expected bf16 to differ from fp32, found equal pictures")
    return 10 * torch.log10(torch.tensor(4.0 / error)).item()


def _convolutions(
    vae: Vae, latent_size: tuple[int, int], frames_per_call: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The rates of the 3×3×3 convolutions of a call, each shape once, in the two ways that torch
    offers: what the decoder runs on this device is one of them (liveact/vae/ops.py)."""
    device = vae.device
    clock = Clock(device)
    plan = vae.decoder.plan(frames_per_call, *latent_size)
    uses = [use for use in plan if use.conv.weight.shape[2:] == (3, 3, 3)]
    shapes = Counter((use.shape, tuple(use.conv.weight.shape)) for use in uses)
    rows = []
    for (window_shape, weight_shape), count in shapes.items():
        window = torch.randn(window_shape, device=device).to(dtype)
        weight = torch.randn(weight_shape, device=device).to(dtype)
        cubes = weight.contiguous(memory_format=torch.channels_last_3d)
        squares = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        frames = window_shape[0] - 2

        def conv3d(window: torch.Tensor = window, cubes: torch.Tensor = cubes) -> torch.Tensor:
            return F.conv3d(window.permute(3, 0, 1, 2).unsqueeze(0), cubes, padding=(0, 1, 1))

        def conv2d(
            window: torch.Tensor = window, squares: torch.Tensor = squares, frames: int = frames
        ) -> torch.Tensor:
            wide = torch.cat([window[i : i + frames] for i in range(3)], dim=3)
            return F.conv2d(wide.permute(0, 3, 1, 2), squares, padding=1)

        flop = 2 * weight.numel() * frames * window_shape[1] * window_shape[2]
        row: dict[str, Any] = {
            "shape": f"{frames}×{window_shape[1]}×{window_shape[2]}×{window_shape[3]}"
            f" → {weight_shape[0]}",
            "count": count,
        }
        for name, call in (("conv3d", conv3d), ("conv2d", conv2d)):
            ms = statistics.median(clock.samples_ms(call, 5, cold=False))
            row[f"{name}_tflops"] = flop / ms / 1e9
        rows.append(row)
    return rows


def _endurance(
    vae: Vae, options: argparse.Namespace, latent_size: tuple[int, int], on_cpu: bool
) -> dict[str, Any]:
    """First and last decile of the times of many blocks; on a CPU of a narrow decoder, whose time
    is all bookkeeping: what could grow."""
    blocks = options.endurance_blocks
    if on_cpu:
        vae = Vae.from_tensors(PthTensors(random_vae(8, 0), Path("random")), "cpu")
        latent_size = (4, 4)
    decoder = vae.open_stream(options.frames_per_call)
    latents = torch.randn(16, LATENT_FRAMES, *latent_size)
    samples = [_time_ours(decoder, latents)[0] for _ in range(blocks + 3)][3:]
    part = max(1, blocks // 10)
    return {
        "blocks": blocks,
        "early_ms": statistics.median(samples[:part]),
        "late_ms": statistics.median(samples[-part:]),
        "base_width": vae.base_width,
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    width, height = result["sizes"]["picture"]
    base = result["sizes"]["base_width"]
    title = f"Decode of one block, {width}×{height}, base width {base}"
    table = Table(title=title, title_justify="left")
    for column in ("", "ms per block", "pictures per s", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        (f"liveact, {result['device']} {result['precision']}", result["ms_per_block"], "1.00"),
        (
            "released way, plain PyTorch",
            result["released_ms_per_block"],
            f"{result['ratio_to_released']:.2f}",
        ),
    )
    for name, ms, ratio in rows:
        table.add_row(name, f"{ms:.1f}", f"{1e3 * PICTURES / ms:.1f}", ratio)
    console.print(table)
    for row in result["sweep"]:
        console.print(
            f"{row['frames_per_call']} latent frames at a time: {row['ms_per_block']:.1f} ms, "
            f"first pictures after {row['first_pictures_ms']:.1f} ms"
        )
    flop = RELEASED_FLOP_PER_PIXEL * width * height * PICTURES * (base / 96) ** 2
    console.print(
        f"about {flop / result['ms_per_block'] / 1e9:.2f} TFLOP/s; first pictures after "
        f"{result['first_pictures_ms']:.1f} ms; state {result['state_bytes'] / 2**20:.1f} MiB"
    )
    if result["psnr_db"] is not None:
        console.print(f"PSNR against fp32: {result['psnr_db']:.1f} dB")
    for row in result["convolutions"]:
        console.print(
            f"{row['count']} × {row['shape']}: {row['conv3d_tflops']:.2f} TFLOP/s as conv3d, "
            f"{row['conv2d_tflops']:.2f} as conv2d"
        )
    endurance = result["endurance"]
    console.print(
        f"{endurance['blocks']} blocks at base width {endurance['base_width']}: "
        f"{endurance['early_ms']:.1f} ms at the start, {endurance['late_ms']:.1f} at the end"
    )
    console.print(f"timed: {result['timed']}; not timed: {result['not_timed']}")
