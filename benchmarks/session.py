"""A session as its viewer sees it: speech in at the pace it is spoken, chunks out, to the clock.

`--pace live` pushes 20 ms of audio every 20 ms, as a microphone does, and answers: when does the
first picture come, how evenly do the others follow, would a player with a small buffer freeze.
`--pace off` pushes as fast as the session takes it and answers how fast it could go, and whether an
hour (`--minutes 60`) holds as much memory at its end as at its beginning.
"""

from __future__ import annotations

import argparse
import gc
import resource
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import models, playback, spread
from benchmarks.options import add_model
from benchmarks.playback import Arrival
from liveact.dit.dit import STEPS, MemoryPolicy
from liveact.engine import Engine
from liveact.errors import InputError, SessionError
from liveact.session.chunk import BlockTimings, Chunk
from liveact.session.session import Session

RATE_HZ = 16_000
PIECE_S = 0.02
BLOCK_FRAMES = 32
STEADY_BLOCK = 3  # the memory is full and every graph is captured
BUFFERS_S = (0.0, 0.5, 1.0, 2.0)
FPS = 20
PORTRAIT = Path(__file__).resolve().parent.parent / "examples" / "portrait.png"

_FIRST = {"open_s": float, "first_chunk_s": float}
FIELDS: dict[str, Any] = {
    "pace": str,
    "minutes": float,
    "fps": int,
    "blocks": int,
    "time_to_first_chunk": {"cold": {"load_s": float, **_FIRST}, "warm": _FIRST},
    "chunk_interval_ms": spread.FIELDS | {"p95": float, "p99": float},
    "block_period_ms": spread.FIELDS | {"p99": float},
    "speech_to_picture_s": (dict, type(None)),
    "playback": [playback.FIELDS],
    "real_time_factor": float,
    "frames_per_second": float,
    "stages_ms": dict,
    "overlap": float,
    "memory": {
        "rss_bytes": [int],
        "device_bytes": [int],
        "growth_bytes_per_block": float,
        "flat": bool,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--minutes", type=float, default=0.5, help="of speech (default 0.5)")
    parser.add_argument("--pace", choices=("live", "off"), default="live")
    parser.set_defaults(repeat=1)


class Feeder(threading.Thread):
    """Pushes speech into a session, 20 ms at a time."""

    def __init__(self, session: Session, seconds: float, live: bool, seed: int) -> None:
        super().__init__(name="feeder", daemon=True)
        self._session, self._live = session, live
        self._pieces = max(1, round(seconds / PIECE_S))
        self._random = np.random.default_rng(seed)
        self.started_s = time.perf_counter()

    def run(self) -> None:
        samples = round(RATE_HZ * PIECE_S)
        try:
            for piece in range(self._pieces):
                if self._live:  # a piece is there when it has been spoken
                    due_s = self.started_s + (piece + 1) * PIECE_S
                    time.sleep(max(0.0, due_s - time.perf_counter()))
                pcm = 0.1 * self._random.standard_normal(samples, np.float32)
                self._session.push_audio(pcm, RATE_HZ, timeout_s=None)
            self._session.end_of_audio()
        except SessionError:
            pass  # it reaches whoever iterates


def resident_bytes() -> int:
    """Of this process, now; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def slope(values: Sequence[float]) -> float:
    """Growth per index: the median of pairs half a run apart, which single jumps do not move."""
    half = len(values) // 2
    if half == 0:
        return 0.0
    return spread.percentile(
        [(values[i + half] - values[i]) / half for i in range(len(values) - half)], 50
    )


class Recorder:
    """Takes the chunks of a session: arrivals, timings of whole blocks, memory at their ends."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.arrivals: list[Arrival] = []
        self.timings: list[BlockTimings] = []
        self.rss_bytes: list[int] = []
        self.device_bytes: list[int] = []

    def take(self, session: Session, see: Callable[[Chunk], None] | None = None) -> None:
        for chunk in session:
            now_s = time.perf_counter()
            if see is not None:
                see(chunk)
            self.arrivals.append(Arrival(now_s, chunk.pts, len(chunk.frames) / FPS, chunk.block))
            if chunk.timings.block is not None:
                self.timings.append(chunk.timings.block)
                self.rss_bytes.append(resident_bytes())
                held = self._engine.dit.device.allocated_bytes
                if self._engine.devices.vae_name != "cpu":
                    held += torch.cuda.memory_allocated(self._engine.devices.vae_torch_device)
                self.device_bytes.append(held)


def run(
    engine: Engine,
    seconds: float,
    *,
    live: bool,
    size: tuple[int, int],
    seed: int,
    trace: Path | None = None,
    see: Callable[[Chunk], None] | None = None,
) -> tuple[Recorder, float]:
    """One session; its chunks, and when its speech began (`time.perf_counter`).

    trace: as for `Engine.open_session`. see: called with every chunk as it arrives.
    """
    gc.collect()
    recorder = Recorder(engine)
    with _open(engine, size, seed, trace) as session:
        feeder = Feeder(session, seconds, live, seed)
        feeder.start()
        recorder.take(session, see)
        feeder.join()
    return recorder, feeder.started_s


def first_chunk(engine: Engine, *, live: bool, size: tuple[int, int], seed: int) -> Any:
    """Opens a session, speaks until the first chunk comes, closes it: _FIRST."""
    start_s = time.perf_counter()
    with _open(engine, size, seed) as session:
        opened_s = time.perf_counter()
        feeder = Feeder(session, 4.0, live, seed)
        feeder.start()
        next(session)
        now_s = time.perf_counter()
    feeder.join()
    return {"open_s": opened_s - start_s, "first_chunk_s": now_s - feeder.started_s}


def _open(engine: Engine, size: tuple[int, int], seed: int, trace: Path | None = None) -> Session:
    return engine.open_session(
        image=PORTRAIT, prompt="A person is speaking.", size=size, fps=FPS, seed=seed, trace=trace
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Cold first chunk, warm first chunk, then one session of `--minutes`."""
    seconds = 60 * options.minutes
    if not seconds * FPS > (STEADY_BLOCK + 2) * BLOCK_FRAMES:
        raise InputError(f"minutes: expected more than 0.14, found {options.minutes}")
    start_s = time.perf_counter()
    loaded = models.load(options)
    engine = models.open_engine(loaded)
    load_s = time.perf_counter() - start_s
    how: dict[str, Any] = {
        "live": options.pace == "live",
        "size": loaded.size,
        "seed": options.seed,
    }
    cold = {"load_s": load_s} | first_chunk(engine, **how)
    warm = first_chunk(engine, **how)
    recorder, started_s = run(engine, seconds, **how)
    weights = "read from files" if loaded.checkpoint else "drawn, not read from files"
    once = "" if loaded.checkpoint else "; text and image encoder (random features stand in)"
    return {
        "timed": "from audio pushed to pictures as uint8 RGB on the host: audio front end and "
        "encoder, denoising, VAE decoding, conversion, every queue between. "
        f"Cold: a process that has imported the engine and loads it first (weights {weights})",
        "not_timed": f"video encoding, network, importing Python modules{once}",
        **loaded.described(),
        "memory_policy": asdict(MemoryPolicy()),
        "pace": options.pace,
        "minutes": options.minutes,
        "fps": FPS,
        "time_to_first_chunk": {"cold": cold, "warm": warm},
        **evaluate(recorder, started_s if how["live"] else None, loaded.size),
    }


def evaluate(
    recorder: Recorder, live_since_s: float | None, size: tuple[int, int]
) -> dict[str, Any]:
    """What follows from the arrivals, timings and memory of one session."""
    arrivals, timings = recorder.arrivals, recorder.timings
    steady = timings[STEADY_BLOCK:]
    intervals = playback.intervals_ms(arrivals)
    periods = playback.block_periods_ms(arrivals, STEADY_BLOCK)
    stages = {
        "audio_ms": [t.audio_ms for t in steady],
        "denoise_ms": [t.denoise_ms for t in steady],
        **{f"step{i}_ms": [t.step_ms[i] for t in steady] for i in range(STEPS)},
        "block_decode_ms": [t.decode_ms for t in steady],
    }
    # The slower worker sets the pace; at a live pace both wait for the speaker, so periods do not
    # tell what they could do.
    work_ms = [max(t.audio_ms + t.denoise_ms, t.decode_ms) for t in steady]
    period_ms = spread.percentile(work_ms if live_since_s is not None else periods, 50)
    block_s = BLOCK_FRAMES / FPS
    growth = slope(recorder.rss_bytes[STEADY_BLOCK:])
    device = recorder.device_bytes[STEADY_BLOCK:]
    latency = None
    if live_since_s is not None:
        # A frame is complete when its last sample has been spoken.
        spoken = [a.arrived_s - live_since_s - a.pts_s - a.duration_s for a in arrivals]
        latency = spread.spread(spoken, 95, 99)
    return {
        "blocks": len(timings),
        "chunk_interval_ms": spread.spread(intervals, 95, 99),
        "block_period_ms": spread.spread(periods, 99),
        "speech_to_picture_s": latency,
        "playback": [playback.play(arrivals, buffer_s) for buffer_s in BUFFERS_S],
        "real_time_factor": period_ms / 1e3 / block_s,
        "frames_per_second": 1e3 * BLOCK_FRAMES / period_ms,
        "stages_ms": {name: spread.percentile(ms, 50) for name, ms in stages.items()},
        "overlap": sum(t.overlap_ms for t in steady) / max(sum(t.decode_ms for t in steady), 1e-9),
        "memory": {
            "rss_bytes": _thinned(recorder.rss_bytes),
            "device_bytes": _thinned(recorder.device_bytes),
            "growth_bytes_per_block": growth,
            # Whatever a session wrongly kept would be at least one picture a block.
            "flat": growth < 3 * size[0] * size[1] and device[-1] <= device[0],
        },
    }


def _thinned(values: list[int], kept: int = 240) -> list[int]:
    """At most `kept` of them, evenly: an hour is 2250 blocks."""
    every = -(-len(values) // kept)
    return values[::every]


def print_table(result: dict[str, Any], console: Console) -> None:
    first, interval = result["time_to_first_chunk"], result["chunk_interval_ms"]
    table = Table(title=f"A session of {result['minutes']:g} minutes", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    cold, warm = first["cold"], first["warm"]
    rows = [
        (
            "first chunk, cold",
            f"load {cold['load_s']:.2f} + open {cold['open_s']:.2f} + "
            f"{cold['first_chunk_s']:.2f} s of speech and work",
        ),
        ("first chunk, warm", f"open {warm['open_s']:.2f} + {warm['first_chunk_s']:.2f} s"),
        (
            "chunk to chunk",
            f"p50 {interval['median']:.0f}, p95 {interval['p95']:.0f}, "
            f"p99 {interval['p99']:.0f} ms",
        ),
        ("real-time factor", f"{result['real_time_factor']:.3f}"),
        ("frames per second, everything included", f"{result['frames_per_second']:.1f}"),
        ("decoding under denoising", f"{result['overlap']:.0%}"),
    ]
    if (latency := result["speech_to_picture_s"]) is not None:
        text = f"p50 {latency['median']:.2f}, p95 {latency['p95']:.2f}, p99 {latency['p99']:.2f} s"
        rows.append(("speech to picture", text))
    for play in result["playback"] if result["pace"] == "live" else []:
        rows.append(
            (
                f"a player with {play['buffer_s']:g} s of buffer",
                f"{play['deadline_attainment']:.1%} in time, {play['underruns']} underruns, "
                f"{play['stall_s']:.2f} s frozen",
            )
        )
    memory = result["memory"]
    rows.append(
        (
            "memory, host and device",
            f"{memory['rss_bytes'][-1] / 1e6:.0f} MB, {memory['device_bytes'][-1] / 1e6:.0f} MB, "
            f"{memory['growth_bytes_per_block'] / 1e3:+.1f} kB a block "
            f"({'flat' if memory['flat'] else 'GROWS'})",
        )
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    stages = ", ".join(f"{k.removesuffix('_ms')} {v:.1f}" for k, v in result["stages_ms"].items())
    console.print(f"median of a steady block, ms: {stages}")
    console.print(f"timed: {result['timed']}\nnot timed: {result['not_timed']}")
