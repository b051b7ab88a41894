"""What every request and every WebSocket must pass before anything looks at it."""

from __future__ import annotations

import asyncio
import hmac
import re
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liveact.errors import InputError
from liveact.files import one_line
from liveact.serve.errors import Refused
from liveact.serve.settings import LOOPBACK_HOSTS, ServeSettings

# What needs no token: probes of an orchestrator, and the page, which asks for one.
OPEN_PATHS = ("/healthz", "/readyz", "/")
OPEN_FOLDERS = ("/page/",)
TOKEN = r"[A-Za-z0-9._~-]{16,512}"  # what a header and a WebSocket's subprotocol can both carry
BEARER = "bearer."
DISCARDED = 4  # times the limit of a body
SMALL_BYTES = 64 * 1024
LARGE_BODIES = 4  # at a time; more wait
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
)


def read_token(path: Path) -> str:
    """The token in a file, without the line end. Raises InputError, which never shows it."""
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            text = file.read(1024).strip()
    except OSError as error:
        raise InputError(f"{path}: expected a file with a token, {one_line(error)}") from error
    if not re.fullmatch(TOKEN, text):
        raise InputError(
            f"{path}: expected a token of 16 to 512 letters, digits and . _ ~ -, "
            f"found {len(text)} characters that are none"
        )
    return text


class Guard:
    """An ASGI layer: Host, Origin, token, and the size and the duration of a body."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings
        self._large = asyncio.Semaphore(LARGE_BODIES)
        self._hosts = {urlsplit(origin).hostname for origin in settings.allow_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await self._pass(scope, receive, send)
        body = _Body(receive, self._settings, self._large)
        try:
            await self._pass(scope, body, _with_headers(send))
        finally:
            body.release()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            if isinstance(receive, _Body):
                await receive.check(Headers(scope=scope).get("content-length", "0"))
        except Refused as refused:
            return await refused.answer()(scope, receive, send)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        if "origin" in headers:
            self._check_origin(headers["origin"], headers.get("host", ""))
        path = scope["path"]
        if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS):
            self._check_token(headers, scope.get("subprotocols", []))

    def _check_host(self, host: str) -> None:
        """On loopback, a page of somebody else's could otherwise reach the server under a name
        that its owner lets point here (DNS rebinding)."""
        if not self._settings.is_loopback:
            return
        name = _hostname(host)
        if name not in LOOPBACK_HOSTS and name not in self._hosts:
            raise Refused(421, "bad_host", f"Host: expected this machine, found {host!r:.80}")

    def _check_origin(self, origin: str, host: str) -> None:
        same = urlsplit(origin).netloc.lower() == host.lower() != ""
        if not same and origin not in self._settings.allow_origins:
            message = f"Origin: expected an allowed one, found {origin!r:.80}"
            raise Refused(403, "bad_origin", message)

    def _check_token(self, headers: Headers, subprotocols: list[str]) -> None:
        expected = self._settings.token
        if expected is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given += [name.removeprefix(BEARER) for name in subprotocols if name.startswith(BEARER)]
        if not any(hmac.compare_digest(one.encode(), expected.encode()) for one in given):
            raise Refused(
                401,
                "unauthorized",
                "Authorization: expected Bearer and the token of the server",
                {"WWW-Authenticate": "Bearer"},
            )


class _Body:
    """The body of a request as it arrives: no more than so many bytes, within so much time, and not
    too many large ones at a time."""

    def __init__(self, receive: Receive, settings: ServeSettings, large: asyncio.Semaphore) -> None:
        self._receive, self._settings = receive, settings
        self._large, self._is_large = large, False
        self._received = 0
        self._deadline_s = asyncio.get_running_loop().time() + settings.request_s
        self._complete = False

    async def check(self, length: str) -> None:
        """Of what the header announces. Raises Refused."""
        if not length.isdecimal() or int(length[:20]) > self._settings.max_body_bytes:
            raise await self._too_large()

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        message = await self._next()
        if self._received > self._settings.max_body_bytes:
            raise await self._too_large()
        return message

    def release(self) -> None:
        """The request is done."""
        if self._is_large:
            self._is_large = False
            self._large.release()

    async def _next(self) -> Message:
        limit_s = self._settings.request_s
        try:
            async with asyncio.timeout_at(self._deadline_s):
                if self._received > SMALL_BYTES and not self._is_large:
                    await self._large.acquire()
                    self._is_large = True
                message = await self._receive()
        except TimeoutError:
            what = f"body: expected within {limit_s:g} s, found it incomplete"
            raise Refused(408, "too_slow", what, {"Connection": "close"}) from None
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return message

    async def _too_large(self) -> Refused:
        """Throws the rest away, within reason: a client that is still sending when the connection
        is closed would not see the answer."""
        limit = self._settings.max_body_bytes
        while not self._complete and self._received < DISCARDED * limit:
            await self._next()
        what = f"body: expected at most {limit} bytes, found more"
        return Refused(413, "too_large", what, {"Connection": "close"})


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *HEADERS]
        await send(message)

    return sending


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
