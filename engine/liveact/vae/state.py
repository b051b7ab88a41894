"""What the VAE remembers between calls: the last input frames of every convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from liveact.vae.ops import CausalConv3d, Pending, TorchOps


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

    def fits(self, plan: list[Use]) -> bool:
        """Whether the buffers are those of this plan."""
        return [use.shape for use in plan] == [tuple(b.shape) for b in self._buffers.values()]

    def clear(self) -> None:
        """Forgets all frames; the buffers stay."""
        for conv, buffer in self._buffers.items():
            buffer[: conv.past_frames].zero_()

    def release(self) -> None:
        """Lets go of the buffers."""
        self._buffers = {}

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers, in bytes. Any thread."""
        return sum(buffer.nbytes for buffer in list(self._buffers.values()))

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
