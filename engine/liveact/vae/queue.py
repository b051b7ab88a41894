"""How a GPU is kept busy with the decoders of many sessions.

The calls of all streams of a VAE go through one `DecodeQueue`, as CUDA graphs, with copies to the
host that nobody waits for until the pictures are wanted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from liveact.errors import SessionError
from liveact.finite import NOT_FINITE

Call = Callable[[torch.Tensor], torch.Tensor]  # latents [16, t, h, w] → uint8 [4·t, 8·h, 8·w, 3]


class RecordedCall:
    """A decode call of t latent frames of one stream, with its input where the graph reads it.

    The first time it runs op by op, so that cuDNN chooses its algorithms and loads its kernels; the
    second time it is recorded; from then on it is one launch. `call` is given each time and not
    kept: it refers to the state that this belongs to, whose memory a cycle would hold.
    """

    def __init__(self, latents: torch.Tensor) -> None:
        self._latents = latents
        self._pictures: torch.Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._warm = False

    def __call__(self, latents: torch.Tensor, call: Call) -> torch.Tensor:
        """Enqueues the call on the current stream; the result is overwritten by the next."""
        self._latents.copy_(latents)
        if not self._warm:
            pictures = call(self._latents)
            self._warm = True
            return pictures
        if self._replay is None:
            self._pictures, self._replay = self.record(call, self._latents)
        self._replay()
        assert self._pictures is not None
        return self._pictures

    @staticmethod
    def record(call: Call, latents: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """(where the pictures will be, what makes them)."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (the denoise worker) may go on allocating. Graphs keep what they work in:
        # torch frees a pool with its graph.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            pictures = call(latents)
        finally:
            graph.capture_end()
        return pictures, graph.replay


class DecodeQueue:
    """The CUDA stream of one VAE. The denoise of the next block, which has a stream of its own of
    priority −1, goes first, unless `before_denoise`: `python -m benchmarks block` times both."""

    def __init__(self, device: torch.device, *, before_denoise: bool = False) -> None:
        self.stream = torch.cuda.Stream(device, priority=-2 if before_denoise else 0)
        self._lock = threading.RLock()

    @contextmanager
    def turn(self, given: torch.Tensor | None = None) -> Iterator[None]:
        """Only this thread works on the stream: what another one enqueued while a call is being
        recorded would become part of its graph. `given` was made on the stream outside."""
        with self._lock:
            if given is not None and given.is_cuda:
                self.stream.wait_stream(torch.cuda.current_stream(given.device))
                given.record_stream(self.stream)
            with torch.cuda.stream(self.stream):
                yield

    def hand_over(self, result: torch.Tensor) -> torch.Tensor:
        """`result`, made in the last turn, for the stream that is current now."""
        outside = torch.cuda.current_stream(self.stream.device)
        with self._lock:  # waiting makes an event on the stream, also in somebody's recording
            outside.wait_stream(self.stream)
        result.record_stream(outside)
        return result

    def decode(
        self,
        latents: torch.Tensor,
        calls: Callable[[torch.Tensor], Iterable[torch.Tensor]],
        enqueue: Call,
        total: torch.Tensor,
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Enqueues all `calls` of `latents` and their copies to the host, then waits for one after
        the other.

        Args:
            latents: [16, n, h, w], on any device.
            calls: cuts them into the parts [16, t, h, w] of the decoder's calls.
            enqueue: one call on the current stream; its result may be overwritten by the next.
            total: [] fp32 on the stream's device; no longer finite once a call gave a NaN or an
                infinity. It comes with the pictures, so that looking at it waits for nothing more.

        Raises SessionError instead of the pictures of such a call.
        """
        staged: list[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = []
        try:
            with self.turn(latents):
                # In one go: a copy from pageable memory may wait for what was enqueued before it.
                for part in calls(latents.to(self.stream.device)):
                    with torch.cuda.nvtx.range("decode"):
                        staged.append(self._to_host(enqueue(part), total))
            for index in range(len(staged)):  # no variable that would keep the last one
                yield _arrived(*staged[index])
        finally:
            # Pinned memory goes back to torch's pool with an event on the stream that it was used
            # on. In the recording of another decoder that would be an error of whoever asks next.
            with self._lock:
                staged.clear()

    def _to_host(
        self, pictures: torch.Tensor, total: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]:
        hosts = []
        for source in (pictures, total):
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            hosts.append(host.copy_(source, non_blocking=True))
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        return hosts[0], hosts[1], event


def _arrived(
    pictures: torch.Tensor, total: torch.Tensor, event: torch.cuda.Event
) -> npt.NDArray[np.uint8]:
    event.synchronize()
    check_finite(total)
    return pictures.numpy().copy()


def check_finite(total: torch.Tensor) -> None:
    """total [] on the CPU: the sum of all pictures. Raises SessionError where it is not finite."""
    if not math.isfinite(total.item()):
        raise SessionError(f"VAE: expected finite pictures, found {NOT_FINITE}")
