"""uvicorn around the application: its own signals, and clients that are slow, silent or gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Generator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from liveact.errors import InputError
from liveact.files import one_line
from liveact.serve.sessions import Sessions
from liveact.serve.settings import ServeSettings, websocket_options

MAX_CONNECTIONS = 1000
HEADERS_S = 10.0  # for the header of a request
ABORT_S = 2.0  # what a client has not taken so long after the end is thrown away
SHUTDOWN_S = 5
# What the kernel holds of pictures that were not sent yet: stale ones, after an interruption.
UNSENT_BYTES = 128 * 1024

_log = logging.getLogger("liveact.serve")


class _WebSocket(WebSocketsSansIOProtocol):
    """Gives up on a client that does not take what is left for it when its stream is over; uvicorn
    would keep the connection for as long as the client does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.close_timeout = ABORT_S

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(2 * ABORT_S, self.transport.abort)


class _Http(H11Protocol):
    """Gives up on a client that does not complete the header of a request; uvicorn would wait."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_header(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Server(uvicorn.Server):
    """Serves until it is told to stop: by SIGTERM after what is being said, by SIGINT at once."""

    def __init__(self, app: FastAPI, settings: ServeSettings) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            loop="asyncio",
            http=_Http,
            ws=_WebSocket,
            **websocket_options(),
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        super().__init__(config)
        self._sessions: Sessions = app.state.sessions
        self._drain_s = settings.drain_s
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handles SIGTERM and SIGINT while it serves. Afterwards, what handled them before does so
        again; where one of them came, nothing does: the process is about to end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        loop.add_signal_handler(signal.SIGTERM, self.stop, self._drain_s)
        loop.add_signal_handler(signal.SIGINT, self.stop, 0.0)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler if self._draining is None else signal.SIG_IGN)

    def stop(self, drain_s: float) -> None:
        """Ends the server when nobody speaks, after `drain_s` at the latest; called again, at
        once."""
        if self._draining is None:
            _log.info("draining: %d sessions, %g s at most", len(self._sessions), drain_s)
            self._draining = asyncio.ensure_future(self._drain(drain_s))
        else:
            self._draining.cancel()
            self.should_exit = True

    async def _drain(self, drain_s: float) -> None:
        try:
            await self._sessions.drain(drain_s)
        finally:
            self.should_exit = True


def listen(settings: ServeSettings) -> socket.socket:
    """A socket at the host and port of the settings. Raises InputError where that cannot be."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # connections take it over
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        found.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"{settings.host}:{settings.port}: expected an address to listen at, "
            f"found {one_line(error)}"
        ) from error
    return found


def url_of(listening: socket.socket) -> str:
    """Where a browser finds what listens there."""
    host, port = listening.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"
