"""One block in steady state: by stage, as a share of the hardware, and beside plain PyTorch.

On a CPU the engine and the baseline (benchmarks/baseline.py) denoise the same blocks of the same
weights in turn, so what the machine does meanwhile happens to both. On a GPU they do not fit beside
each other: the engine is timed alone here, and `python -m benchmarks plain` times a variant of the
baseline on the same weights in a process of its own. Steady state is block 3: the memory is full
since block 2, and on a GPU the graphs of all steps have been captured. Then a session runs without
pace, for the stages round the DiT and what overlaps.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks import flops, models, op_groups, peaks, session, spread
from benchmarks.baseline import Baselines
from benchmarks.models import IMAGE_TOKENS, PROMPT_TOKENS, Loaded
from benchmarks.options import add_model
from benchmarks.timing import Clock
from liveact.blocks import TEMPORAL_STRIDE, audio_rows
from liveact.dit.dit import DitStream, MemoryPolicy
from liveact.engine import Engine
from liveact.vae.queue import DecodeQueue
from liveact.vae.vae import Vae

FIRST_STEADY_BLOCK = 3
VIDEO_FRAMES = 32
PARTS = ("conditioning", "step_0", "step_1", "step_2", "copies_and_check")

FIELDS: dict[str, Any] = {
    "ms_per_block": spread.FIELDS,
    "baselines": [{"name": str, "ms_per_block": spread.FIELDS, "ratio": float}],
    "missing": dict,  # baselines that did not work -> why
    # Of the fastest baseline, and of the first one's latents; null without one.
    "ratio_to_plain_torch": (float, type(None)),
    "relative_difference": (float, type(None)),
    "parts_ms": dict.fromkeys(PARTS, float),
    "ops": [{"op": str, "calls": int, "ms": float, "total_ms": float}],
    "pipeline": {
        "stages_ms": dict,
        "block_period_ms": float,
        "overlap": float,
        "frames_per_second": float,
        "decode_alone_ms": float,
        # On a GPU: the same where the decode of a block goes before the denoise of the next.
        "decode_first_period_ms": (float, type(None)),
    },
    "tflop": dict,  # group of products -> TFLOP of a block
    "tflop_per_frame": float,
    "tflop_per_frame_plain": float,
    "tflops": float,
    "peak": peaks.FIELDS,
    "peak_format": str,
    "mfu_measured": float,
    "mfu_datasheet": (float, type(None)),
    "memory_bytes": {"stream": int, "device": int, "process": int},
    # Two devices: `one_ms` (a spread), the same block on the first alone, in turn, and `ratio`, how
    # many times as long the two take. On CPUs they have the cores of one, so that is what the
    # split costs.
    "split": (dict, type(None)),
    "choices": dict,  # what the device chose by trial: call -> choice
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--latents", type=Path, help="on a GPU: write those of the first blocks here, for `plain`"
    )


def inputs(loaded: Loaded, blocks: int, slots: int = 14) -> dict[str, torch.Tensor]:
    """Random conditioning of the right shapes; one audio feature per video frame."""
    generator = torch.Generator().manual_seed(loaded.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {name: loaded.weights[name].shape for name in _WIDTHS}
    text_dim, clip_dim = (shapes[name][1] for name in _WIDTHS[:2])
    audio_dim = shapes[_WIDTHS[2]][1] // 8
    layers = loaded.model.features["audio_layers"] if loaded.model else 12
    return {
        "text": random(PROMPT_TOKENS, text_dim),
        "clip": random(IMAGE_TOKENS, clip_dim),
        "y": random(20, slots, *loaded.latent_size),
        "audio": random(VIDEO_FRAMES * blocks, layers, audio_dim // layers),
    }


_WIDTHS = ("text_embedding.0.weight", "img_emb.proj.1.weight", "audio_proj.proj1_vf.weight")


def open_stream(loaded: Loaded, given: dict[str, torch.Tensor], policy: MemoryPolicy) -> DitStream:
    """A stream with its image and prompt in place."""
    stream = loaded.dit.open_stream(loaded.latent_size, policy, 1.0, IMAGE_TOKENS)
    stream.set_image(given["clip"], given["y"])
    stream.set_prompt(given["text"])
    return stream


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Of the engine; on a CPU with the baseline in turn."""
    loaded = models.load(options)
    clock = Clock(loaded.devices.torch_device)
    if loaded.on_cpu:
        result = compare(loaded, options.repeat, clock)
    else:
        result = alone(loaded, options.repeat, clock, options.latents)
    # At once: whatever fails from here on, this was measured.
    took = result["ms_per_block"]
    print(f"{took['median']:.1f} ms per block ({took['p10']:.1f} to {took['p90']:.1f})", flush=True)
    formats = ("fp32",) if loaded.on_cpu else ("bf16", "fp8")
    peak = peaks.measure(clock, formats)
    torch.cuda.empty_cache()
    shape = flops.BlockShape(loaded.tokens_per_frame, prompt_tokens=PROMPT_TOKENS)
    audio_dim = int(loaded.dit.config.audio_dim)
    work = flops.engine_block(loaded.config, shape, audio_dim)
    plain = flops.plain_block(loaded.config, shape, audio_dim, int(loaded.dit.config.image_dim))
    tflops = sum(work.values()) / result["ms_per_block"]["median"] / 1e9
    chosen = str(loaded.devices.precision)
    fmt = chosen if chosen in peak["tflops"] else formats[-1]  # of a policy the faster of the two
    sheet = peak["datasheet"]
    ops = op_groups.measure(loaded, MemoryPolicy())
    result |= {
        "timed": "denoise of one steady block from noise and audio features on the host to the "
        "latent on the host: 3 steps, all layers, audio projection, copies. pipeline: a whole "
        "session without pace, audio encoder, VAE and conversion to uint8 included",
        "not_timed": "text and image encoder (once per session), opening the stream, video "
        "encoding, network",
        **loaded.described(),
        "memory_policy": asdict(MemoryPolicy()),
        "ops": [{**asdict(group), "total_ms": group.total_ms} for group in ops],
        "tflop": {name: count / 1e12 for name, count in work.items()},
        "tflop_per_frame": flops.tera_per_frame(work),
        "tflop_per_frame_plain": flops.tera_per_frame(plain),
        "tflops": tflops,
        "peak": peak,
        "peak_format": fmt,
        "mfu_measured": tflops / peak["tflops"][fmt],
        "mfu_datasheet": tflops / sheet[f"{fmt}_tflops"] if sheet else None,
        "choices": loaded.dit.device.choices,
        "split": split(loaded, options.repeat, clock) if len(loaded.dit.devices) == 2 else None,
        "pipeline": pipeline(loaded, options.repeat),
    }
    return result


