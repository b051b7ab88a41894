"""How fast a session answers: speech to the first speaking frame, interruption to the last stale
one.

A player shows chunks by the clock and takes the next one a tenth of a second before it is wanted; a
person who idles is spoken to at random moments. `burst` pushes a sentence at once, as a
text-to-speech service does, `pace` as it is spoken, 20 ms at a time. After a while the sentence is
interrupted and the next one begins at once. Every time is that of the player's screen.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import models, spread
from benchmarks.options import add_model
from liveact.engine import Engine
from liveact.errors import InputError, LiveActError, SessionError
from liveact.session.chunk import BlockTimings, Chunk
from liveact.session.session import Session

FPS = 20
RATE_HZ = 16_000
PIECE_S = 0.02
SENTENCE_S = 2.4
AHEAD_S = 0.1  # the player has at least this much to show when it asks for more
PACES = ("burst", "pace")
LIMIT_S = 120.0  # for anything that is waited for
PORTRAIT = Path(__file__).resolve().parent.parent / "examples" / "portrait.png"

_SPREAD = spread.FIELDS | {"p95": float}
FIELDS: dict[str, Any] = {
    "moments": int,
    "fps": int,
    "block_ms": {"audio": _SPREAD, "denoise": _SPREAD, "decode": _SPREAD},
    **{
        name: {pace: _SPREAD for pace in PACES}
        for name in (
            "speech_to_frame_after_idle_s",
            "speech_to_frame_after_interruption_s",
            "interruption_to_last_frame_s",
            "interrupt_call_ms",
        )
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--moments", type=int, default=30, help="of each kind (default 30)")
    parser.set_defaults(repeat=1)


@dataclass(frozen=True)
class Shown:
    """A chunk on the screen. Times of time.monotonic."""

    start_s: float
    stop_s: float
    utterance: int
    speech: bool
    last: bool  # of its utterance


class Player(threading.Thread):
    """Shows the chunks of a session by the clock, from the first one on without a pause."""

    def __init__(self, session: Session) -> None:
        super().__init__(name="player", daemon=True)
        self._session = session
        self._changed = threading.Condition()
        self._shown: list[Shown] = []
        self._ended = False
        self.blocks: list[BlockTimings] = []

    def run(self) -> None:
        free_s = 0.0  # when the screen has shown what there is
        try:
            for chunk in self._session:
                free_s = self._show(chunk, max(free_s, time.monotonic()))
                time.sleep(max(0.0, free_s - AHEAD_S - time.monotonic()))
        except SessionError:
            pass
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _show(self, chunk: Chunk, start_s: float) -> float:
        stop_s = start_s + len(chunk.frames) / FPS
        with self._changed:
            self._shown.append(
                Shown(start_s, stop_s, chunk.utterance, chunk.speech, chunk.last_of_utterance)
            )
            if chunk.timings.block is not None:
                self.blocks.append(chunk.timings.block)
            self._changed.notify_all()
        return stop_s

    def first_of(self, utterance: int) -> float:
        """When the first speaking frame of an utterance is shown; waits for it."""
        return self._of(lambda shown: shown.utterance == utterance)[0].start_s

    def last_of(self, utterance: int) -> float:
        """When the last speaking frame so far of an utterance is gone."""
        return self._of(lambda shown: shown.utterance == utterance)[-1].stop_s

    def wait_for_end(self, utterance: int) -> None:
        """Until all of an utterance was shown."""
        last = self._of(lambda shown: shown.utterance == utterance and shown.last)[0]
        time.sleep(max(0.0, last.stop_s - time.monotonic()))

    def _of(self, wanted: Callable[[Shown], bool]) -> list[Shown]:
        def found() -> list[Shown]:
            return [shown for shown in self._shown if shown.speech and wanted(shown)]

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, LIMIT_S)
            if not found():
                raise LiveActError("player: expected a frame of the utterance, found none")
            return found()


class Speaker:
    """Says sentences of noise."""

    def __init__(self, session: Session, pace: str, random: np.random.Generator) -> None:
        self._session, self._pace, self._random = session, pace, random
        self._thread: threading.Thread | None = None

    def say(self) -> float:
        """Begins a sentence; when its first sample sounds, of time.monotonic."""
        pcm = 0.1 * self._random.standard_normal(round(SENTENCE_S * RATE_HZ), np.float32)
        begin_s = time.monotonic()
        if self._pace == "burst":
            self._session.push_audio(pcm, RATE_HZ)
        else:
            self._stop = threading.Event()
            arguments = (pcm, begin_s, self._stop)
            self._thread = threading.Thread(target=self._at_pace, args=arguments, daemon=True)
            self._thread.start()
        return begin_s

    def stop(self) -> None:
        """In the middle of it, where it is still being said."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()

    def finish(self) -> None:
        """Says it to its end."""
        if self._thread is not None:
            self._thread.join()
        self._session.end_of_utterance()

    def _at_pace(self, pcm: np.ndarray, begin_s: float, stop: threading.Event) -> None:
        count = round(PIECE_S * RATE_HZ)
        for start in range(0, len(pcm), count):
            piece = pcm[start : start + count]
            due_s = begin_s + (start + len(piece)) / RATE_HZ
            if stop.wait(max(0.0, due_s - time.monotonic())):
                return
            self._session.push_audio(piece, RATE_HZ, timeout_s=None)


