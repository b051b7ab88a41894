"""What a stream of the VAE remembers between calls: the last input frames of every convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from liveact.errors import InputError, LiveActError
from liveact.vae_ops import Pending, TorchOps

if TYPE_CHECKING:
    from liveact.vae_modules import CausalConv3d, Decoder
    from liveact.vae_queue import RecordedCall


class Use(NamedTuple):
    """One causal convolution in one call: how many input frames, and their height and width."""

    conv: CausalConv3d
    frames: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its buffer: the frames that it remembers, then those of the call."""
        channels = self.conv.weight.shape[1]
        return self.conv.past_frames + self.frames, self.height, self.width, channels


class CausalState:
    """The last input frames of every causal convolution, in the buffer that the convolution reads.

    A buffer holds the remembered frames, then room for those of one call. Whatever comes before the
    convolution writes its result there; afterwards the last frames move to the front. Nothing is
    padded, concatenated or allocated from call to call.

    Attributes:
        started: whether a first frame went through.
    """

    def __init__(self, ops: TorchOps) -> None:
        self.ops = ops
        self.started = False
        self._buffers: dict[CausalConv3d, torch.Tensor] = {}

    def allocate(self, plan: list[Use], device: torch.device) -> None:
        """Makes the buffers, for calls of up to as many frames as the plan says."""
        self._buffers = {
            use.conv: torch.zeros(use.shape, dtype=self.ops.dtype, device=device) for use in plan
        }

    def convolve(
        self,
        conv: CausalConv3d,
        x: Pending,
        gamma: torch.Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Pending, torch.Tensor | None]:
        """conv(SiLU(norm(x) · gamma)), or conv(x) without gamma; and x itself where `keep`."""
        frames = x.shape[0]
        window = self._buffers[conv][: conv.past_frames + frames]
        kept = self.ops.settle(x, window[conv.past_frames :], gamma, keep)
        result = self.ops.convolve(conv, window)
        self._advance(window, conv.past_frames)
        return result, kept

    def _advance(self, window: torch.Tensor, past: int) -> None:
        frames = len(window) - past
        if frames >= past:
            window[:past].copy_(window[frames:])
        else:  # source and target overlap
            for i in range(past):
                window[i].copy_(window[frames + i])

    def start(self, conv: CausalConv3d, frames: torch.Tensor) -> None:
        """Makes `frames` [past_frames, H, W, C] what the next call of `conv` remembers."""
        self._buffers[conv][: conv.past_frames].copy_(frames)


class _Repeat(NamedTuple):
    """The last call of a stage of the encoder."""

    given: torch.Tensor
    result: Pending
    steady: bool  # the call left the state as it had found it


class EncoderState(CausalState):
    """Of one video. A stage that is given the same frames in the same state as in the call before
    gives the same result, bit for bit, and is not run again.

    The video that a session starts from is a picture and 52 frames of zeros: the full-resolution
    stage sees nothing of the picture from its 12th frame on, the next from its 20th.
    """

    def __init__(self, ops: TorchOps) -> None:
        super().__init__(ops)
        self.reused = 0  # stages that were not run
        self._steady = True
        self._repeats: dict[int, _Repeat] = {}

    def once(self, stage: int, x: Pending, run: Callable[[Pending], Pending]) -> Pending:
        """run(x), or what it gave the last time."""
        last = self._repeats.get(stage)
        if last is not None and last.steady and torch.equal(last.given, x.value):
            self.reused += 1
            return last.result
        self._steady = self.started  # the first call takes another way through the layers
        result = run(x)
        self._repeats[stage] = _Repeat(x.value, result, self._steady)
        return result

    def _advance(self, window: torch.Tensor, past: int) -> None:
        same = torch.equal(window[:past], window[len(window) - past :])
        self._steady = self._steady and same
        super()._advance(window, past)


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
