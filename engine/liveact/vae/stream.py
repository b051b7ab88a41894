"""One session's decoder: latents in, pictures out, with what the convolutions remember between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from liveact.errors import InputError, LiveActError
from liveact.vae.ops import Pending
from liveact.vae.queue import RecordedCall
from liveact.vae.state import CausalState

if TYPE_CHECKING:
    from liveact.vae.vae import Vae

LATENT_CHANNELS = 16
MAX_FRAMES_PER_CALL = 8


def size_of(latents: torch.Tensor) -> tuple[int, int]:
    """(h, w) of latents [16, n, h, w]; InputError if they are not of this form."""
    if latents.dim() != 4 or latents.shape[0] != LATENT_CHANNELS or 0 in latents.shape:
        raise InputError(
            f"latents: expected [{LATENT_CHANNELS}, n, h, w], found {list(latents.shape)}"
        )
    return latents.shape[2], latents.shape[3]


class VaeStream:
    """Decodes block after block of one session with all caches kept: exact, no seams, nothing
    twice. Made by `Vae.open_stream`, used by one thread at a time.

    Splitting the latents over several calls changes nothing.

    Attributes:
        frames_per_call: latent frames that go through the decoder at a time, after the first.
        latent_size: (h, w) of the stream; None before the first latents.
    """

    def __init__(self, vae: Vae, frames_per_call: int = 1) -> None:
        if not 1 <= frames_per_call <= MAX_FRAMES_PER_CALL:
            raise InputError(
                f"frames_per_call: expected 1 to {MAX_FRAMES_PER_CALL}, found {frames_per_call}"
            )
        self._vae = vae
        self.frames_per_call = frames_per_call
        self.latent_size: tuple[int, int] | None = None
        self._state = CausalState(vae.decoder_ops)
        self._recorded: dict[int, RecordedCall] = {}  # latent frames of a call → its CUDA graph
        self._in_call = False

    def decode(self, latents: torch.Tensor) -> Iterator[npt.NDArray[np.uint8]]:
        """The pictures of the next latent frames, call after call.

        On a CPU each call is made when its piece is asked for; abandoning the iterator leaves the
        stream after the last piece taken. On a GPU all calls are enqueued, each with its copy to
        the host behind it, before the first piece is waited for; an iterator abandoned then leaves
        the stream after all of them.

        Args:
            latents: [16, n, h, w], normalised; any format, layout and device.

        Returns:
            An iterator over pieces, each [4·t, 8·h, 8·w, 3] uint8 RGB for t latent frames, the
            caller's to keep; the very first piece of a video is one picture.

        Raises InputError for latents of another form or size than before, LiveActError after a call
        that failed.
        """
        self._enter(latents)
        queue = self._vae.queue
        if queue is not None:
            return queue.decode(latents, self._calls, self._enqueue)
        return (self._pictures(part).numpy() for part in self._calls(latents))

    def decode_video(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """The next latent frames as video before it is made of pictures.

        Returns:
            An iterator over pieces [3, 4·t, 8·h, 8·w] float32, not clamped to [−1, 1]; each call is
            made when its piece is asked for.

        Arguments and errors are those of `decode`.
        """
        self._enter(latents)
        return self._videos(latents)

    def reset(self) -> None:
        """The next latent frame is the first of a new video, which may be of another size."""
        self._state.started = self._in_call = False
        self.latent_size = None
        with self._turn():
            self._state.clear()

    def close(self) -> None:
        """Frees the memory. Latents may follow, of a new video."""
        self._free()
        self.reset()

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers, in bytes; the same from the first frame of a video on."""
        return self._state.size_bytes

    # ------------------------------------------------------------------------------ inside

    def _enter(self, latents: torch.Tensor) -> None:
        size = size_of(latents)
        if self.latent_size not in (None, size):
            raise InputError(
                f"latents: expected height and width {self.latent_size} as before, found {size}"
            )
        self._check_whole()
        if self.latent_size is None:
            self._open(size)

    def _open(self, latent_size: tuple[int, int]) -> None:
        """Allocates everything for latents of this size, unless it is there already."""
        plan = self._vae.decoder.plan(self.frames_per_call, *latent_size)
        if not self._state.fits(plan):
            self._free()  # first, so that the old buffers are not held beside the new ones
            with self._turn():
                self._state.allocate(plan, self._vae.device)
        self.latent_size = latent_size

    def _free(self) -> None:
        with self._turn():
            self._recorded.clear()
            self._state.release()

    def _turn(self) -> AbstractContextManager[None]:
        """Where memory is made and changed: torch reuses it in the order of a CUDA stream."""
        return nullcontext() if self._vae.queue is None else self._vae.queue.turn()

    def _calls(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """latents [16, n, h, w] → the parts [16, t, h, w] of the decoder's calls; to be taken one
        by one, as each call has to know whether there was one before."""
        start = 0
        while start < latents.shape[1]:
            stop = start + (self.frames_per_call if self._state.started else 1)
            yield latents[:, start:stop]
            start = stop

    def _videos(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        queue, ops = self._vae.queue, self._vae.decoder_ops
        for part in self._calls(latents):
            with nullcontext() if queue is None else queue.turn(part):
                video = ops.video(self._run(part))
            yield video if queue is None else queue.hand_over(video)

    def _pictures(self, part: torch.Tensor) -> torch.Tensor:
        """part [16, t, h, w] → uint8 [4·t, 8·h, 8·w, 3]."""
        return self._vae.decoder_ops.pictures(self._run(part))

    def _enqueue(self, part: torch.Tensor) -> torch.Tensor:
        """`_pictures` on the current CUDA stream, as a graph where it repeats."""
        if not self._state.started:  # once per video, and not like the others
            return self._pictures(part)
        frames = part.shape[1]
        if frames not in self._recorded:
            buffer = torch.empty(part.shape, device=self._vae.device)
            self._recorded[frames] = RecordedCall(buffer)
        return self._recorded[frames](part, self._pictures)

    @torch.no_grad()
    def _run(self, part: torch.Tensor) -> Pending:
        """One call of the decoder: part [16, t, h, w] → what its last convolution leaves."""
        self._check_whole()
        self._in_call = True
        result: Pending = self._vae.decoder(self._vae.decoder_input(part), self._state)
        self._in_call = False
        return result

    def _check_whole(self) -> None:
        """Raises LiveActError after a call that failed half way: some convolutions remember its
        frames, the others those before."""
        if self._in_call:
            raise LiveActError("decoder: expected a reset after a failed call, found none")
