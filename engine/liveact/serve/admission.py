"""Who may open a session now, and who waits for how many others: by number and by memory."""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from liveact.serve.errors import Refused

KEPT_FOR = 3  # a ticket lives for so many of the times after which it should be sent again


class Memory(Protocol):
    """What is free, and what sessions need; see `liveact.serve.memory`."""

    def fits(self, needed: tuple[int, ...], promised: list[tuple[int, ...]]) -> bool:
        """Whether `needed` is free beside what was promised to others."""


class Place:
    """The right to one open session; `release` gives it back, any number of times.

    Attributes:
        needed: bytes of the session in each pool of memory.
        allocated: bytes of that which the session has by now; set by who holds the place.
    """

    def __init__(self, admission: Admission, needed: tuple[int, ...]) -> None:
        self._admission: Admission | None = admission
        self.needed = needed
        self.allocated: Callable[[], tuple[int, ...]] = lambda: (0,) * len(needed)

    @property
    def promised(self) -> tuple[int, ...]:
        """Bytes that the session will allocate yet."""
        pairs = zip(self.needed, self.allocated(), strict=True)
        return tuple(max(0, needed - allocated) for needed, allocated in pairs)

    def release(self) -> None:
        """Somebody else may have it."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.places.discard(self)


@dataclass(eq=False)
class _Ticket:
    """Somebody who waits."""

    seen_s: float  # when it was made or sent last
    is_used: bool = False  # it was sent again


class Admission:
    """Places for sessions and a bounded queue for them. For one event loop.

    Who is refused gets a ticket. Sent again in time, it keeps its place in the queue; whoever is
    ahead of it is served first. One that was never sent again keeps nobody else out: clients that
    do not know of tickets would lock the door with those they left.

    Attributes:
        places: of sessions that are open or being opened.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        max_sessions: int,
        max_waiting: int,
        retry_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory, self._clock = memory, clock
        self._max_sessions, self._max_waiting = max_sessions, max_waiting
        self._retry_s = retry_s
        self._tickets: OrderedDict[str, _Ticket] = OrderedDict()  # those who came first, first
        self.places: set[Place] = set()

    @property
    def waiting(self) -> int:
        """Tickets that are alive."""
        self._forget()
        return len(self._tickets)

    def enter(self, needed: tuple[int, ...], ticket: str | None = None) -> Place:
        """A place for a session that needs so many bytes. Raises Refused with a ticket."""
        self._forget()
        known = None if ticket is None else self._tickets.get(ticket)
        if known is not None:
            known.seen_s, known.is_used = self._clock(), True
        ahead = list(self._tickets.values())
        if known is not None:
            ahead = ahead[: ahead.index(known)]
        free = self._max_sessions - len(self.places)
        fits = self._memory.fits(needed, [place.promised for place in self.places])
        if not self.places and not fits:
            raise Refused(503, "no_memory", "session: expected memory for it, found too little")
        if fits and sum(one.is_used for one in ahead) < free:
            self._tickets.pop(ticket or "", None)
            place = Place(self, needed)
            self.places.add(place)
            return place
        raise self._full(len(ahead), ticket if known is not None else None)

    def _full(self, ahead: int, ticket: str | None) -> Refused:
        if ticket is None and len(self._tickets) < self._max_waiting:
            ticket = secrets.token_urlsafe(12)
            self._tickets[ticket] = _Ticket(self._clock())
        return Refused(
            503,
            "full",
            f"session: expected a free place, found {ahead} waiting before",
            {"Retry-After": str(math.ceil(self._retry_s))},
            position=ahead + 1,
            ticket=ticket,
        )

    def _forget(self) -> None:
        """Tickets that nobody sent again."""
        dead_s = self._clock() - KEPT_FOR * self._retry_s
        for name in [name for name, found in self._tickets.items() if found.seen_s < dead_s]:
            del self._tickets[name]
