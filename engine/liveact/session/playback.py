"""The clock of whoever plays the chunks: when the next one is wanted."""

from __future__ import annotations

import time
from fractions import Fraction

RESERVE_S = 0.2  # idling is made so late that it is ready this much before it is played


class PlaybackClock:
    """Time of the player, from what was taken. Not thread-safe: `SessionState` guards it.

    The player is taken to play without a pause from the first chunk on. One that takes a chunk
    later than it should have been played is waiting, so its clock begins anew there.

    Attributes:
        taken_frames: so far.
        underruns: how often a chunk that follows on came later than it was to be played.
        stalled_s: how much later, in all.
        block_s: how long the last blocks took, from their start to the first picture.
    """

    def __init__(self, fps: Fraction) -> None:
        self._fps = fps
        self.taken_frames = 0
        self.underruns = 0
        self.stalled_s = 0.0
        self._start_s: float | None = None  # when frame 0 played, of time.monotonic
        self.block_s = 0.0

    @property
    def pts(self) -> float:
        """Presentation time of the chunk that is taken next, in seconds."""
        return float(self.taken_frames / self._fps)

    def take(self, num_frames: int, asked_s: float, follows_on: bool) -> None:
        """A chunk is taken now, asked for at `asked_s`. follows_on: without it, whoever plays the
        chunk before stands still."""
        now_s = time.monotonic()
        late_s = self.late_s(asked_s)
        if follows_on and late_s > 0.5 / self._fps:  # less than half a frame, nobody sees
            self.underruns += 1
            self.stalled_s += late_s
        played_from_s = now_s - self.pts
        self._start_s = max(self._start_s or played_from_s, played_from_s)
        self.taken_frames += num_frames

    def late_s(self, since_s: float) -> float:
        """How long the next chunk is overdue, counted from `since_s` at the earliest."""
        wanted_s = since_s if self._start_s is None else max(since_s, self._start_s + self.pts)
        return max(0.0, time.monotonic() - wanted_s)

    def note_block(self, seconds: float) -> None:
        """A block took this long; slower ones count at once, faster ones bit by bit."""
        self.block_s = max(seconds, 0.8 * self.block_s + 0.2 * seconds)

    def idle_deadline_s(self, waiting_frames: int) -> float | None:
        """When to begin a block that plays after `waiting_frames` that were not taken yet, of
        time.monotonic; None before anything was taken, which is when nothing is played."""
        if self._start_s is None:
            return None
        played_s = float((self.taken_frames + waiting_frames) / self._fps)
        return self._start_s + played_s - self.block_s - RESERVE_S
