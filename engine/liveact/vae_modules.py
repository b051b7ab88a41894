"""The layers of the Wan 2.1 video autoencoder, each causal in time.

Reading order: `CausalState` and `CausalConv3d` (how a convolution remembers), the blocks, then
`Encoder` and `Decoder`. Nothing here counts calls: a convolution finds its own past in the state
under itself, and a block knows the first frame of a video by there being no past yet.

Tensors are [1, C, t, H, W], t being the few frames of one call.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class CausalState:
    """What one stream remembers: the last input frames of every causal convolution.

    Attributes:
        past: convolution → its last `past_frames` input frames, [1, C, past_frames, H, W].
        latent_size: (h, w) of the latents decoded so far; None before the first.
    """

    def __init__(self) -> None:
        self.past: dict[CausalConv3d, torch.Tensor] = {}
        self.latent_size: tuple[int, int] | None = None

    def reset(self) -> None:
        """Forgets everything: the next frame is the first of a new video."""
        self.past.clear()
        self.latent_size = None

    @property
    def size_bytes(self) -> int:
        """Memory held, in bytes; the same from the first frame of a video on."""
        return sum(frames.nbytes for frames in self.past.values())


class CausalConv3d(nn.Module):
    """3D convolution whose output frame depends on its own and earlier input frames only.

    `past_frames` = kernel − stride in time is how many input frames of the previous call the
    first output of the next call reaches back to. Before the first call they are zeros.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: tuple[int, int, int], stride: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, *kernel))
        self.bias = nn.Parameter(torch.empty(channels_out))
        self.stride = (stride, 1, 1)
        self.padding = (0, kernel[1] // 2, kernel[2] // 2)
        self.past_frames = kernel[0] - stride
        self._folded: torch.Tensor | None = None  # [C', 3·C, 3, 3], weights being immutable

    def start(self, x: torch.Tensor, state: CausalState) -> None:
        """Makes the last frames of `x`, zeros where it is too short, the past of the next call."""
        missing = max(0, self.past_frames - x.shape[2])
        x = x[:, :, x.shape[2] + missing - self.past_frames :]
        state.past[self] = F.pad(x, (0, 0, 0, 0, missing, 0)).clone()

    def forward(self, x: torch.Tensor, state: CausalState) -> torch.Tensor:
        """x [1, C, t, H, W] → [1, C', t / stride, H, W]; the state moves t frames on."""
        if self not in state.past:
            self.start(x[:, :, :0], state)
        x = torch.cat([state.past[self], x], dim=2)  # [1, C, past + t, H, W]
        # Cloned: a view would keep all t frames alive between calls.
        state.past[self] = x[:, :, x.shape[2] - self.past_frames :].clone()
        if x.device.type == "cpu" and self.weight.shape[2:] == (3, 3, 3):
            return self._as_2d(x)
        return F.conv3d(x, self.weight, self.bias, self.stride, self.padding)

    def _as_2d(self, x: torch.Tensor) -> torch.Tensor:
        """The same as one 2D convolution with three frames side by side in the channels.

        NOTE: on the CPU torch runs a small conv3d at 3 to 17 GFLOP/s, the 2D one at 25 to 90
        (8 or 16 channels); from about 100 channels on they are alike.
        """
        if self._folded is None:
            out, channels = self.weight.shape[:2]
            self._folded = self.weight.transpose(1, 2).reshape(out, 3 * channels, 3, 3)
        t = x.shape[2] - self.past_frames
        frames = _as_frames(x)  # [past + t, C, H, W]
        wide = torch.cat([frames[i : i + t] for i in range(3)], dim=1)  # [t, 3·C, H, W]
        return _as_video(F.conv2d(wide, self._folded, self.bias, padding=self.padding[1:]))


class RMSNorm(nn.Module):
    """Each position scaled to a root mean square of 1 over its channels, times gamma."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * spatial_dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, C, …] → same shape."""
        norm = x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)  # [n, 1, …]
        return x * (math.sqrt(x.shape[1]) / norm) * self.gamma


