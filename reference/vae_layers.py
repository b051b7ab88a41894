"""Layers of the Wan 2.1 video autoencoder on whole videos: causal convolution, blocks, both sides.

Every convolution sees all frames at once, with zeros for what comes before the first; what the
first frame skips is cut off and put back. The names of the parameters are the released ones.
Tensors are [B, C, t, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS = 16
Stage = int | Literal["space", "time"]


class CausalConv3d(nn.Conv3d):
    """A convolution whose output frame sees its own and the frames before it, zeros before all."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, t, H, W] -> [B, C', t, H, W]."""
        time, height, width = self.kernel_size
        beside, above = width // 2, height // 2
        return super().forward(F.pad(x, (beside, beside, above, above, time - 1, 0)))


class RMSNorm(nn.Module):
    """x / ||x|| * sqrt(C) over the channels, times a gain."""

    def __init__(self, channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> same shape."""
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class ResidualBlock(nn.Module):
    """Two times norm, SiLU, causal 3x3x3 convolution; added to the (projected) input."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(channels_in),
            nn.SiLU(),
            CausalConv3d(channels_in, channels_out, 3),
            RMSNorm(channels_out),
            nn.SiLU(),
            nn.Identity(),  # the released code has a dropout of 0 here, which counts in the names
            CausalConv3d(channels_out, channels_out, 3),
        )
        widens = channels_in != channels_out
        self.shortcut = nn.Conv3d(channels_in, channels_out, 1) if widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, t, H, W] -> [B, C', t, H, W]."""
        return self.shortcut(x) + self.residual(x)


class FrameAttention(nn.Module):
    """Self-attention with one head among the positions of each frame; frames do not mix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, t, H, W] -> same shape."""
        frames = _frames(x)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # [B * t, H * W, 3 * C]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + _video(self.proj(mixed.reshape(frames.shape)), x.shape[0])


class Downsample(nn.Module):
    """Halves height and width; if `temporal`, the frames after the first as well."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        # Zeros to the right and below only (released code).
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        )
        self.time_conv = (
            nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 1 + s * k, H, W] -> [B, C, 1 + k, H/2, W/2]; s = 2 if temporal, else 1."""
        x = _video(self.resample(_frames(x)), x.shape[0])
        if self.time_conv is None or x.shape[2] == 1:
            return x
        # The first frame passes as it is; the second comes from the first three, and so on.
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; if `temporal`, doubles the frames after the
    first as well."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 1 + k, H, W] -> [B, C/2, 1 + s * k, 2H, 2W]; s = 2 if temporal, else 1."""
        if self.time_conv is not None and x.shape[2] > 1:
            # NOTE: the temporal convolution never sees the first frame: for the second frame it has
            # zeros as its past, not the first (released code; decode_stream is recorded so).
            doubled = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, k, H, W]
            doubled = doubled.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # [B, C, 2 * k, H, W]
            x = torch.cat([x[:, :, :1], doubled], dim=2)
        return _video(self.resample(_frames(x)), x.shape[0])


def _frames(x: Tensor) -> Tensor:
    """[B, C, t, H, W] -> [B * t, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _video(frames: Tensor, batch: int) -> Tensor:
    """[B * t, C, H, W] -> [B, C, t, H, W]."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)
    )


def _head(width: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(width), nn.SiLU(), CausalConv3d(width, channels_out, 3))


class Encoder(nn.Module):
    """Video to the moments of its latents, before `VAE.conv1`."""

    def __init__(self, width: int, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, width, 3)
        self.downsamples = nn.Sequential()
        for stage in stages:
            if isinstance(stage, int):
                self.downsamples.append(ResidualBlock(width, stage))
                width = stage
            else:
                self.downsamples.append(Downsample(width, stage == "time"))
        self.middle = _middle(width)
        self.head = _head(width, 2 * LATENT_CHANNELS)

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, 1 + 4 * k, H, W] -> [B, 2 * 16, 1 + k, H/8, W/8]."""
        return self.head(self.middle(self.downsamples(self.conv1(video))))


class Decoder(nn.Module):
    """Latents, after `VAE.conv2`, to video: the mirror of `Encoder`."""

    def __init__(self, width: int, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(LATENT_CHANNELS, width, 3)
        self.middle = _middle(width)
        self.upsamples = nn.Sequential()
        for stage in stages:
            if isinstance(stage, int):
                self.upsamples.append(ResidualBlock(width, stage))
                width = stage
            else:
                self.upsamples.append(Upsample(width, stage == "time"))
                width //= 2
        self.head = _head(width, 3)

    def forward(self, latent: Tensor) -> Tensor:
        """[B, 16, n, h, w] -> [B, 3, 1 + 4 * (n - 1), 8 * h, 8 * w]."""
        return self.head(self.upsamples(self.middle(self.conv1(latent))))
