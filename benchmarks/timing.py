"""How long a call of torch takes on a device, without what the host needs to issue it.

On a GPU every sample is: write a buffer larger than the L2 cache, [the call,] event, the call,
event. The write empties the cache of what the call will read (`cold`), or, with the call once
before the first event, of nothing (`warm`: what fits into the cache is there). In both it keeps the
GPU busy while the host issues the rest, so a kernel of 5 µs is not measured as its 10 µs of launch.
The runtime's own ops are timed in the same way (csrc/measure/timed.cpp).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

T = TypeVar("T")
P = ParamSpec("P")

# Several times the L2 of an H200 (50 MB); on the CPU, of what two cores have for themselves.
FLUSH_BYTES = {"cuda": 512 << 20, "cpu": 32 << 20}


class Clock:
    """Times calls on one device; holds the buffer that empties the cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def samples_ms(self, call: Callable[[], object], count: int, *, cold: bool) -> list[float]:
        """`count` times of one call each. The first call, which may compile, is not among them."""
        call()
        self.synchronize()
        return [self._sample_ms(call, cold) for _ in range(count)]

    def _sample_ms(self, call: Callable[[], object], cold: bool) -> float:
        self._buffer.zero_()
        if not cold:
            call()
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def block(self, call: Callable[P, T], *given: P.args, **named: P.kwargs) -> tuple[T, float]:
        """The result of one long call and its milliseconds by the host's clock, with everything it
        started finished."""
        self.synchronize()
        start = time.perf_counter()
        result = call(*given, **named)
        self.synchronize()
        return result, 1e3 * (time.perf_counter() - start)
