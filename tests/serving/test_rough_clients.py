"""Clients that are slow, silent, half gone, killed, or too many: none of them leaves anything, and
none is noticed by the others."""

from __future__ import annotations

import base64
import os
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from liveact.engine import Engine
from liveact.serve import server as server_module
from liveact.serve import settings as settings_module
from tests.support.pipeline import speech
from tests.support.server import Client, Served, serving
from tests.support.session import BLOCK_S, wait_until

SIDE = 96  # of pictures that are 650 kB a second


class Raw:
    """A WebSocket without a library: it does what it is told and nothing else."""

    def __init__(self, served: Served, path: str, receive_buffer: int | None = None) -> None:
        host, _, port = served.url.removeprefix("http://").partition(":")
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect((host, int(port)))
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: Upgrade\r\n"
            f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            "\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        assert head.startswith(b"HTTP/1.1 101"), head

    def kill(self) -> None:
        """As the kernel does for a process that is killed with data unread."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def drain(self, timeout_s: float) -> bytes:
        """All that comes until the server ends the connection."""
        self.socket.settimeout(timeout_s)
        found = b""
        try:
            while piece := self.socket.recv(2**16):
                found += piece
        except ConnectionResetError:
            pass
        return found


def connections(served: Served) -> int:
    return len(served.server.server_state.connections)


def streams(served: Served) -> int:
    """Connections that are WebSockets."""
    kinds = [type(one).__name__ for one in served.server.server_state.connections]
    return kinds.count("_WebSocket")


def reasons(served: Served) -> dict[str, float]:
    """Why sessions were closed."""
    family = next(iter(served.sessions.metrics.closed.collect()))
    return {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total")}


# -------------------------------------------------------------------------------- who goes away


@pytest.mark.parametrize("how", ["close", "kill", "shutdown"])
def test_a_client_that_goes_frees_its_session_within_a_block(engine: Engine, how: str) -> None:
    with serving(engine) as served:
        begun_s = time.monotonic()
        path = served.create()["stream"]
        raw = Raw(served, f"{path}?format=rgb24")
        received = 0
        while received < 32 * 32 * 3:
            received += len(raw.socket.recv(1000))
        first_frame_s = time.monotonic() - begun_s
        pcm = (speech(5.0) * 32767).astype("<i2").tobytes()
        raw.socket.sendall(_masked(2, pcm))  # in the middle of something
        time.sleep(0.5)
        match how:
            case "close":
                raw.socket.close()
            case "kill":
                raw.kill()
            case "shutdown":
                raw.socket.shutdown(socket.SHUT_RDWR)
        # A block plays for 1.6 s, and takes a fraction of that; more on a machine that is busy.
        assert served.wait_until_free() < max(BLOCK_S, first_frame_s)
        assert reasons(served) == {"disconnected": 1}
        wait_until(lambda: streams(served) == 0, "the connection is left")


@pytest.mark.slow
def test_a_client_that_takes_nothing_is_dropped(engine: Engine) -> None:
    with serving(engine, stalled_s=1.0) as served:
        path = served.create(width=SIDE, height=SIDE)["stream"]
        raw = Raw(served, f"{path}?format=rgb24", receive_buffer=4096)  # 650 kB/s
        served.wait_until_free()
        assert reasons(served) == {"stalled": 1}
        # The connection too, although what it was sent is not taken.
        wait_until(lambda: streams(served) == 0, "the connection is left", 30)
        raw.socket.close()


@pytest.mark.slow
def test_a_slow_client_gets_fewer_frames_and_none_pile_up(engine: Engine) -> None:
    """It reads 200 kB a second of 650: what it has not read was not made for it, but for what fits
    into the buffers on the way, 64 kB of asyncio's and 128 kB of the kernel's."""
    frame_bytes = 32 + SIDE * SIDE * 3 + 2 * 48_000 // 20
    with serving(engine) as served:
        session = served.create(width=SIDE, height=SIDE)
        raw = Raw(served, f"{session['stream']}?format=rgb24", receive_buffer=4096)
        received, deadline_s = 0, time.monotonic() + 5
        while time.monotonic() < deadline_s:
            received += len(raw.socket.recv(10_000))
            time.sleep(0.05)
        handed_out = served.client.get(f"/v1/sessions/{session['id']}").json()["frames"]
        assert 0 < handed_out - received / frame_bytes < 10
        raw.kill()
        served.wait_until_free()


def test_a_client_that_says_nothing_is_closed_after_a_while(engine: Engine) -> None:
    with serving(engine, idle_s=3.0) as served, served.talk() as client:
        assert client.end() == (4408, "idle_timeout")


def test_no_session_is_older_than_the_limit(engine: Engine) -> None:
    with serving(engine, total_s=4.0) as served, served.talk() as client:
        for _ in range(10):
            client.hear(speech(0.1))
        assert client.end() == (4409, "total_timeout")


def test_a_session_that_nobody_looks_at_is_closed(engine: Engine) -> None:
    with serving(engine, attach_s=3.0) as served:
        served.create()
        served.wait_until_free()
        with served.talk("events") as client:  # looks at no picture
            assert client.end() == (4410, "attach_timeout")
        assert reasons(served) == {"attach_timeout": 2}


def test_a_peer_that_vanished_is_noticed_by_a_ping(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what comes, as the kernel of a machine would whose process hangs, and answers no
    ping."""
    monkeypatch.setattr(settings_module, "PING_S", 0.2)
    monkeypatch.setattr(settings_module, "PONG_S", 0.3)
    with serving(engine) as served:
        raw = Raw(served, served.create()["stream"])
        raw.drain(30)
        served.wait_until_free()
        assert reasons(served) == {"disconnected": 1}