class ResidualBlock(nn.Module):
    """Two times norm → SiLU → causal 3×3×3 convolution, added to the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels_in, 3)
        self.conv1 = CausalConv3d(channels_in, channels_out, (3, 3, 3))
        self.norm2 = RMSNorm(channels_out, 3)
        self.conv2 = CausalConv3d(channels_out, channels_out, (3, 3, 3))
        self.shortcut = (
            nn.Conv3d(channels_in, channels_out, 1)
            if channels_in != channels_out
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor, state: CausalState) -> torch.Tensor:
        """x [1, C, t, H, W] → [1, C', t, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)), state)
        hidden = self.conv2(F.silu(self.norm2(hidden)), state)
        out: torch.Tensor = self.shortcut(x) + hidden
        return out


class FrameAttention(nn.Module):
    """Self-attention with one head among the positions of each frame; frames do not mix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, state: CausalState) -> torch.Tensor:
        """x [1, C, t, H, W] → same shape; needs nothing of the state."""
        frames = _as_frames(x)  # [t, C, H, W]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # [t, H·W, 3·C]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # [t, 1, H·W, C] each
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # [t, H·W, C]
        mixed = self.proj(mixed.transpose(1, 2).reshape(frames.shape))
        return x + _as_video(mixed)


class Downsample(nn.Module):
    """Halves height and width; with a temporal convolution, the frames after the first as well."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resize = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=2) if temporal else None

    def forward(self, x: torch.Tensor, state: CausalState) -> torch.Tensor:
        """x [1, C, t, H, W] → [1, C, t', H/2, W/2]; t' = 1 in the first call, else t or t/2."""
        frames = F.pad(_as_frames(x), (0, 1, 0, 1))  # right and bottom only
        x = _as_video(self.resize(frames))
        if self.time_conv is None:
            return x
        if self.time_conv not in state.past:  # the first frame of a video passes as it is
            self.time_conv.start(x, state)
            return x
        halved: torch.Tensor = self.time_conv(x, state)
        return halved


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with a temporal convolution, doubles the
    frames after the first as well."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resize = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: torch.Tensor, state: CausalState) -> torch.Tensor:
        """x [1, C, t, H, W] → [1, C/2, t', 2H, 2W]; t' = 1 in the first call, else t or 2t."""
        if self.time_conv is not None:
            if self.time_conv in state.past:
                x = self._double_frames(self.time_conv(x, state))
            else:
                # NOTE: the first frame is not doubled, and the temporal convolution never sees
                # it: its past starts as zeros at the second frame.
                self.time_conv.start(x[:, :, :0], state)
        frames = F.interpolate(_as_frames(x), scale_factor=2.0, mode="nearest-exact")
        return _as_video(self.resize(frames))

    @staticmethod
    def _double_frames(x: torch.Tensor) -> torch.Tensor:
        """[1, 2·C, t, H, W], both halves of the channels a frame → [1, C, 2·t, H, W]."""
        _, channels, t, height, width = x.shape
        pairs = x.view(1, 2, channels // 2, t, height, width).permute(0, 2, 3, 1, 4, 5)
        return pairs.reshape(1, channels // 2, 2 * t, height, width)


def _as_frames(x: torch.Tensor) -> torch.Tensor:
    """[1, C, t, H, W] → [t, C, H, W]."""
    return x.squeeze(0).transpose(0, 1)


def _as_video(frames: torch.Tensor) -> torch.Tensor:
    """[t, C, H, W] → [1, C, t, H, W]."""
    return frames.transpose(0, 1).unsqueeze(0)


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

    def forward(self, x: torch.Tensor, state: CausalState) -> torch.Tensor:
        """x [1, 3, t, H, W], t = 1 in the first call, then 4 → [1, 2·16, 1, H/8, W/8]."""
        x = self.conv_in(x, state)
        for block in [*self.downsamples, *self.middle]:
            x = block(x, state)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(x)), state)
        return out


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

    def forward(self, x: torch.Tensor, state: CausalState) -> torch.Tensor:
        """x [1, 16, 1, h, w] → [1, 3, 1 in the first call, then 4, 8·h, 8·w]."""
        x = self.conv_in(x, state)
        for block in [*self.middle, *self.upsamples]:
            x = block(x, state)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(x)), state)
        return out


def _middle(width: int) -> nn.ModuleList:
    blocks = [ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)]
    return nn.ModuleList(blocks)


def _width_after(width: int, levels: nn.ModuleList) -> int:
    """Channels that come out of a list of levels that `width` channels go into."""
    for block in levels:
        if isinstance(block, ResidualBlock):
            width = block.conv2.weight.shape[0]
        elif isinstance(block, Upsample):
            width = block.resize.out_channels
    return width
