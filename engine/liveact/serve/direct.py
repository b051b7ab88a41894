"""A session and its stream in one connection: `WS /v1/stream`.

For programs that need nothing else, and where a balancer stands before several servers: the
connection stays with the server that it reached, and with it the session.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from liveact.errors import InputError, LiveActError
from liveact.serve.errors import Refused
from liveact.serve.sessions import Sessions
from liveact.serve.websocket import Stream
from liveact.serve.wire import SUBPROTOCOL, Start, one_line_of

# What the first message is answered with where no session can be had → close code.
REFUSED = 4503
BAD_START = 4400


async def start_and_stream(sessions: Sessions, socket: WebSocket) -> None:
    """Takes a connection from its first message to its end. What `POST /v1/sessions` would refuse
    is told as an event `refused`, with the fields of its body, before the connection is closed."""
    offered = socket.scope.get("subprotocols", [])
    await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
    with contextlib.suppress(WebSocketDisconnect, TimeoutError):
        try:
            async with asyncio.timeout(sessions.settings.request_s):
                start = Start.model_validate_json(await socket.receive_text())
        except TimeoutError:
            return await _refuse(socket, BAD_START, "too_slow", "start: expected it by now")
        except KeyError:  # binary
            return await _refuse(socket, BAD_START, "bad_start", "start: expected JSON first")
        except ValidationError as error:
            found = one_line_of(list(error.errors()))
            return await _refuse(socket, BAD_START, "bad_start", f"start: {found}")
        try:
            live = await sessions.create(start, start.ticket)
        except Refused as refused:
            extra = {"retry_after_s": float((refused.headers or {}).get("Retry-After", 0))}
            details = refused.details | (extra if refused.status_code == 503 else {})
            code = REFUSED if refused.status_code == 503 else BAD_START
            return await _refuse(socket, code, refused.kind, refused.detail, **details)
        except InputError as error:
            return await _refuse(socket, BAD_START, "bad_request", str(error))
        except LiveActError as error:  # the engine is being closed
            return await _refuse(socket, REFUSED, "draining", str(error))
        await Stream(socket, live, start.format).run()


async def _refuse(socket: WebSocket, close: int, code: str, message: str, **details: Any) -> None:
    async with asyncio.timeout(5):
        await socket.send_json({"type": "refused", "code": code, "message": message} | details)
        await socket.close(close, code)
