"""What a viewer sees of chunks that arrive when they arrive: a player, simulated.

The player starts `buffer_s` after the first chunk is there and then shows every chunk for as long
as it lasts. A chunk that is not there when it is its turn is an underrun: the picture freezes until
it comes, and everything after it is shown that much later.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIELDS = {
    "buffer_s": float,
    "deadline_attainment": float,
    "underruns": int,
    "stall_s": float,
    "longest_stall_s": float,
}
_ROUNDING_S = 1e-6  # pts and arrival come from different clocks' floats


@dataclass(frozen=True)
class Arrival:
    """One chunk. Times in seconds."""

    arrived_s: float  # any clock
    pts_s: float  # presentation time of its first frame
    duration_s: float
    block: int


def play(arrivals: Sequence[Arrival], buffer_s: float) -> dict[str, Any]:
    """FIELDS. `deadline_attainment` is the share of chunks that came in time for a player that
    does not wait (a live stream that drops what is late); the others are of one that does."""
    start_s = arrivals[0].arrived_s + buffer_s - arrivals[0].pts_s
    in_time = sum(a.arrived_s <= start_s + a.pts_s + _ROUNDING_S for a in arrivals)
    delay_s = 0.0
    stalls = []
    for arrival in arrivals:
        late_s = arrival.arrived_s - (start_s + arrival.pts_s + delay_s)
        if late_s > _ROUNDING_S:
            stalls.append(late_s)
            delay_s += late_s
    return {
        "buffer_s": buffer_s,
        "deadline_attainment": in_time / len(arrivals),
        "underruns": len(stalls),
        "stall_s": delay_s,
        "longest_stall_s": max(stalls, default=0.0),
    }


def intervals_ms(arrivals: Sequence[Arrival]) -> list[float]:
    """Milliseconds from one chunk to the next."""
    times = [a.arrived_s for a in arrivals]
    return [1e3 * (b - a) for a, b in itertools.pairwise(times)]


def block_periods_ms(arrivals: Sequence[Arrival], first_block: int) -> list[float]:
    """Milliseconds from the end of a block to the end of the next, from `first_block` on."""
    done = {a.block: a.arrived_s for a in arrivals}  # the last chunk of each stays
    blocks = sorted(done)
    return [1e3 * (done[b] - done[a]) for a, b in itertools.pairwise(blocks) if b >= first_block]