# ----------------------------------------------------------------------------- who does not come


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
def test_a_header_that_never_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(server_module, "HEADERS_S", 0.5)
    with serving(engine) as served, socket.socket() as raw:
        host, _, port = served.url.removeprefix("http://").partition(":")
        raw.connect((host, int(port)))
        raw.settimeout(30)
        raw.sendall(sent)
        begun_s = time.monotonic()
        with pytest.raises(OSError):  # until it is reset
            while True:
                raw.sendall(b"a" if sent else b"")
                time.sleep(0.05)
                if connections(served) == 0:
                    raise ConnectionResetError
        assert time.monotonic() - begun_s < 20


def test_a_body_that_never_ends(engine: Engine) -> None:
    with serving(engine, request_s=0.5) as served, socket.socket() as raw:
        host, _, port = served.url.removeprefix("http://").partition(":")
        raw.connect((host, int(port)))
        raw.settimeout(30)
        raw.sendall(
            f"POST /v1/sessions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100\r\n"
            'Content-Type: application/json\r\n\r\n{"portrait"'.encode()
        )
        answer = raw.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        wait_until(lambda: connections(served) == 0, "the connection is left")


# -------------------------------------------------------------------------------------- too many


@pytest.mark.slow
def test_fifty_clients_a_second_and_two_places(engine: Engine) -> None:
    """Never more than two are in; the others know their place in the queue."""
    with serving(engine, max_sessions=2, max_waiting=16, retry_s=30.0, attach_s=120.0) as served:
        most, done = [0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                most[0] = max(most[0], len(served.sessions), len(engine.stats().sessions))
                time.sleep(0.001)

        watching = threading.Thread(target=watch)
        watching.start()

        def ask(number: int) -> httpx.Response:
            time.sleep(number / 50)
            return httpx.post(
                f"{served.url}/v1/sessions", json={"portrait": "me"}, timeout=60, trust_env=False
            )

        try:
            with ThreadPoolExecutor(50) as threads:
                answers = list(threads.map(ask, range(50)))
        finally:
            done.set()
            watching.join()
        codes = Counter(answer.status_code for answer in answers)
        assert codes == {201: 2, 503: 48}
        assert most[0] <= 2
        refusals = [answer.json()["error"] for answer in answers if answer.status_code == 503]
        tickets = {error["position"]: error["ticket"] for error in refusals if error["ticket"]}
        assert sorted(tickets) == list(range(1, 17))
        assert all(a.headers["Retry-After"] == "30" for a in answers if a.status_code == 503)

        def again(position: int | None) -> int:
            asked = {"portrait": "me", "ticket": position and tickets[position]}
            return served.client.post("/v1/sessions", json=asked).status_code

        assert [again(1), again(2)] == [503, 503]
        for answer in answers:
            if answer.status_code == 201:
                with Client(served, answer.json()) as client:
                    client.frame()
        served.wait_until_free()
        # Whoever is first in the queue is served, a newcomer is not.
        assert [again(None), again(2), again(1), again(3)] == [503, 201, 201, 503]


@pytest.mark.slow
@pytest.mark.alone  # measures the memory of the process
def test_two_hundred_page_loads_leave_nothing(engine: Engine) -> None:
    with serving(engine) as served:
        for _ in range(10):  # whatever is made once, is made now
            _load_page(served)
        served.wait_until_free()
        threads, rss = threading.active_count(), _rss_bytes()
        device_bytes = engine.dit.device.allocated_bytes
        for number in range(200):
            _load_page(served, politely=number % 2 == 0)
        served.wait_until_free()
        assert len(engine.stats().sessions) == 0
        assert engine.dit.device.allocated_bytes == device_bytes
        wait_until(lambda: streams(served) == 0, "connections are left")
        assert threading.active_count() <= threads + 2
        # One session that is left has 50 MB.
        print(f"{rss} before, {_rss_bytes()} after")
        assert _rss_bytes() - rss < 40e6
        assert reasons(served) == {"disconnected": 210}


def _load_page(served: Served, politely: bool = True) -> None:
    while (
        answer := served.client.post("/v1/sessions", json={"portrait": "me"})
    ).status_code == 503:
        time.sleep(0.02)
    path = answer.json()["stream"]
    raw = Raw(served, path)
    raw.socket.recv(100)
    if politely:
        raw.socket.sendall(_masked(8, struct.pack(">H", 1001)))
        raw.drain(30)
        raw.socket.close()
    else:
        raw.kill()


def _masked(opcode: int, payload: bytes) -> bytes:
    """A WebSocket frame as a client sends it, masked with zeros."""
    count = len(payload)
    length = (
        struct.pack(">B", 0x80 | count)
        if count < 126
        else struct.pack(">BH", 0x80 | 126, count)
        if count < 65_536
        else struct.pack(">BQ", 0x80 | 127, count)
    )
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


def _rss_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
