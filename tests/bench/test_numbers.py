"""Samples to numbers, and chunks to stalls and intervals: results that are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import (
    playback,
    session,
    spread,
)
from benchmarks.playback import Arrival

# ---------------------------------------------------------------------------- numbers


def test_percentiles_are_numpys() -> None:
    samples = np.random.default_rng(0).exponential(size=37).tolist()
    for percent in (0, 1, 10, 50, 90, 99, 100):
        found = spread.percentile(samples, percent)
        assert found == pytest.approx(np.percentile(samples, percent), rel=1e-12)
    assert spread.percentile([3.0], 99) == 3.0
    with pytest.raises(ValueError, match="expected samples"):
        spread.percentile([], 50)


def test_spread() -> None:
    found = spread.spread([float(i) for i in range(101)], 95, 99)
    assert found == {
        "n": 101,
        "median": 50.0,
        "p10": 10.0,
        "p90": 90.0,
        "p95": 95.0,
        "p99": 99.0,
        "min": 0.0,
        "max": 100.0,
    }


def test_median_ratio_is_of_neighbours() -> None:
    """A machine that gets ten times slower halfway changes no ratio."""
    assert spread.median_ratio([2, 2, 20, 20, 20], [1, 1, 10, 10, 10]) == 2


def test_slope_finds_a_leak_and_ignores_a_jump() -> None:
    jump = [1000] * 20 + [5000] * 3 + [1000] * 27
    assert session.slope(jump) == 0
    assert session.slope([1000 + 7 * i for i in range(50)]) == pytest.approx(7)
    assert session.slope([5]) == 0


# ---------------------------------------------------------------------------- playback


def arrivals(*times_s: float, duration_s: float = 0.2) -> list[Arrival]:
    return [Arrival(t, i * duration_s, duration_s, block=i // 4) for i, t in enumerate(times_s)]


def test_chunks_that_come_as_they_are_played() -> None:
    found = playback.play(arrivals(5.0, 5.2, 5.4, 5.6), 0.0)
    assert found == {
        "buffer_s": 0.0,
        "deadline_attainment": 1.0,
        "underruns": 0,
        "stall_s": 0.0,
        "longest_stall_s": 0.0,
    }


def test_one_late_chunk_delays_everything_after_it() -> None:
    """The third chunk comes 0.5 s late, the fourth 0.5 s late too: one underrun, since the player
    that waited is itself 0.5 s late by then. A live clock misses both."""
    late = arrivals(0.0, 0.2, 0.9, 1.1)
    found = playback.play(late, 0.0)
    assert (found["underruns"], found["deadline_attainment"]) == (1, 0.5)
    assert found["stall_s"] == pytest.approx(0.5)
    buffered = playback.play(late, 0.5)
    assert (buffered["underruns"], buffered["deadline_attainment"]) == (0, 1.0)
    almost = playback.play(late, 0.4)
    assert almost["underruns"] == 1 and almost["longest_stall_s"] == pytest.approx(0.1)


def test_slower_than_real_time_stalls_at_every_chunk() -> None:
    """0.3 s for every 0.2 s: 9 stalls of 0.1 s, and a buffer of 0.5 s hides the first five."""
    slow = arrivals(*(0.3 * i for i in range(10)))
    assert playback.play(slow, 0.0)["underruns"] == 9
    assert playback.play(slow, 0.0)["stall_s"] == pytest.approx(0.9)
    found = playback.play(slow, 0.5)
    assert found["underruns"] == 4 and found["stall_s"] == pytest.approx(0.4)


def test_intervals_and_periods() -> None:
    given = arrivals(0.0, 0.1, 0.3, 0.4, 1.4, 1.5, 1.6, 1.7, 3.0, 3.0, 3.0, 3.1)
    assert playback.intervals_ms(given)[:3] == pytest.approx([100, 200, 100])
    assert playback.block_periods_ms(given, 1) == pytest.approx([1300, 1400])
    assert playback.block_periods_ms(given, 2) == pytest.approx([1400])
