"""A long conversation as fast as it goes: is every utterance whole, and does memory stay flat?

Sentences, silences and interruptions at random alternate in one session until `--minutes` of sound
were pushed. What comes out is compared with what went in, sample by sample, and its frames are
counted; what was interrupted is compared as far as it came.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import models
from benchmarks.latency import FPS, PORTRAIT, RATE_HZ
from benchmarks.options import add_model
from benchmarks.session import resident_bytes, slope
from liveact.engine import Engine
from liveact.errors import LiveActError, SessionError
from liveact.session.chunk import Chunk
from liveact.session.session import Session

WARM = 50  # utterances before memory is looked at
VERDICTS = {True: "flat", False: "GROWS", None: "too short to tell"}
LATENT_FRAMES = 4  # an utterance ends with a whole latent frame of them

FIELDS: dict[str, Any] = {
    "minutes": float,
    "utterances": int,
    "interrupted": int,
    "silences": int,
    "blocks": int,
    "frames": int,
    "wall_s": float,
    "faults": [str],
    "memory": {
        "rss_bytes": [int],
        "device_bytes": [int],
        "growth_bytes_per_utterance": float,
        "flat": (bool, type(None)),  # null: too short to tell
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--minutes", type=float, default=1.0, help="of sound (default 1)")
    parser.set_defaults(repeat=1)


@dataclass
class Said:
    """An utterance, as it went in and as it comes out."""

    pcm: np.ndarray  # [n, 1]
    interrupted_after: int | None  # chunks of it that are taken first; None: said to its end

    def __post_init__(self) -> None:
        self.heard: list[np.ndarray] = []
        self.frames = 0
        self.ended = False

    def take(self, chunk: Chunk) -> None:
        """A chunk in which it speaks."""
        self.heard.append(chunk.pcm)
        self.frames += len(chunk.frames)
        self.ended = chunk.last_of_utterance

    def fault(self) -> str | None:
        """What is wrong with it; None where nothing is."""
        heard = np.concatenate([np.zeros((0, 1), np.float32), *self.heard])
        if abs(len(heard) - self.frames * RATE_HZ / FPS) > 1:
            return f"{self.frames} frames beside {len(heard)} samples"
        known = min(len(heard), len(self.pcm))
        if not np.array_equal(heard[:known], self.pcm[:known]) or heard[known:].any():
            return "other sound than was pushed"
        frames = math.ceil(len(self.pcm) * FPS / RATE_HZ)
        if self.interrupted_after is None and not (
            self.ended and frames <= self.frames < frames + LATENT_FRAMES
        ):
            return f"{self.frames} frames of {frames}, last of them {self.ended}"
        return None


class Conversation:
    """One session and all that was said in it."""

    def __init__(self, session: Session, seed: int) -> None:
        self._session = session
        self._random = np.random.default_rng(seed)
        self.utterances = self.interrupted = self.silences = self.blocks = self.frames = 0
        self.faults: list[str] = []

    def turn(self) -> float:
        """Says something, or nothing, and hears it to its end, or interrupts it; its seconds."""
        said = self._draw()
        number = self._session.stats().utterance
        pushing = threading.Thread(target=self._push, args=(said,), daemon=True)
        pushing.start()
        stop_after = math.inf if said.interrupted_after is None else said.interrupted_after
        taken = 0
        while taken < stop_after and not said.ended:
            chunk = self._session.next_chunk()
            assert chunk is not None
            self.frames += len(chunk.frames)
            self.blocks += chunk.last_of_block
            if chunk.speech:
                if chunk.utterance != number:
                    self.faults.append(f"utterance {number}: found a chunk of {chunk.utterance}")
                said.take(chunk)
                taken += 1
        if not said.ended:
            self._session.interrupt()
            self.interrupted += 1
        pushing.join()
        if (fault := said.fault()) is not None:
            self.faults.append(f"utterance {number}: {fault}")
        self.utterances += 1
        return len(said.pcm) / RATE_HZ

    def _draw(self) -> Said:
        seconds = self._random.uniform(0.1, 8.0)
        count = round(seconds * RATE_HZ)
        kind = self._random.choice(("speech", "silence", "interrupted"), p=(0.5, 0.2, 0.3))
        pcm = np.zeros((count, 1), np.float32)
        if kind == "silence":
            self.silences += 1
        else:
            pcm += 0.1 * self._random.standard_normal((count, 1), np.float32)
        chunks = int(self._random.integers(1, 20)) if kind == "interrupted" else None
        return Said(pcm, chunks)

    def _push(self, said: Said) -> None:
        try:
            self._session.push_audio(said.pcm, RATE_HZ, timeout_s=None)
            self._session.end_of_utterance()
        except SessionError:
            pass  # it reaches whoever takes chunks


def converse(engine: Engine, minutes: float, size: tuple[int, int], seed: int) -> dict[str, Any]:
    """FIELDS of a conversation."""
    rss: list[int] = []
    device: list[int] = []
    begin_s, seconds = time.perf_counter(), 0.0
    with engine.open_session(
        image=PORTRAIT, prompt="A person is speaking.", size=size, fps=FPS, seed=seed
    ) as session:
        conversation = Conversation(session, seed)
        while seconds < 60 * minutes:
            seconds += conversation.turn()
            rss.append(resident_bytes())
            device.append(engine.stats().device_bytes)
    growth = slope(rss[WARM:])
    every = -(-len(rss) // 240)
    return {
        "minutes": minutes,
        **{
            name: getattr(conversation, name)
            for name in ("utterances", "interrupted", "silences", "blocks", "frames", "faults")
        },
        "wall_s": time.perf_counter() - begin_s,
        "memory": {
            "rss_bytes": rss[::every],
            "device_bytes": device[::every],
            "growth_bytes_per_utterance": growth,
            # Whatever a session wrongly kept of an utterance would be a picture at least.
            "flat": (growth < 3 * size[0] * size[1] and device[-1] <= max(device[:WARM]))
            if len(rss) >= 2 * WARM
            else None,
        },
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One conversation."""
    loaded = models.load(options)
    engine = models.open_engine(loaded)
    return {
        "timed": "nothing but the whole conversation, pushed and taken as fast as it goes",
        "not_timed": "loading, opening",
        **loaded.described(),
        "memory_policy": None,
        **converse(engine, options.minutes, loaded.size, options.seed),
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['minutes']:g} minutes of sound", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    memory = result["memory"]
    rows = {
        "utterances, silent ones among them": f"{result['utterances']}, {result['silences']}",
        "interrupted": str(result["interrupted"]),
        "blocks and frames taken": f"{result['blocks']}, {result['frames']}",
        "faults": str(len(result["faults"])),
        "memory, host and device": f"{memory['rss_bytes'][-1] / 1e6:.0f} MB, "
        f"{memory['device_bytes'][-1] / 1e6:.0f} MB, "
        f"{memory['growth_bytes_per_utterance'] / 1e3:+.2f} kB an utterance "
        f"({VERDICTS[memory['flat']]})",
        "it took": f"{result['wall_s']:.0f} s",
    }
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    for fault in result["faults"][:10]:
        console.print(fault)
    console.print(f"timed: {result['timed']}\nnot timed: {result['not_timed']}")


def verify(result: dict[str, Any]) -> None:
    """Raises LiveActError where something was lost, or memory grew."""
    if result["faults"] or result["memory"]["flat"] is False:
        raise LiveActError(
            f"conversation: expected whole utterances in flat memory, found "
            f"{len(result['faults'])} faults, "
            f"{result['memory']['growth_bytes_per_utterance']:.0f} bytes more an utterance"
        )
