"""A bounded queue between two workers that can be closed and emptied at any moment."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class ClosedError(Exception):
    """The queue was closed: nothing more goes in or comes out."""


class BoundedQueue(Generic[T]):
    """First in, first out; `put` waits while `capacity` items are in it, `get` while none is.

    `finish` lets the items drain and then ends it for the reader, `close` ends it at once for both
    sides; either wakes whoever waits.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._finished = False

    def put(self, item: T) -> None:
        """Raises ClosedError once the queue was closed or finished."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed or self._finished:
                raise ClosedError
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout_s: float | None = None) -> T:
        """Raises ClosedError when closed, or finished and empty; TimeoutError after timeout_s."""
        with self._changed:
            ready = self._changed.wait_for(
                lambda: self._closed or self._items or self._finished, timeout_s
            )
            if not ready:
                raise TimeoutError
            if self._closed or not self._items:
                raise ClosedError
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def sum(self, weight: Callable[[T], int]) -> int:
        """Of what is in it."""
        with self._changed:
            return sum(weight(item) for item in self._items)

    @property
    def is_drained(self) -> bool:
        """Whether it was finished and everything was taken."""
        with self._changed:
            return self._finished and not self._items

    def clear(self) -> None:
        """Drops what is in it."""
        with self._changed:
            self._items.clear()
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return len(self._items)