def converse(
    engine: Engine, pace: str, moments: int, size: tuple[int, int], seed: int
) -> tuple[dict[str, list[float]], list[BlockTimings]]:
    """Samples of every figure, and the times of all blocks."""
    random = np.random.default_rng(seed)
    found: dict[str, list[float]] = {
        name: [] for name in FIELDS if name.endswith(("_s", "call_ms"))
    }
    with engine.open_session(
        image=PORTRAIT,
        prompt="A person is speaking.",
        size=size,
        fps=FPS,
        idle="silence",
        sample_rate=RATE_HZ,
        channels=1,
    ) as session:
        player, speaker = Player(session), Speaker(session, pace, random)
        player.start()
        utterance = 0
        for _ in range(moments):
            time.sleep(random.uniform(0.5, 2.5))
            begin_s = speaker.say()
            found["speech_to_frame_after_idle_s"].append(player.first_of(utterance) - begin_s)
            time.sleep(random.uniform(0.2, 1.0))
            speaker.stop()
            begin_s = time.monotonic()
            session.interrupt()
            found["interrupt_call_ms"].append(1e3 * (time.monotonic() - begin_s))
            last_s = player.last_of(utterance)
            found["interruption_to_last_frame_s"].append(max(0.0, last_s - begin_s))
            utterance = session.stats().utterance
            begin_s = speaker.say()
            first_s = player.first_of(utterance)
            found["speech_to_frame_after_interruption_s"].append(first_s - begin_s)
            speaker.finish()
            player.wait_for_end(utterance)
            utterance = session.stats().utterance
    player.join(LIMIT_S)
    return found, player.blocks


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both paces, one session each, after a session that warms everything up."""
    if options.moments < 1:
        raise InputError(f"moments: expected 1 or more, found {options.moments}")
    loaded = models.load(options)
    engine = models.open_engine(loaded)
    converse(engine, "burst", 1, loaded.size, options.seed)
    found = {}
    blocks: list[BlockTimings] = []
    for pace in PACES:
        found[pace], times = converse(engine, pace, options.moments, loaded.size, options.seed)
        blocks += times
    names = found["burst"]
    return {
        "timed": "from the first sample of a sentence, or the call of interrupt, to the moment "
        f"when a player shows the frame that asks for chunks {AHEAD_S:g} s ahead",
        "not_timed": "video encoding, network, the screen itself",
        **loaded.described(),
        "memory_policy": None,
        "moments": options.moments,
        "fps": FPS,
        "block_ms": {
            "audio": spread.spread([b.audio_ms for b in blocks], 95),
            "denoise": spread.spread([b.denoise_ms for b in blocks], 95),
            "decode": spread.spread([b.decode_ms for b in blocks], 95),
        },
        **{name: {pace: spread.spread(found[pace][name], 95) for pace in PACES} for name in names},
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['moments']} moments of each kind", title_justify="left")
    for column in ("", "burst p50", "burst p95", "pace p50", "pace p95"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "speech to first speaking frame, after idling": "speech_to_frame_after_idle_s",
        "speech to first speaking frame, after an interruption": (
            "speech_to_frame_after_interruption_s"
        ),
        "interruption to last stale frame": "interruption_to_last_frame_s",
    }
    for text, name in rows.items():
        values = [result[name][pace][p] for pace in PACES for p in ("median", "p95")]
        table.add_row(text, *[f"{value:.2f} s" for value in values])
    values = [result["interrupt_call_ms"][pace][p] for pace in PACES for p in ("median", "p95")]
    table.add_row("the call of interrupt", *[f"{value:.1f} ms" for value in values])
    console.print(table)
    stages = ", ".join(
        f"{name} {ms['median']:.0f} (p95 {ms['p95']:.0f})"
        for name, ms in result["block_ms"].items()
    )
    console.print(f"a block, ms: {stages}; it plays {1e3 * 32 / FPS:.0f} ms")
    console.print(f"timed: {result['timed']}\nnot timed: {result['not_timed']}")
