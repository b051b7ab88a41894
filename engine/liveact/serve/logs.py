"""Logs that machines read: a JSON object a line, on standard error.

A session is named by a hash of its id, never by the id itself, which is a capability.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

FIELDS = ("session", "engine_session", "client", "method", "route", "status", "duration_ms")
# uvicorn logs the paths of WebSockets, and so the ids of sessions, at INFO.
QUIET = ("uvicorn.error", "aioice", "aiortc")
PROBES = ("/healthz", "/readyz", "/metrics")  # asked every few seconds

_log = logging.getLogger("liveact.serve")


class JsonFormatter(logging.Formatter):
    """A record → one line of JSON: time (UTC), level, logger, message, and the FIELDS it has."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {
            "time": f"{stamp}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        found |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False)


@contextlib.contextmanager
def json_logs() -> Iterator[None]:
    """For a while, sends what is logged from INFO on to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root, engine = logging.getLogger(), logging.getLogger("liveact")
    before = root.handlers, root.level, engine.handlers
    levels = {name: logging.getLogger(name).level for name in QUIET}
    root.handlers, engine.handlers = [handler], []
    root.setLevel(logging.INFO)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers, _, engine.handlers = before
        root.setLevel(before[1])
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class AccessLog:
    """An ASGI layer: a line for every request, with the route instead of the path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            return await self._app(scope, receive, send)
        begun_s, status = time.monotonic(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            extra = {
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "route": getattr(scope.get("route"), "path", None) or "none",
                "status": status,
                "duration_ms": round(1000 * (time.monotonic() - begun_s), 1),
            }
            _log.info("request", extra=extra)
