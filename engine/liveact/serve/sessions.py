"""All sessions of a server: opened where there is a place for them, found by id, ended together."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterator
from typing import Any

from PIL import Image

from liveact.engine import Engine
from liveact.errors import DeviceError, InputError, LiveActError
from liveact.serve.admission import Admission, Place
from liveact.serve.errors import Refused, not_found
from liveact.serve.live import SAMPLE_RATE_HZ, LiveSession
from liveact.serve.memory import SessionMemory
from liveact.serve.metrics import Gauge, Gpus, Metrics
from liveact.serve.portraits import Portraits
from liveact.serve.settings import ServeSettings
from liveact.serve.wire import CreateSession

_log = logging.getLogger("liveact.serve")

DRAIN_POLL_S = 0.05


class Sessions:
    """The sessions of an engine.

    Attributes:
        portraits: that have names.
        metrics: of the server.
        accepting: whether new ones are opened; not while the server drains.
    """

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        """Raises InputError for a portrait that cannot be used."""
        self.settings, self.metrics = settings, Metrics()
        self.portraits = Portraits(settings.portraits, settings.max_portrait_pixels)
        self.accepting = True
        self._engine, self._memory = engine, SessionMemory(engine)
        self._admission = Admission(
            self._memory,
            max_sessions=settings.max_sessions,
            max_waiting=settings.max_waiting,
            retry_s=settings.retry_s,
        )
        self._open: dict[str, LiveSession] = {}
        self._gpus = Gpus()
        self.metrics.watch(self._gauges)

    def get(self, id: str) -> LiveSession:
        """The session of this id. Raises Refused."""
        live = self._open.get(id)
        if live is None:
            raise not_found("session")
        return live

    def __len__(self) -> int:
        return len(self._admission.places)

    async def create(self, asked: CreateSession, ticket: str | None) -> LiveSession:
        """Opens a session. Raises Refused where there is no place now, InputError."""
        asked_s = asyncio.get_running_loop().time()
        size = (asked.width or self.settings.size[0], asked.height or self.settings.size[1])
        place = self._enter(asked, size, ticket)
        try:
            session = await self._engine.aopen_session(
                image=await self._portrait(asked),
                prompt=self.settings.prompt if asked.prompt is None else asked.prompt,
                size=size,
                fps=asked.fps or self.settings.fps,
                seed=asked.seed,
                idle=asked.idle,
                sample_rate=SAMPLE_RATE_HZ,
                channels=1,
            )
        except BaseException as error:
            place.release()
            if isinstance(error, DeviceError):
                self.metrics.refused.labels("no_memory").inc()
                raise Refused(503, "no_memory", str(error)) from error
            raise
        place.allocated = lambda: self._memory.allocated(place.needed, session.stats())
        live = LiveSession(
            session,
            self.settings,
            self.metrics,
            size=size,
            asked_s=asked_s,
            on_closed=functools.partial(self._closed, place),
        )
        self._open[live.id] = live
        self.metrics.opened.inc()
        extra = {"session": live.name, "engine_session": session.name}
        _log.info("opened: %d×%d at %g fps", *size, float(session.fps), extra=extra)
        if not self.accepting:  # meanwhile
            await live.close("draining")
        return live

    def _enter(self, asked: CreateSession, size: tuple[int, int], ticket: str | None) -> Place:
        limits = self.settings
        if size[0] * size[1] > limits.max_pixels:
            raise InputError(
                f"size: expected at most {limits.max_pixels} pixels, found {size[0]}×{size[1]}"
            )
        if (asked.fps or limits.fps) > limits.max_fps:
            raise InputError(f"fps: expected at most {limits.max_fps:g}, found {asked.fps:g}")
        if isinstance(asked.portrait, str) and asked.portrait not in self.portraits.named:
            raise not_found("portrait")
        needed = self._memory.needed(size)
        try:
            if not self.accepting:
                raise Refused(503, "draining", "session: expected a server that goes on")
            return self._admission.enter(needed, ticket)
        except Refused as refused:
            self.metrics.refused.labels(refused.kind).inc()
            raise

    async def _portrait(self, asked: CreateSession) -> Any:
        if isinstance(asked.portrait, str):
            return self.portraits.named[asked.portrait].path
        image: Image.Image = await self.portraits.decode(asked.portrait.data)
        return image

    def _closed(self, place: Place, live: LiveSession) -> None:
        place.release()
        self._open.pop(live.id, None)
        self.metrics.closed.labels(live.reason).inc()
        _log.info("closed: %s", live.reason, extra={"session": live.name})

    async def drain(self, limit_s: float) -> None:
        """Opens none any more and closes each as soon as what it says is said, but all of them
        after `limit_s`."""
        self.accepting = False
        deadline_s = asyncio.get_running_loop().time() + limit_s
        while self._admission.places and asyncio.get_running_loop().time() < deadline_s:
            done = [live for live in self._open.values() if not live.is_speaking]
            await asyncio.gather(*(live.close("draining") for live in done))
            await asyncio.sleep(DRAIN_POLL_S)
        await self.close()

    async def close(self) -> None:
        """Closes all of them."""
        self.accepting = False
        await asyncio.gather(*(live.close("server_closed") for live in self._open.values()))

    def _gauges(self) -> Iterator[Gauge]:
        found = []
        for live in self._open.values():
            try:
                found.append(live.session.stats())
            except LiveActError:
                continue
        states = ("waiting", "idling", "speaking", "ended", "failed", "closed")
        counts = [({"state": s}, sum(one.state == s for one in found)) for s in states]
        opening = len(self._admission.places) - len(self._open)
        yield "liveact_sessions", "By state.", [*counts, ({"state": "opening"}, opening)]
        for name, text, value in (
            ("liveact_sessions_max", "That may be open.", self.settings.max_sessions),
            ("liveact_tickets_waiting", "Clients in the queue.", self._admission.waiting),
            ("liveact_lag_seconds", "Of the session that is latest.", _most(found, "lag_s")),
            ("liveact_backlog_seconds", "Sound that waits.", sum(f.backlog_s for f in found)),
            ("liveact_latents_waiting", "Blocks.", sum(f.latents_waiting for f in found)),
            ("liveact_chunks_waiting", "Of pictures.", sum(f.chunks_waiting for f in found)),
        ):
            yield name, text, [({}, float(value))]
        free = zip(self._memory.names, self._memory.free(), strict=True)
        known = [({"pool": pool}, float(value)) for pool, value in free if value is not None]
        yield "liveact_memory_free_bytes", "For new sessions.", known
        yield from self._gpus.gauges()


def _most(found: list[Any], name: str) -> float:
    return max((getattr(one, name) for one in found), default=0.0)
