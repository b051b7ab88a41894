"""A server in this process, on a free port of loopback, and a client that is written from
docs/protocol.md alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from liveact.engine import Engine
from liveact.serve.app import create_app
from liveact.serve.live import SAMPLE_RATE_HZ
from liveact.serve.server import Server, listen, url_of
from liveact.serve.sessions import Sessions
from liveact.serve.settings import ServeSettings
from liveact.session.pacing import Frame, Pacer
from tests.support.paths import PORTRAIT

TIMEOUT_S = 60.0
SETTINGS = ServeSettings(port=0, size=(32, 32), portraits={"me": PORTRAIT}, max_sessions=2)


@dataclass(eq=False)
class Served:
    """A server that runs.

    Attributes:
        url: where, without a slash at the end.
        sessions: what it holds; for its own thread, but for reading.
        client: of HTTP.
    """

    url: str
    sessions: Sessions
    client: httpx.Client
    server: Server
    loop: asyncio.AbstractEventLoop

    def call(self, work: Any) -> Any:
        """The result of a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    @functools.cached_property
    def schemas(self) -> dict[str, jsonschema.Draft202012Validator]:
        """Of the messages of a stream, by their type."""
        document = self.client.get("/asyncapi.json").json()
        found = {}
        for name, schema in document["components"]["schemas"].items():
            if (kind := schema["properties"].get("type", {}).get("const")) is not None:
                whole = {"$ref": f"#/components/schemas/{name}"} | document
                found[kind] = jsonschema.Draft202012Validator(whole)
        return found

    def wait_until_free(self, within_s: float = TIMEOUT_S) -> float:
        """Until no session is open, and no memory taken; how long that took."""
        begun_s = time.monotonic()
        while len(self.sessions):
            assert time.monotonic() - begun_s < within_s, f"{len(self.sessions)} sessions are left"
            time.sleep(0.005)
        return time.monotonic() - begun_s

    def create(self, **fields: Any) -> dict[str, Any]:
        """A new session."""
        answer = self.client.post("/v1/sessions", json={"portrait": "me"} | fields)
        assert answer.status_code == 201, answer.text
        return answer.json()

    @contextlib.contextmanager
    def talk(self, format: str = "jpeg", **fields: Any) -> Iterator[Client]:
        """A new session and a stream of it."""
        with Client(self, self.create(**fields), format) as client:
            yield client


@contextlib.contextmanager
def serving(engine: Engine, **changes: Any) -> Iterator[Served]:
    """A server with SETTINGS and some changes."""
    settings = replace(SETTINGS, **changes)
    app = create_app(engine, settings)
    server, listening = Server(app, settings), listen(settings)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listening])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server", daemon=True)
    url = url_of(listening).rstrip("/")
    thread.start()
    try:
        headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers) as client:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                thread.join(0.01)
            yield Served(url, app.state.sessions, client, server, loops[0])
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the server does not end"


@dataclass(frozen=True)
class Shown:
    """A frame as a client sees it: see "The header of a frame"."""

    kind: int
    speech: bool
    last_of_utterance: bool
    repeated: bool
    width: int
    height: int
    utterance: int
    number: int
    picture: bytes
    pcm: np.ndarray

    @classmethod
    def parse(cls, message: bytes) -> Shown:
        magic, kind, flags, width, height, zero, utterance, number, picture_bytes, pcm_bytes = (
            struct.unpack_from("<4sBBHHHIQII", message)
        )
        assert magic == b"LAF1" and zero == 0 and flags < 8
        assert len(message) == 32 + picture_bytes + pcm_bytes
        picture = message[32 : 32 + picture_bytes]
        pcm = np.frombuffer(message[32 + picture_bytes :], "<i2")
        flag = [bool(flags & bit) for bit in (1, 2, 4)]
        return cls(kind, *flag, width, height, utterance, number, picture, pcm)


class Client:
    """A stream of a session, over the `websockets` package."""

    def __init__(self, served: Served, session: dict[str, Any], format: str = "jpeg") -> None:
        self.session, self.id = session, session["id"]
        self._connect(f"{served.url}{session['stream']}?format={format}", served.schemas)

    def _connect(self, url: str, schemas: dict[str, Any]) -> None:
        self.schemas, url = schemas, url.replace("http:", "ws:")
        self._open = contextlib.ExitStack()
        self.socket: ClientConnection = self._open.enter_context(
            connect(url, max_size=None, open_timeout=TIMEOUT_S, close_timeout=5)
        )
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def say(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def hear(self, pcm: np.ndarray, rate_hz: int | None = None) -> None:
        """float32 [n, channels] in messages of 0.5 s."""
        if rate_hz is not None:
            self.say(type="audio", sample_rate_hz=rate_hz, channels=pcm.shape[1])
        step = (rate_hz or 16_000) // 2
        for start in range(0, len(pcm), step):
            piece = (pcm[start : start + step] * 32767).astype("<i2")
            self.socket.send(piece.tobytes())

    def next(self, timeout_s: float = TIMEOUT_S) -> Shown | dict[str, Any]:
        """The next message; events are kept as well."""
        message = self.socket.recv(timeout_s)
        if isinstance(message, bytes):
            return Shown.parse(message)
        event = json.loads(message)
        if self.schemas:
            self.schemas[event["type"]].validate(event)
        self.events.append(event)
        return event

    def frame(self) -> Shown:
        while not isinstance(message := self.next(), Shown):
            pass
        return message

    def event(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        while True:
            message = self.next()
            if isinstance(message, dict) and message["type"] == kind:
                return message

    def end(self) -> tuple[int, str]:
        """Why the server closes the socket: code and reason."""
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                self.next()
        received = closed.value.rcvd
        assert received is not None, "the connection was lost"
        return received.code, received.reason

    def frames_until(self, kind: str) -> list[Shown]:
        """Every frame before the next event of a kind."""
        frames = []
        while isinstance(message := self.next(), Shown) or message["type"] != kind:
            if isinstance(message, Shown):
                frames.append(message)
        return frames


class DirectClient(Client):
    """A session and its stream in one connection."""

    def __init__(self, url: str, schemas: dict[str, Any] | None = None) -> None:
        self._connect(f"{url}/v1/stream", schemas or {})


def upload(content: bytes) -> dict[str, str]:
    """A portrait that comes with the request."""
    return {"data": base64.b64encode(content).decode()}


def flash_and_beep(monkeypatch: pytest.MonkeyPatch, fps: int) -> None:
    """All sessions show a white picture and play a loud sound once a second, else black and
    silence."""
    original = Pacer.next_frame

    async def replaced(self: Pacer) -> Frame | None:
        frame = await original(self)
        if frame is None:
            return None
        is_on = frame.number % fps == fps - 1
        t = np.arange(len(frame.pcm)) / SAMPLE_RATE_HZ
        pcm = 0.5 * is_on * np.sin(2 * np.pi * 800 * t).astype(np.float32)
        return replace(frame, picture=np.full_like(frame.picture, 255 * is_on), pcm=pcm[:, None])

    monkeypatch.setattr(Pacer, "next_frame", replaced)
