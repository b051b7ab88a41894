"""A stream of the decoder: its state, and how a GPU is kept busy with many of them.

`DecoderState` is what a session holds. On a GPU the calls of all streams of a VAE go through one
`DecodeQueue`, as CUDA graphs, with copies to the host that nobody waits for until the pictures are
wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from liveact.errors import InputError, LiveActError
from liveact.vae.layers import Decoder
from liveact.vae.ops import Pending, TorchOps
from liveact.vae.state import CausalState

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


class DecoderState(CausalState):
    """Of one session: made by `WanVAE.open_decoder`, used by one thread at a time.

    Attributes:
        frames_per_call: latent frames that go through the decoder at a time, after the first.
        latent_size: (h, w) of the stream; None before the first latents.
        recorded: latent frames of a call → the call as a CUDA graph (GPU only).
        turn: where memory is made and changed: torch reuses it in the order of a stream.
    """

    def __init__(
        self,
        ops: TorchOps,
        decoder: Decoder,
        frames_per_call: int,
        device: torch.device,
        turn: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(ops)
        self.frames_per_call = frames_per_call
        self.latent_size: tuple[int, int] | None = None
        self.recorded: dict[int, RecordedCall] = {}
        self.turn = turn
        self._device = device
        self._decoder = decoder
        self._names = {module: name for name, module in decoder.named_modules()}
        self._in_call = False

    def open(self, latent_size: tuple[int, int]) -> None:
        """Allocates everything for latents of this size, unless it is there already."""
        plan = self._decoder.plan(self.frames_per_call, *latent_size)
        if [use.shape for use in plan] != [tuple(b.shape) for b in self._buffers.values()]:
            self.close()  # first, so that the old buffers are not held beside the new ones
            with self.turn():
                self.allocate(plan, self._device)
        self.latent_size = latent_size

    def calls(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """latents [16, n, h, w] → the parts [16, t, h, w] of the decoder's calls; to be taken one
        by one, as each call has to know whether there was one before."""
        start = 0
        while start < latents.shape[1]:
            stop = start + (self.frames_per_call if self.started else 1)
            yield latents[:, start:stop]
            start = stop

    def run(self, frames: torch.Tensor) -> Pending:
        """One call of the decoder. frames [t, h, w, 16]; see `Decoder.forward`."""
        self.check_whole()
        self._in_call = True
        result: Pending = self._decoder(frames, self)
        self._in_call = False
        return result

    def check_whole(self) -> None:
        """Raises LiveActError after a call that failed half way: some convolutions remember its
        frames, the others those before."""
        if self._in_call:
            raise LiveActError("decoder: expected a reset or restore after a failed call, got none")

    def reset(self) -> None:
        """The next latent frame is the first of a new video, which may be of another size."""
        self.started = self._in_call = False
        self.latent_size = None
        with self.turn():
            for conv, buffer in self._buffers.items():
                buffer[: conv.past_frames].zero_()

    def close(self) -> None:
        """Frees the memory. As after a reset, latents may follow."""
        with self.turn():
            self.recorded.clear()
            self._buffers = {}
        self.reset()

    def save(self) -> dict[str, Any]:
        """All that `restore` needs, on the CPU: {"latent_size", "started", "past": name → [frames,
        H, W, C]}. Picklable."""
        self.check_whole()
        with self.turn():
            past = {
                self._names[conv]: buffer[: conv.past_frames].cpu().clone()
                for conv, buffer in self._buffers.items()
            }
        return {"latent_size": self.latent_size, "started": self.started, "past": past}

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on where `save` was called, in this or another state of the same VAE, whatever its
        frames_per_call.

        Raises InputError, and changes nothing, for a state of another VAE.
        """
        if saved["latent_size"] is None:
            return self.reset()
        plan = self._decoder.plan(self.frames_per_call, *saved["latent_size"])
        expected = {self._names[u.conv]: (u.conv.past_frames, *u.shape[1:]) for u in plan}
        found = {name: tuple(frames.shape) for name, frames in saved["past"].items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise InputError(
                    f"decoder state: expected frames of shape {expected.get(name)} for {name}, "
                    f"found {found.get(name)}"
                )
        self.open(saved["latent_size"])
        with self.turn():
            for conv, buffer in self._buffers.items():
                buffer[: conv.past_frames].copy_(saved["past"][self._names[conv]])
        self.started, self._in_call = saved["started"], False

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers, in bytes; the same from the first frame of a video on."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class DecodeQueue:
    """The CUDA stream of one VAE. Its priority is the lowest: the denoise of the next block, which
    has a stream of its own, goes first."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=0)
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
        outside.wait_stream(self.stream)
        result.record_stream(outside)
        return result

    def decode(
        self, latents: torch.Tensor, state: DecoderState, call: Call
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Enqueues all calls of `latents` and their copies to the host, then waits for one after
        the other."""
        staged = []
        with self.turn(latents):
            # In one go: a copy from pageable memory may wait for what was enqueued before it.
            for part in state.calls(latents.to(self.stream.device)):
                with torch.cuda.nvtx.range("decode"):
                    staged.append(self._to_host(self._enqueue(part, state, call)))
        for host, event in staged:
            event.synchronize()
            yield host.numpy().copy()  # the pinned memory goes back to torch's pool

    def _enqueue(self, part: torch.Tensor, state: DecoderState, call: Call) -> torch.Tensor:
        if not state.started:  # once per video, and not like the others
            return call(part)
        frames = part.shape[1]
        if frames not in state.recorded:
            buffer = torch.empty(part.shape, device=self.stream.device)
            state.recorded[frames] = RecordedCall(buffer)
        return state.recorded[frames](part, call)

    def _to_host(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        host = torch.empty(pictures.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(pictures, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        return host, event
