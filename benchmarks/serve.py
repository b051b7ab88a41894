"""How fast `liveact serve` answers, as a client on the same machine sees it, and what it keeps.

The server is a process of its own. Every time is that of the client: from what it sends to the
frame that it receives, each way over a WebSocket.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import spread
from benchmarks.machine import weights_hash
from benchmarks.options import positive
from benchmarks.quality import TALKER
from liveact.checkpoint.layout import DIT_STEM
from liveact.checkpoint.tensors import open_tensors
from liveact.errors import InputError, LiveActError

if TYPE_CHECKING:
    import httpx
    from websockets.sync.client import ClientConnection

RATE_HZ = 16_000
SENTENCE_S = 2.4
SIZE = (128, 128)
PORTRAITS = Path(__file__).resolve().parent.parent / "examples"
NAME = "portrait"
LIMIT_S = 120.0  # for anything that is waited for
ASKING_S = 5.0  # how long sessions are asked for as fast as possible
CLIENTS = 4  # at a time, who are refused
SPEECH = 1  # a flag of a frame

_SPREAD = spread.FIELDS | {"p95": float}
FIELDS: dict[str, Any] = {
    "moments": int,
    "block_s": {"audio": float, "denoise": float, "decode": float},
    "connect_to_first_frame_s": _SPREAD,
    "speech_to_frame_s": _SPREAD,
    "interrupt_to_silence_s": _SPREAD,
    "accepted_per_s": float,
    "refused_per_s": float,
    "loads": int,
    "memory_before_bytes": int,
    "memory_after_bytes": int,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=TALKER, help="%(default)s")
    parser.add_argument("--moments", type=positive, default=20, help="of each kind (default 20)")
    parser.add_argument("--loads", type=positive, default=200, help="of a page (default 200)")
    parser.set_defaults(repeat=1)


class Server:
    """The command in a process, and what a client does with it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        import httpx  # here, as the other benchmarks run where it is not installed

        self._process, self._url = process, url
        self.http = httpx.Client(base_url=url, timeout=LIMIT_S, trust_env=False)

    def ask(self) -> httpx.Response:
        """Asks for a session."""
        return self.http.post("/v1/sessions", json={"portrait": NAME})

    def create(self) -> dict[str, Any]:
        """A session; waits until there is a place."""
        deadline_s = time.monotonic() + LIMIT_S
        while (answer := self.ask()).status_code != 201:
            if time.monotonic() > deadline_s:
                raise LiveActError(f"serve: expected a session, found {answer.text:.200}")
            time.sleep(0.02)
        found: dict[str, Any] = answer.json()
        return found

    def stream(self, session: dict[str, Any]) -> AbstractContextManager[ClientConnection]:
        """Its pictures and sound."""
        from websockets.sync.client import connect

        url = self._url.replace("http:", "ws:") + session["stream"]
        return connect(url, max_size=None, open_timeout=LIMIT_S)

    def block_s(self) -> dict[str, float]:
        """How long a block took in the mean so far, by stage."""
        text = self.http.get("/metrics").text
        found = {}
        for stage in ("audio", "denoise", "decode"):
            of = rf'liveact_block_seconds_%s\{{stage="{stage}"\}} (\S+)'
            total, count = (re.search(of % what, text) for what in ("sum", "count"))
            assert total and count
            found[stage] = float(total[1]) / max(1.0, float(count[1]))
        return found

    def rss_bytes(self) -> int:
        """Memory of the process (VmRSS)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s*(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def serving(options: argparse.Namespace) -> Iterator[Server]:
    """`liveact serve`, from its start until it has drained."""
    command = [sys.executable, "-m", "liveact", "serve", "--port", "0", "--max-sessions", "2"]
    command += ["--checkpoint", str(options.checkpoint), "--portraits", str(PORTRAITS)]
    command += ["--size", f"{SIZE[0]}x{SIZE[1]}"]
    command += ["--device", options.device] if options.device else []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+(?=/)", line)
        if found is None:
            raise LiveActError(f"serve: expected an address, found {line!r}")
        server = Server(process, found[0])
        with server.http:
            yield server
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        process.stdout.close()


def next_frame(socket: ClientConnection) -> bool | None:
    """Whether the next message is a frame that speaks; None for an event."""
    message = socket.recv(LIMIT_S)
    return bool(message[5] & SPEECH) if isinstance(message, bytes) else None


def first_frames(server: Server, moments: int) -> list[float]:
    """From the request of a session to its first frame."""
    found = []
    for _ in range(moments):
        begin_s = time.monotonic()
        with server.stream(server.create()) as socket:
            while next_frame(socket) is None:
                pass
            found.append(time.monotonic() - begin_s)
    return found


def conversation(
    server: Server, moments: int, random: np.random.Generator
) -> tuple[list[float], list[float]]:
    """A sentence at a random moment of idling, sent at once, and interrupted in the middle: speech
    to the first frame that speaks, interruption to the last one."""
    answers, silences = [], []
    with server.stream(server.create()) as socket:
        while next_frame(socket) is None:
            pass
        for _ in range(moments):
            _listen(socket, random.uniform(0.5, 2.5))
            pcm = 3000 * random.standard_normal(round(SENTENCE_S * RATE_HZ))
            begin_s = time.monotonic()
            socket.send(pcm.astype("<i2").tobytes())
            while not next_frame(socket):
                pass
            answers.append(time.monotonic() - begin_s)
            _listen(socket, random.uniform(0.2, 1.0))
            begin_s = last_s = time.monotonic()
            socket.send('{"type": "interrupt"}')
            while True:
                message = socket.recv(LIMIT_S)
                if isinstance(message, str) and json.loads(message)["type"] == "interrupted":
                    break
                if isinstance(message, bytes) and message[5] & SPEECH:
                    last_s = time.monotonic()
            silences.append(last_s - begin_s)
    return answers, silences


def _listen(socket: ClientConnection, seconds: float) -> None:
    """Takes what comes, as a player does."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        next_frame(socket)


