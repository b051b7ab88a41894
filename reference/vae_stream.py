"""The VAE decoder block by block, as the released code does it.

Latent frame by latent frame; every causal convolution concatenates its cache, pads and clones. The
caches start afresh for every block, and the 3 latent frames before it are decoded again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.vae import LATENT_MEAN, LATENT_STD

CONTEXT = 3  # latent frames decoded again


class VAEStream:
    """One stream, decoded window by window.

    weights: the tensors of `Wan2.1_VAE.pth`, on the device and in the format to compute in.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._past: dict[str, Tensor] = {}  # convolution -> its last two input frames
        self._context: Tensor | None = None
        count = len(
            {name.split(".")[2] for name in weights if name.startswith("decoder.upsamples")}
        )
        self._levels = [f"decoder.upsamples.{i}" for i in range(count)]

    def decode_block(self, latents: Tensor) -> Tensor:
        """Normalised latents [16, n, h, w] -> video [3, t, 8 * h, 8 * w], clamped to [-1, 1].

        t is 4 * n - 3 in the first block, then 4 * n.
        """
        known = 0 if self._context is None else self._context.shape[1]
        window = latents if self._context is None else torch.cat([self._context, latents], dim=1)
        self._context = window[:, -CONTEXT:]
        self._past.clear()
        weight = self._weights["conv2.weight"]
        mean, std = (weight.new_tensor(v).view(-1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
        x = window.to(weight) * std + mean
        x = F.conv3d(x.unsqueeze(0), weight, self._weights["conv2.bias"])
        frames = [self._frame(x[:, :, i : i + 1], first=i == 0) for i in range(x.shape[2])]
        video = torch.cat(frames, dim=2)[0]
        return video[:, 4 * known - 3 if known else 0 :].clamp(-1, 1)

    def _frame(self, x: Tensor, first: bool) -> Tensor:
        x = self._causal("decoder.conv1", x)
        x = self._residual("decoder.middle.0", x)
        x = self._attention("decoder.middle.1", x)
        x = self._residual("decoder.middle.2", x)
        for level in self._levels:
            resample = f"{level}.resample.1.weight" in self._weights
            x = self._upsample(level, x, first) if resample else self._residual(level, x)
        return self._causal("decoder.head.2", F.silu(self._norm("decoder.head.0", x)))

    def _causal(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        past = self._past.get(name, x[:, :, :0])
        both = torch.cat([past, x], dim=2)
        self._past[name] = both[:, :, -2:].clone()
        h, w = weight.shape[3] // 2, weight.shape[4] // 2
        return F.conv3d(F.pad(both, (w, w, h, h, 2 - past.shape[2], 0)), weight, bias)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self._weights[f"{name}.gamma"]

    def _residual(self, name: str, x: Tensor) -> Tensor:
        skip = x
        if (shortcut := self._weights.get(f"{name}.shortcut.weight")) is not None:
            skip = F.conv3d(x, shortcut, self._weights[f"{name}.shortcut.bias"])
        for norm, conv in ((0, 2), (3, 6)):
            x = F.silu(self._norm(f"{name}.residual.{norm}", x))
            x = self._causal(f"{name}.residual.{conv}", x)
        return x + skip

    def _attention(self, name: str, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)  # [t, C, h, w]
        qkv = self._conv2d(f"{name}.to_qkv", self._norm(f"{name}.norm", frames))
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).contiguous().chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        mixed = self._conv2d(f"{name}.proj", mixed.reshape(frames.shape))
        return x + mixed.unflatten(0, (1, -1)).transpose(1, 2)

    def _upsample(self, name: str, x: Tensor, first: bool) -> Tensor:
        if f"{name}.time_conv.weight" in self._weights and not first:
            doubled = self._causal(f"{name}.time_conv", x)
            _, c, t, h, w = doubled.shape
            x = doubled.view(1, 2, c // 2, t, h, w).permute(0, 2, 3, 1, 4, 5)
            x = x.reshape(1, c // 2, 2 * t, h, w)
        frames = x.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
        frames = self._conv2d(f"{name}.resample.1", frames, padding=1)
        return frames.unflatten(0, (1, -1)).transpose(1, 2)

    def _conv2d(self, name: str, x: Tensor, padding: int = 0) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.conv2d(x, weight, bias, padding=padding)


def to_uint8(frames: Tensor) -> Tensor:
    """Video as pictures: clamped to [−1, 1], mapped to 0..255, rounded half to even.

    frames: [3, t, H, W], float, on any device; no NaN. Returns uint8 [t, H, W, 3].

    Raises ValueError for another shape.
    """
    if frames.dim() != 4 or frames.shape[0] != 3:
        raise ValueError(f"frames: expected [3, t, H, W], found {list(frames.shape)}")
    scaled = (frames.float().clamp(-1.0, 1.0) + 1.0) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
