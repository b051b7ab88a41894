"""Stage timings: overlap, the trace file, and what happens when it cannot be written."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from liveact.errors import InputError
from liveact.session.timeline import Span, Timeline


class Clock:
    """Time that passes when it is told to, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now_s)

    def at(self, seconds: float) -> None:
        self.now_s = 100.0 + seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def past(timeline: Timeline, clock: Clock, stage: str, start_s: float, stop_s: float) -> Span:
    clock.at(start_s)
    with timeline.span(stage, 0, stage) as span:
        clock.at(stop_s)
    return span


@pytest.mark.parametrize(
    ("start_s", "stop_s", "overlap_ms"),
    [(0, 1, 0), (1, 2, 500), (1.6, 1.8, 200), (1, 5, 1500), (2, 3, 500), (2.5, 2.75, 0), (9, 9, 0)],
)
def test_overlap(clock: Clock, start_s: float, stop_s: float, overlap_ms: float) -> None:
    timeline = Timeline()
    past(timeline, clock, "denoise", 1.5, 2.5)
    past(timeline, clock, "denoise", 3.0, 3.5)
    past(timeline, clock, "other", 0.0, 9.0)
    span = past(timeline, clock, "decode", start_s, stop_s)
    assert span.duration_ms == pytest.approx(1e3 * (stop_s - start_s))
    assert timeline.overlap_ms(span, "denoise") == pytest.approx(overlap_ms)


def test_overlap_with_what_still_runs(clock: Clock) -> None:
    timeline = Timeline()
    clock.at(1.0)
    with timeline.span("denoise", 1, "a"):
        span = past(timeline, clock, "decode", 0.5, 1.25)
        assert timeline.overlap_ms(span, "denoise") == pytest.approx(250)
        clock.at(9.0)
        assert timeline.overlap_ms(span, "denoise") == pytest.approx(250)


def test_only_the_last_spans_are_kept() -> None:
    timeline = Timeline()
    for block in range(1000):
        with timeline.span("denoise", block, "a"):
            pass
    assert sum(len(spans) for spans in timeline._spans.values()) <= 16


def test_the_file_is_a_chrome_trace(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "trace.json"
    timeline = Timeline(path)
    past(timeline, clock, "denoise", 1.0, 1.5)
    with pytest.raises(KeyError), timeline.span("decode", 0, 'a "track"'):
        raise KeyError
    unfinished = path.read_text()
    timeline.close()
    timeline.close()
    events = json.loads(path.read_text())
    spans = [event for event in events if event.get("ph") == "X"]
    assert [(s["name"], s["ts"], s["dur"]) for s in spans] == [
        ("denoise", 1e6, 5e5),
        ("decode", 1.5e6, 0),
    ]
    names = {e["tid"]: e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    assert [names[s["tid"]] for s in spans] == ["denoise", 'a "track"']
    # Of a process that was killed: the format lets the closing bracket be missing.
    assert [e for e in json.loads(unfinished.rstrip(",\n") + "]") if e["ph"] == "X"] == spans


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline = Timeline(path)

    def work(name: str) -> None:
        for block in range(200):
            with timeline.span("stage", block, name):
                pass

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    timeline.close()
    with timeline.span("after close", 0, "x"):
        pass
    assert sum(event.get("ph") == "X" for event in json.loads(path.read_text())) == 800


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "t.json", Path("/dev/full")):
        with pytest.raises(InputError, match="cannot be written") as caught:
            Timeline(path)
        assert str(path) in str(caught.value)


def test_a_disk_that_fills_up_is_one_error(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "trace.json")
    assert timeline._file is not None
    timeline._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(InputError, match="No space left"), timeline.span("a", 0, "a"):
        pass
    with timeline.span("a", 1, "a"):
        pass
    timeline.close()
