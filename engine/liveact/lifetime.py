"""How long something may be used: in the process that made it, and until it is closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from liveact.errors import LiveActError


class OneProcess:
    """A fork has the memory of its parent, but neither its threads nor its GPU: what waits for
    either would wait for ever."""

    def __init__(self, what: str) -> None:
        self._what, self._pid = what, os.getpid()

    def is_here(self) -> bool:
        """Whether this is still the process that it was made in."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises LiveActError in any other process. Takes no lock: one that another thread held
        when the process was forked stays locked."""
        if not self.is_here():
            raise LiveActError(
                f"{self._what}: expected the process that made it, found a fork of it (start "
                'processes with multiprocessing.get_context("spawn") and load in them)'
            )


class Lifetime:
    """Uses that end before it is over."""

    def __init__(self, what: str) -> None:
        self.process = OneProcess(what)
        self._what = what
        self._changed = threading.Condition()
        self._uses = 0
        self._over = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """Raises LiveActError once it is over, or in another process."""
        self.process.check()
        with self._changed:
            if self._over:
                raise LiveActError(f"{self._what}: expected an open one, found a closed one")
            self._uses += 1
        try:
            yield
        finally:
            with self._changed:
                self._uses -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """No more uses; returns when those that run have ended."""
        with self._changed:
            self._over = True
            self._changed.wait_for(lambda: self._uses == 0)
