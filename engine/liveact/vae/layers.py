"""The layers of the Wan 2.1 video autoencoder, each causal in time.

Reading order: `CausalConv3d` in ops.py, `CausalState` in state.py (how it remembers), the
blocks, then `Encoder` and `Decoder`. A block takes what the convolution before it left (`Pending`),
and leaves one itself.

Frames are [t, H, W, C], t being the few frames of one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from liveact.vae.ops import CausalConv3d, Pending
from liveact.vae.state import CausalState, EncoderState, Use


class RMSNorm(nn.Module):
    """The gain of a norm, see `TorchOps.norm`."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * spatial_dims))

    @property
    def gain(self) -> torch.Tensor:
        """[C]."""
        return self.gamma.flatten()


class Block(nn.Module):
    """A layer whose `forward(x: Pending, state: CausalState)` leaves a `Pending`."""

    def plan(self, t: int, height: int, width: int) -> Iterator[Use]:
        """Its causal convolutions for t input frames of this size."""
        yield from ()


class ResidualBlock(Block):
    """Two times norm → SiLU → causal 3×3×3 convolution, added to the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels_in, 3)
        self.conv1 = CausalConv3d(channels_in, channels_out, (3, 3, 3))
        self.norm2 = RMSNorm(channels_out, 3)
        self.conv2 = CausalConv3d(channels_out, channels_out, (3, 3, 3))
        self.shortcut = (
            nn.Conv3d(channels_in, channels_out, 1) if channels_in != channels_out else None
        )

    def forward(self, x: Pending, state: CausalState) -> Pending:
        """[t, H, W, C] → [t, H, W, C']."""
        hidden, skip = state.convolve(self.conv1, x, self.norm1.gain, keep=True)
        assert skip is not None
        hidden, _ = state.convolve(self.conv2, hidden, self.norm2.gain)
        return hidden.plus(skip if self.shortcut is None else state.ops.linear(self.shortcut, skip))

    def plan(self, t: int, height: int, width: int) -> Iterator[Use]:
        yield Use(self.conv1, t, height, width)
        yield Use(self.conv2, t, height, width)


class FrameAttention(Block):
    """Self-attention with one head among the positions of each frame; frames do not mix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Pending, state: CausalState) -> Pending:
        """[t, H, W, C] → same shape."""
        ops = state.ops
        frames = ops.settle(x, keep=True)
        assert frames is not None
        qkv = ops.linear(self.to_qkv, ops.norm(frames, self.norm.gain))
        q, k, v = qkv.flatten(1, 2).unsqueeze(1).chunk(3, dim=-1)  # [t, 1, H·W, C] each
        mixed = F.scaled_dot_product_attention(q, k, v).view(frames.shape)
        return ops.project(self.proj, mixed).plus(frames)


class Downsample(Block):
    """Halves height and width; with a temporal convolution, the frames after the first as well."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resize = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=2) if temporal else None

    def forward(self, x: Pending, state: CausalState) -> Pending:
        """[t, H, W, C] → [t', H/2, W/2, C]; t' = 1 in the first call, else t or t/2."""
        frames = state.ops.settle(x, keep=True)
        assert frames is not None
        halved = state.ops.downsample(self.resize, frames)
        if self.time_conv is None:
            return halved
        if state.started:
            return state.convolve(self.time_conv, halved)[0]
        state.start(self.time_conv, halved.value)  # the first frame of a video passes as it is
        return halved

    def plan(self, t: int, height: int, width: int) -> Iterator[Use]:
        if self.time_conv is not None:
            yield Use(self.time_conv, t, height // 2, width // 2)


class Upsample(Block):
    """Doubles height and width and halves the channels; with a temporal convolution, doubles the
    frames after the first as well."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resize = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Pending, state: CausalState) -> Pending:
        """[t, H, W, C] → [t', 2H, 2W, C/2]; t' = 1 in the first call, else t or 2t."""
        # NOTE: the first frame is not doubled, and the temporal convolution never sees it: its past
        # starts as zeros at the second frame.
        if self.time_conv is not None and state.started:
            doubled, _ = state.convolve(self.time_conv, x)
            x = Pending(doubled.value, doubled.bias, order="frames")
        frames = state.ops.settle(x, keep=True)
        assert frames is not None
        return state.ops.upsample(self.resize, frames)

    def plan(self, t: int, height: int, width: int) -> Iterator[Use]:
        if self.time_conv is not None:
            yield Use(self.time_conv, t, height, width)


class Encoder(nn.Module):
    """Pictures to latent moments: levels of residual blocks, each ended by a `Downsample`."""

    def __init__(self, channels_in: int, channels_out: int, width: int, levels: nn.ModuleList):
        super().__init__()
        inner = _width_after(width, levels)
        self.conv_in = CausalConv3d(channels_in, width, (3, 3, 3))
        self.downsamples = levels
        self.middle = _middle(inner)
        self.norm_out = RMSNorm(inner, 3)
        self.conv_out = CausalConv3d(inner, channels_out, (3, 3, 3))

    def forward(self, frames: torch.Tensor, state: EncoderState) -> torch.Tensor:
        """frames [t, H, W, 3], t = 1 in the first call, then 4 → [1, H/8, W/8, 2·16]."""
        x = Pending(frames)
        for index, stage in enumerate(self._stages()):
            x = state.once(index, x, partial(self._run, stage, state))
        state.started = True
        return x.value

    def _stages(self) -> list[list[nn.Module]]:
        """The layers in order, cut after each `Downsample`."""
        stages: list[list[nn.Module]] = [[self.conv_in]]
        for block in _blocks(self.downsamples):
            stages[-1].append(block)
            if isinstance(block, Downsample):
                stages.append([])
        stages[-1] += [*self.middle, self.conv_out]
        return stages

    def _run(self, stage: list[nn.Module], state: EncoderState, x: Pending) -> Pending:
        for block in stage:
            if isinstance(block, CausalConv3d):
                gamma = self.norm_out.gain if block is self.conv_out else None
                x, _ = state.convolve(block, x, gamma)
            else:
                x = block(x, state)
        return x

    def plan(self, t: int, height: int, width: int) -> list[Use]:
        """The causal convolutions for t input frames of this size."""
        uses = [Use(self.conv_in, t, height, width)]
        for block in _blocks(self.downsamples):
            uses += block.plan(t, height, width)
            if isinstance(block, Downsample):
                height, width = height // 2, width // 2
                t = t if block.time_conv is None else t // 2
        for block in _blocks(self.middle):
            uses += block.plan(t, height, width)
        return [*uses, Use(self.conv_out, t, height, width)]


class Decoder(nn.Module):
    """Latents to pictures: the mirror of `Encoder`, levels ended by an `Upsample`."""

    def __init__(self, channels_in: int, channels_out: int, width: int, levels: nn.ModuleList):
        super().__init__()
        outer = _width_after(width, levels)
        self.conv_in = CausalConv3d(channels_in, width, (3, 3, 3))
        self.middle = _middle(width)
        self.upsamples = levels
        self.norm_out = RMSNorm(outer, 3)
        self.conv_out = CausalConv3d(outer, channels_out, (3, 3, 3))

    def forward(self, frames: torch.Tensor, state: CausalState) -> Pending:
        """frames [t, h, w, 16], t = 1 in the first call → [1 in the first call, then 4·t, 8·h, 8·w,
        3], as the last convolution leaves it."""
        x, _ = state.convolve(self.conv_in, Pending(frames))
        for block in _blocks(self.middle, self.upsamples):
            x = block(x, state)
        x, _ = state.convolve(self.conv_out, x, self.norm_out.gain)
        state.started = True
        return x

    def plan(self, t: int, height: int, width: int) -> list[Use]:
        """The causal convolutions for t latent frames of this size."""
        uses = [Use(self.conv_in, t, height, width)]
        for block in _blocks(self.middle, self.upsamples):
            uses += block.plan(t, height, width)
            if isinstance(block, Upsample):
                height, width = 2 * height, 2 * width
                t = t if block.time_conv is None else 2 * t
        return [*uses, Use(self.conv_out, t, height, width)]


def _middle(width: int) -> nn.ModuleList:
    blocks = [ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)]
    return nn.ModuleList(blocks)


def _blocks(*lists: nn.ModuleList) -> list[Block]:
    return [cast(Block, block) for blocks in lists for block in blocks]


def _width_after(width: int, levels: nn.ModuleList) -> int:
    """Channels that come out of a list of levels that `width` channels go into."""
    for block in levels:
        if isinstance(block, ResidualBlock):
            width = block.conv2.weight.shape[0]
        elif isinstance(block, Upsample):
            width = block.resize.out_channels
    return width
