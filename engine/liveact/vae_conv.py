"""The convolution that the VAE is made of."""

from __future__ import annotations

import torch
from torch import nn


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
        self.stride = stride  # in time
        self.past_frames = kernel[0] - stride

    def side_by_side(self, window: torch.Tensor) -> torch.Tensor:
        """The frames each output frame sees, in its channels: [past + t, H, W, C] →
        [t / stride, H, W, kernel · C]."""
        kernel = self.weight.shape[2]
        last = len(window) - kernel + 1
        return torch.cat([window[i : last + i : self.stride] for i in range(kernel)], dim=3)
