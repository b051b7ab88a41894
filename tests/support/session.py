"""Sessions on the demo checkpoint at 32×32, where a block takes a fifth of a second.

Whatever could hang runs in a thread of its own and is waited for with a limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from liveact.engine import Engine
from liveact.session.chunk import Chunk
from liveact.session.session import Session
from tests.support.paths import PORTRAIT
from tests.support.pipeline import in_time

RATE_HZ = 16_000
BLOCK_S = 1.6  # 32 frames at 20 fps


def open_session(engine: Engine, **options: Any) -> Session:
    defaults = {"size": (32, 32), "prompt": "A person.", "image": PORTRAIT, "max_backlog_s": 600}
    options = defaults | options
    return engine.open_session(**options)


def workers() -> list[str]:
    return [
        t.name for t in threading.enumerate() if t.name in ("liveact-denoise", "liveact-decode")
    ]


def wait_until(condition: Callable[[], bool], message: str, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, message
        time.sleep(0.002)


def take(session: Session, timeout_s: float = 30.0) -> list[Chunk]:
    return in_time(lambda: list(session), timeout_s=timeout_s)


def run_whole(engine: Engine, samples: np.ndarray, **options: Any) -> list[Chunk]:
    with open_session(engine, **options) as session:
        session.push_audio(samples, RATE_HZ)
        session.end_of_audio()
        return take(session)


def pictures(chunks: list[Chunk]) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in chunks])


class Gate:
    """Stands in for a method: every call says that it has begun and waits to be let through."""

    def __init__(self, target: Any, name: str) -> None:
        self._call = getattr(target, name)
        self.entered = threading.Semaphore(0)
        self._open = threading.Semaphore(0)
        setattr(target, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.entered.release()
        assert self._open.acquire(timeout=30), "nobody opened the gate"
        return self._call(*arguments, **options)

    def wait(self) -> None:
        assert self.entered.acquire(timeout=30), "nobody came to the gate"

    def open(self, times: int = 1_000) -> None:
        self._open.release(times)


def stream_of(session: Session) -> Any:
    return session._workers._pipeline.stream


def decoder_of(session: Session) -> Any:
    return session._workers._pipeline.decoder


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError("out of luck")
