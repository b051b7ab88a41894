"""What Ray Serve's proxies load for `liveact.integrations.ray`: no engine, no torch.

Ray kills a proxy that is not ready within 5 s (RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S).
"""

from __future__ import annotations

from functools import partialmethod

import uvicorn
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liveact.serve.settings import websocket_options

PROXY_CALLBACK = "liveact.integrations.ray_proxy.proxy_layers"
"""What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH must be, where Ray is started, for connections of
a replica that died to be closed with a code, and for clients that vanished to be noticed as soon as
by `liveact serve`."""

REPLICA_GONE = 1012  # "service restart": connect again


def proxy_layers() -> list[Middleware]:
    """See `PROXY_CALLBACK`; called in the process of the proxy, before that listens."""
    # NOTE: Ray has no option for any of these. uvicorn's own pings, every 20 s with 20 s to answer,
    # would keep the session of a client that vanished for 40 s.
    init = partialmethod(uvicorn.Config.__init__, **websocket_options())
    uvicorn.Config.__init__ = init  # type: ignore[assignment,method-assign]
    return [Middleware(_CloseWithCode)]


class _CloseWithCode:
    """A layer of Ray's proxy. Where a replica dies the proxy drops its connections without a word;
    this closes them with REPLICA_GONE."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            return await self._app(scope, receive, send)
        is_open = False

        async def receiving() -> Message:
            nonlocal is_open
            message = await receive()
            is_open = is_open and message["type"] != "websocket.disconnect"
            return message

        async def sending(message: Message) -> None:
            nonlocal is_open
            is_open = message["type"] in ("websocket.accept", "websocket.send")
            await send(message)

        await self._app(scope, receiving, sending)
        if is_open:
            reason = "the replica of this session is gone"
            await send({"type": "websocket.close", "code": REPLICA_GONE, "reason": reason})