class Blocks:
    """The blocks of a session by number, the same for everything that is timed on a seed."""

    def __init__(self, loaded: Loaded, given: dict[str, torch.Tensor]) -> None:
        self._size, self._audio = loaded.latent_size, given["audio"]
        self._generator = torch.Generator().manual_seed(loaded.seed)
        self._next = 0

    def next(self, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """noise [16, n, h, w], renoise [3, 16, n, h, w] and audio rows of the next block."""
        shape = (16, frames, *self._size)
        noise = torch.randn(shape, generator=self._generator)
        renoise = torch.randn((3, *shape), generator=self._generator)
        self._next += 1
        return noise, renoise, audio_rows(self._audio, self._next - 1)


def alone(loaded: Loaded, repeat: int, clock: Clock, latents: Path | None) -> dict[str, Any]:
    """The engine with nothing beside it. latents: where those of the first blocks go."""
    given = inputs(loaded, FIRST_STEADY_BLOCK + 1 + repeat)
    stream = open_stream(loaded, given, MemoryPolicy())
    blocks, kept = Blocks(loaded, given), {}
    engine_ms: list[float] = []
    parts: list[list[float]] = []
    for block in range(FIRST_STEADY_BLOCK + repeat):
        noise, renoise, rows = blocks.next(stream.frames_of_next_block)
        latent, ms = clock.block(stream.denoise, noise, renoise[:2], rows)
        if block < FIRST_STEADY_BLOCK:
            kept[f"latent.{block}"] = latent
        else:
            engine_ms.append(ms)
            parts.append(parts_of(stream, ms))
    if latents is not None:
        save_file(kept, latents)
    none: dict[str, Any] = {"baselines": [], "missing": {}}
    none |= {"ratio_to_plain_torch": None, "relative_difference": None}
    return none | timed(loaded, stream, engine_ms, parts)


def parts_of(stream: DitStream, ms: float) -> list[float]:
    """What PARTS are of the last block, which took `ms`."""
    inside = [stream.timings["conditioning_ms"], *stream.timings["step_ms"]]
    return [*inside, ms - sum(inside)]


def timed(
    loaded: Loaded, stream: DitStream, engine_ms: list[float], parts: list[list[float]]
) -> dict[str, Any]:
    columns = zip(*parts, strict=True)
    return {
        "ms_per_block": spread.spread(engine_ms),
        "parts_ms": {n: spread.percentile(c, 50) for n, c in zip(PARTS, columns, strict=True)},
        "memory_bytes": {
            "stream": stream.device_bytes,
            "device": sum(device.allocated_bytes for device in loaded.dit.devices),
            "process": session.resident_bytes(),
        },
    }


def compare(loaded: Loaded, repeat: int, clock: Clock) -> dict[str, Any]:
    """The engine and the baselines, block by block in turn.

    Up to block 2 the first baseline goes alone beside the engine, and their latents are compared.
    Where there are more, each runs once untimed in block 3 (it may compile). Then the clock runs.
    """
    given = inputs(loaded, FIRST_STEADY_BLOCK + 1 + repeat)
    stream = open_stream(loaded, given, MemoryPolicy())
    baselines = Baselines(loaded, **given)
    first_timed = FIRST_STEADY_BLOCK + (len(baselines.models) > 1)
    blocks = Blocks(loaded, given)
    engine_ms: list[float] = []
    parts: list[list[float]] = []
    baseline_ms: dict[str, list[float]] = {name: [] for name in baselines.models}
    difference = 0.0
    for block in range(first_timed + repeat):
        noise, renoise, rows = blocks.next(stream.frames_of_next_block)
        latent, ms = clock.block(stream.denoise, noise, renoise[:2], rows)
        if block >= first_timed:
            engine_ms.append(ms)
            parts.append(parts_of(stream, ms))
        for name in list(baselines.models)[: None if block >= FIRST_STEADY_BLOCK else 1]:
            baselines.stream.block = block
            expected, ms = clock.block(baselines.denoise, name, noise, renoise)
            if block >= first_timed:
                baseline_ms[name].append(ms)
            elif block < FIRST_STEADY_BLOCK and expected is not None:
                expected = expected.cpu()
                difference = ((latent - expected).norm() / expected.norm()).item()
    compared: list[dict[str, Any]] = [
        {
            "name": name,
            "ms_per_block": spread.spread(times),
            "ratio": spread.median_ratio(times, engine_ms),
        }
        for name, times in baseline_ms.items()
        if name not in baselines.missing
    ]
    return {
        "baselines": compared,
        "missing": baselines.missing,
        # The best that a user gets without the engine.
        "ratio_to_plain_torch": min(row["ratio"] for row in compared),
        "relative_difference": difference,
        **timed(loaded, stream, engine_ms, parts),
    }


def split(loaded: Loaded, repeat: int, clock: Clock) -> dict[str, Any]:
    """Two devices beside the first one alone, block by block in turn."""
    given = inputs(loaded, FIRST_STEADY_BLOCK + 1 + repeat)
    dits = (loaded.dit, loaded.dit.on_first())
    times: tuple[list[float], ...] = ([], [])
    streams = [open_stream(replace(loaded, dit=dit), given, MemoryPolicy()) for dit in dits]
    blocks = Blocks(loaded, given)
    for block in range(FIRST_STEADY_BLOCK + repeat):
        noise, renoise, rows = blocks.next(streams[0].frames_of_next_block)
        for stream, found in zip(streams, times, strict=True):
            _, ms = clock.block(stream.denoise, noise, renoise[:2], rows)
            if block >= FIRST_STEADY_BLOCK:
                found.append(ms)
    return {"one_ms": spread.spread(times[1]), "ratio": spread.median_ratio(*times)}


def pipeline(loaded: Loaded, repeat: int) -> dict[str, Any]:
    """A session without pace: the stages round the DiT, what overlaps, and what would be gained by
    another order of the two that share a device."""
    engine = models.open_engine(loaded)
    evaluated = paced_by_itself(engine, loaded, repeat)
    decode_first = None
    if engine.vae.queue is not None:
        torch.cuda.empty_cache()  # what was freed on a stream is kept for it
        engine.vae.queue = DecodeQueue(engine.vae.device, before_denoise=True)
        decode_first = paced_by_itself(engine, loaded, repeat)["block_period_ms"]["median"]
        engine.vae.queue = DecodeQueue(engine.vae.device)
    return {
        "stages_ms": evaluated["stages_ms"],
        "overlap": evaluated["overlap"],
        "block_period_ms": evaluated["block_period_ms"]["median"],
        "frames_per_second": evaluated["frames_per_second"],
        "decode_alone_ms": decode_alone_ms(engine.vae, loaded, repeat),
        "decode_first_period_ms": decode_first,
    }


def paced_by_itself(engine: Engine, loaded: Loaded, repeat: int) -> dict[str, Any]:
    """`session.evaluate` of so many steady blocks, as fast as they come."""
    seconds = (session.STEADY_BLOCK + repeat) * session.BLOCK_FRAMES / session.FPS
    recorder, _ = session.run(engine, seconds, live=False, size=loaded.size, seed=loaded.seed)
    return session.evaluate(recorder, None, loaded.size)


def decode_alone_ms(vae: Vae, loaded: Loaded, repeat: int) -> float:
    """The median decode of a block with nothing beside it, after two to warm up and to record."""
    generator = torch.Generator().manual_seed(loaded.seed)
    frames = VIDEO_FRAMES // TEMPORAL_STRIDE
    latents = torch.randn((16, frames, *loaded.latent_size), generator=generator)
    decoder, times = vae.open_stream(), []
    for _ in range(2 + repeat):
        start_s = time.perf_counter()
        for _ in decoder.decode(latents):
            pass
        times.append(1e3 * (time.perf_counter() - start_s))
    decoder.close()
    return spread.percentile(times[2:], 50)


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title="One steady block of the DiT", title_justify="left")
    for column in ("", "ms per block", "p10 to p90", "ms per video frame", "times as long"):
        table.add_column(column, justify="left" if not column else "right")
    name = f"liveact, {result['device']} {result['precision']}"
    rows = [(name, result["ms_per_block"], 1.0)]
    rows += [(b["name"], b["ms_per_block"], b["ratio"]) for b in result["baselines"]]
    for name, ms, ratio in rows:
        between = f"{ms['p10']:.0f} to {ms['p90']:.0f}"
        frame = f"{ms['median'] / VIDEO_FRAMES:.1f}"
        table.add_row(name, f"{ms['median']:.0f}", between, frame, f"{ratio:.2f}")
    for name, reason in result["missing"].items():
        table.add_row(name, "failed", "", "", reason)
    console.print(table)
    if (two := result["split"]) is not None:
        one = two["one_ms"]["median"]
        console.print(
            f"on the first device alone: {one:.0f} ms; both take {two['ratio']:.3f} of it"
        )
    parts = result["parts_ms"]
    console.print("of it: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in parts.items()))
    ops = sum(op["total_ms"] for op in result["ops"])
    dearest = ", ".join(f"{o['op']} {o['total_ms']:.1f}" for o in result["ops"][:8])
    console.print(
        f"by op, each timed alone, ms: {dearest}, … ({ops:.0f} in all, "
        f"{ops / result['ms_per_block']['median']:.0%} of the block)"
    )
    run = result["pipeline"]
    stages = ", ".join(f"{k.removesuffix('_ms')} {v:.0f}" for k, v in run["stages_ms"].items())
    console.print(
        f"whole pipeline: {run['block_period_ms']:.0f} ms per block, "
        f"{run['frames_per_second']:.1f} frames per second, {run['overlap']:.0%} of the decoding "
        f"under denoising; stages, ms: {stages}"
    )
    one_by_one = result["ms_per_block"]["median"] + run["decode_alone_ms"]
    first = run["decode_first_period_ms"]
    console.print(
        f"denoise and decode ({run['decode_alone_ms']:.0f} ms alone) one after the other would "
        f"take {one_by_one:.0f} ms"
        + ("" if first is None else f"; the decode before the denoise: {first:.0f} ms")
    )
    sheet = result["mfu_datasheet"]
    console.print(
        f"{result['tflop_per_frame']:.3g} TFLOP per video frame (plain PyTorch computes "
        f"{result['tflop_per_frame_plain']:.3g}), {result['tflops']:.3g} TFLOP/s: "
        f"{result['mfu_measured']:.0%} of a {result['peak_format']} product measured here"
        + (f", {sheet:.0%} of the datasheet" if sheet is not None else "")
    )
    memory = ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in result["memory_bytes"].items())
    difference = result["relative_difference"]
    differ = "" if difference is None else f"; results differ by {difference:.1e}"
    console.print(f"memory: {memory}{differ}")
    for call, choice in result["choices"].items():
        console.print(f"chosen, {call}: {choice}")
    console.print(f"timed: {result['timed']}\nnot timed: {result['not_timed']}")
    machine = result["machine"]
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, load {machine['load']}, torch "
        f"{machine['versions']['torch']}; medians of {result['repeat']}, weights "
        f"{result['weights']['source']}"
    )
