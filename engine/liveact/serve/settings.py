"""What an operator decides of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
MAX_MESSAGE_BYTES = 2**20  # of a stream: 32 s of 16 kHz mono
PING_S, PONG_S = 5.0, 10.0  # a client that does not answer is gone


class WebSocketOptions(TypedDict):
    """Of uvicorn's configuration."""

    ws_max_size: int
    ws_ping_interval: float
    ws_ping_timeout: float
    ws_per_message_deflate: bool


def websocket_options() -> WebSocketOptions:
    """How every server of the engine treats a WebSocket, Ray's proxy included."""
    return {
        "ws_max_size": MAX_MESSAGE_BYTES,
        "ws_ping_interval": PING_S,
        "ws_ping_timeout": PONG_S,
        "ws_per_message_deflate": False,  # pictures are compressed, and bombs would be too
    }


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits and defaults of a server; all times in seconds.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        token: what clients must bear; None: nothing.
        allow_origins: origins, besides the server's own, whose pages may use it.
        portraits: a picture for each name that clients may ask for.
        prompts: what a page offers, name → prompt.
        example: speech that a page offers to try it with.
        prompt: of a session that names none.
        size: width and height of a session that names none.
        fps: of a session that names none.
        max_sessions: open at a time.
        max_waiting: clients that keep a place in the queue.
        max_pixels: of a session's picture, width times height.
        max_fps: of a session.
        max_body_bytes: of a request; a portrait in base64 is the largest.
        max_portrait_pixels: of an uploaded portrait, before it is scaled.
        attach_s: a session that nobody looks at for so long after it was made is closed.
        idle_s: one that hears nothing for so long is closed.
        total_s: no session is older.
        stalled_s: a client that takes nothing for so long is dropped.
        request_s: a request must have arrived after so long.
        retry_s: after which a refused client should ask again.
        backlog_s: of sound that waits in the server, besides what waits in the session.
        drain_s: how long running utterances may go on after SIGTERM.
        ice_servers: URLs of STUN and TURN servers, for WebRTC.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = field(default=None, repr=False)
    allow_origins: tuple[str, ...] = ()
    portraits: dict[str, Path] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    example: Path | None = None
    prompt: str = "A person is speaking."
    size: tuple[int, int] = (512, 512)
    fps: float = 20.0
    max_sessions: int = 1
    max_waiting: int = 16
    max_pixels: int = 1280 * 720
    max_fps: float = 60.0
    max_body_bytes: int = 16 * 2**20
    max_portrait_pixels: int = 40_000_000
    attach_s: float = 15.0
    idle_s: float = 300.0
    total_s: float = 3600.0
    stalled_s: float = 10.0
    request_s: float = 20.0
    retry_s: float = 2.0
    backlog_s: float = 60.0
    drain_s: float = 30.0
    ice_servers: tuple[str, ...] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK_HOSTS
