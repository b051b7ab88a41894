"""The page opened and left again and again, in a browser: what the server's process keeps of it.

LIVEACT_PAGE_LOADS says how often; without it, as often as a minute of a suite is worth.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.browser import NO_WEBRTC, Visitor, browsing, visiting
from tests.support.paths import PORTRAIT
from tests.support.pipeline import speech, write_wav
from tests.support.server_process import Process

pytestmark = pytest.mark.slow

LOADS = int(os.environ.get("LIVEACT_PAGE_LOADS", "10"))
WARM_UP = 5  # whatever is made once, is made then
FREED_S = 30.0


@dataclass(frozen=True)
class Kept:
    """By the server's process while no session is open."""

    rss_bytes: int
    threads: int
    files: int

    @classmethod
    def by(cls, server: Process, like: Kept | None = None) -> Kept:
        """like: what it should come to; sockets are closed a moment after their sessions."""
        deadline_s = time.monotonic() + FREED_S
        while sessions(server):
            assert time.monotonic() < deadline_s, f"{sessions(server)} sessions are left"
            time.sleep(0.1)
        process = psutil.Process(server.process.pid)
        while like and process.num_fds() > like.files and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return cls(process.memory_info().rss, process.num_threads(), process.num_fds())


def sessions(server: Process) -> int:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    return sum(int(float(n)) for n in re.findall(r"^liveact_sessions\{.*\} (\S+)$", text, re.M))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, "--portraits", PORTRAIT.parent, "--max-sessions", 4)
    yield process
    process.kill()


def load_pages(visitor: Visitor, loads: int) -> None:
    """Each until a picture is there; every other session is ended, the others are left."""
    for number in range(loads):
        visitor.start()
        if number % 2:
            visitor.page.click("#end")
        visitor.page.reload()


@pytest.mark.parametrize("script", ["", NO_WEBRTC], ids=["webrtc", "websocket"])
def test_page_loads_leave_nothing(server: Process, tmp_path: Path, script: str) -> None:
    microphone = write_wav(tmp_path / "microphone.wav", speech(1.0, 48_000), 48_000)
    with browsing(microphone) as browser, visiting(browser, server.url, script) as visitor:
        load_pages(visitor, WARM_UP)
        before, begin_s = Kept.by(server), time.monotonic()
        load_pages(visitor, LOADS)
        after = Kept.by(server, like=before)
        way = "stream?format=jpeg" if script else "stream?format=events"
        assert visitor.streams == [way] * (WARM_UP + LOADS)
    print(f"{LOADS} loads in {time.monotonic() - begin_s:.0f} s: {before}, then {after}")
    assert after.threads <= before.threads + 6  # pools grow to their size
    assert after.files <= before.files + 8  # connections that are kept alive
    # One session that is left has 50 MB.
    assert after.rss_bytes - before.rss_bytes < 40e6