def accepted_per_s(server: Server) -> float:
    """Sessions that are opened and ended, one after the other."""
    count, begin_s = 0, time.monotonic()
    while time.monotonic() < begin_s + ASKING_S:
        server.http.delete(f"/v1/sessions/{server.create()['id']}")
        count += 1
    return count / (time.monotonic() - begin_s)


def refused_per_s(server: Server) -> float:
    """Requests that are refused while both places are taken and one of the sessions is watched."""
    with (
        server.stream(server.create()) as first,
        server.stream(server.create()),
        ThreadPoolExecutor(CLIENTS) as clients,
    ):
        begin_s = time.monotonic()

        def ask() -> int:
            count = 0
            while time.monotonic() < begin_s + ASKING_S:
                if server.ask().status_code != 503:
                    raise LiveActError("serve: expected a refusal, found a session")
                count += 1
            return count

        asking = [clients.submit(ask) for _ in range(CLIENTS)]
        _listen(first, ASKING_S)
        return sum(one.result() for one in asking) / (time.monotonic() - begin_s)


def load_pages(server: Server, loads: int) -> None:
    """Each a session that is looked at, and left."""
    for _ in range(loads):
        with server.stream(server.create()) as socket:
            socket.recv(LIMIT_S)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, with one server."""
    if not (options.checkpoint / "config.json").is_file():
        raise InputError(f"{options.checkpoint}: expected a checkpoint, found no config.json")
    tensors = open_tensors(options.checkpoint, DIT_STEM)
    random = np.random.default_rng(options.seed)
    with serving(options) as server:
        first_frames(server, 2)  # what is made once, is made now
        first = first_frames(server, options.moments)
        answers, silences = conversation(server, options.moments, random)
        block_s = server.block_s()
        accepted, refused = accepted_per_s(server), refused_per_s(server)
        load_pages(server, 10)
        before = server.rss_bytes()
        load_pages(server, options.loads)
        after = server.rss_bytes()
    return {
        "timed": "from what a client sends to what it receives, over HTTP and WebSocket on this "
        "machine",
        "not_timed": "a network, showing the picture",
        "device": options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"),
        "precision": None,  # the engine's own choice
        "sizes": {"width": SIZE[0], "height": SIZE[1]},
        "memory_policy": None,
        "weights": {"source": options.checkpoint.name, "sha256": weights_hash(tensors)},
        "moments": options.moments,
        "block_s": block_s,
        "connect_to_first_frame_s": spread.spread(first, 95),
        "speech_to_frame_s": spread.spread(answers, 95),
        "interrupt_to_silence_s": spread.spread(silences, 95),
        "accepted_per_s": accepted,
        "refused_per_s": refused,
        "loads": options.loads,
        "memory_before_bytes": before,
        "memory_after_bytes": after,
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['moments']} moments of each kind", title_justify="left")
    for column in ("", "p50", "p95"):
        table.add_column(column, justify="left" if not column else "right")
    for text, name in (
        ("session asked for to its first frame", "connect_to_first_frame_s"),
        ("speech to first speaking frame, after idling", "speech_to_frame_s"),
        ("interruption to last speaking frame", "interrupt_to_silence_s"),
    ):
        table.add_row(text, *[f"{result[name][p]:.3f} s" for p in ("median", "p95")])
    console.print(table)
    console.print(
        f"sessions a second: {result['accepted_per_s']:.1f} opened and ended, "
        f"{result['refused_per_s']:.0f} refused beside two that are shown"
    )
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result["block_s"].items())
    console.print(f"a block, s: {stages}; it plays 1.6 s")
    before, after = (result[f"memory_{when}_bytes"] / 2**20 for when in ("before", "after"))
    console.print(f"memory: {before:.0f} MiB, {after:.0f} after {result['loads']} page loads")
    console.print(f"timed: {result['timed']}\nnot timed: {result['not_timed']}")
