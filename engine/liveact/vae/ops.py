"""What the layers of the VAE are made of, on two backends: `TorchOps` and `KernelOps`.

Everything is channels-last: frames are [t, H, W, C], contiguous, which is what cuDNN and oneDNN
convolve fastest and what a kernel that works on rows of C channels wants. What follows a
convolution (bias, residual, norm, SiLU, the copy into the buffer of the next convolution) is held
back in a `Pending` and done in one pass by `settle`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F


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


Convolution: TypeAlias = nn.Conv2d | nn.Conv3d | CausalConv3d

# NOTE: on a CPU torch runs a conv3d of 8 to 64 channels at 8 to 100 GFLOP/s, the same as a conv2d
# of three frames side by side in the channels at 100 to 180. From 96 channels on they are alike,
# except in small pictures: 8×8 × 384 channels at 50 and 80, 16×16 at 130 and 150.
_WIDE_BELOW = 96
_WIDE_PIXELS = 256
_PICTURE_ROW = 8  # channels the last convolution is padded to: tensor cores want multiples of 8

_cudnn_settings = threading.Lock()


@contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 convolutions on a GPU as they are, not in TF32, which is what cuDNN makes of them unless
    told otherwise: its 10 bits of mantissa are worth 1e-3.

    The setting belongs to the process: of two threads that change it at once, one would restore
    what the other has set, for good.
    """
    unchanged = dict.fromkeys(("enabled", "benchmark", "benchmark_limit", "deterministic"))
    with (
        _cudnn_settings,
        torch.backends.cudnn.flags(**unchanged, allow_tf32=False, fp32_precision=None),
    ):
        yield


@dataclass(frozen=True)
class Pending:
    """The result of a convolution to which bias and residual have yet to be added.

    Attributes:
        value: as the convolution wrote it; see `order`.
        bias: [C] ([2·C] in the order `frames`) fp32, or None where it is in `value` already.
        skip: [t, H, W, C], the other branch of a residual block, or None.
        order: where a pixel of [t, H, W, C] lies in `value`.
            `plain`: `value` is [t, H, W, C].
            `frames`: [t/2, H, W, 2·C]; each half of the channels is a frame.
            `phases`: [t, H/2 + 1, W/2 + 1, 4·C]; pixel (2y + a, 2x + b) is at (y + a, x + b), in
            the quarter 2a + b of the channels (see `TorchOps.upsample`).
    """

    value: torch.Tensor
    bias: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    order: str = "plain"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(t, H, W, C) once settled."""
        t, height, width, channels = self.value.shape
        if self.order == "frames":
            return 2 * t, height, width, channels // 2
        if self.order == "phases":
            return t, 2 * (height - 1), 2 * (width - 1), channels // 4
        return t, height, width, channels

    def plus(self, skip: torch.Tensor) -> Pending:
        """With the other branch of a residual block."""
        return replace(self, skip=skip)

    def arranged(self) -> torch.Tensor:
        """`value` as [t, H, W, C]."""
        t, height, width, channels = self.shape
        if self.order == "frames":
            pairs = self.value.view(t // 2, height, width, 2, channels)
            return pairs.permute(0, 3, 1, 2, 4).reshape(self.shape)
        if self.order == "phases":
            y, x = height // 2, width // 2
            out = self.value.new_empty(t, y, 2, x, 2, channels)
            for phase, part in enumerate(self.value.split(channels, dim=3)):
                a, b = divmod(phase, 2)
                out[:, :, a, :, b] = part[:, a : a + y, b : b + x]
            return out.view(self.shape)
        return self.value


class TorchOps:
    """On any device, in any format, by the ops of torch. Weights are converted at first use."""

    biased = True  # whether convolutions add their bias themselves

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._prepared: dict[tuple[Convolution, str], torch.Tensor] = {}

    def release(self) -> None:
        """Lets go of the converted weights."""
        self._prepared.clear()

    def _weight(
        self, module: Convolution, form: str, make: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The weight in the form that an op wants, made once; the module's own stays as it is."""
        key = (module, form)
        if key not in self._prepared:
            self._prepared[key] = make(module.weight.detach().float()).to(self.dtype)
        return self._prepared[key]

    def _bias(self, module: Convolution, dtype: torch.dtype) -> torch.Tensor:
        key = (module, str(dtype))
        if key not in self._prepared:
            assert module.bias is not None
            self._prepared[key] = module.bias.detach().to(dtype)
        return self._prepared[key]

    def _biases(self, module: Convolution) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The bias, for the convolution itself or for what follows it."""
        if self.biased:
            return self._bias(module, self.dtype), None
        return None, self._bias(module, torch.float32)

    def convolve(self, conv: CausalConv3d, window: torch.Tensor) -> Pending:
        """window [past + t, H, W, C] → [t / stride, H, W, C']."""
        own, pending = self._biases(conv)
        kernel = conv.weight.shape[2:]
        if kernel[1:] == (1, 1):  # a product of rows
            weight = self._weight(conv, "rows", lambda w: w.flatten(2).transpose(1, 2).flatten(1))
            return Pending(F.linear(conv.side_by_side(window), weight, own), pending)
        _, height, width, channels = window.shape
        wide_is_faster = channels < _WIDE_BELOW or height * width <= _WIDE_PIXELS
        if window.device.type == "cpu" and wide_is_faster and conv.stride == 1:
            weight = self._weight(conv, "wide", _wide)
            wide = conv.side_by_side(window).permute(0, 3, 1, 2)  # [t, 3·C, H, W]
            value = F.conv2d(wide, weight, own, padding=kernel[1] // 2)
            return Pending(value.permute(0, 2, 3, 1).contiguous(), pending)
        weight = self._weight(conv, "volume", _channels_last)
        video = window.permute(3, 0, 1, 2).unsqueeze(0)  # [1, C, past + t, H, W]
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        value = F.conv3d(video, weight, own, (conv.stride, 1, 1), padding)
        return Pending(value.squeeze(0).permute(1, 2, 3, 0).contiguous(), pending)

    def upsample(self, conv: nn.Conv2d, frames: torch.Tensor) -> Pending:
        """Nearest-neighbour doubling and the 3×3 convolution after it, without the doubled picture.

        An even row of the doubled picture sees rows y−1, y, y of the small one, an odd row y, y,
        y+1: two taps each, the doubled row with the sum of two weights. So the four phases of the
        result are four 2×2 convolutions of the small picture, done as one with 4·C' channels: 4/9
        of the arithmetic.

        Args:
            frames: [t, H, W, C].

        Returns:
            Pending of [t, 2·H, 2·W, C'], in the order `phases`.
        """
        weight = self._weight(conv, "phases", _phases)
        own, pending = self._biases(conv)
        own = None if own is None else own.repeat(4)
        value = F.conv2d(frames.permute(0, 3, 1, 2), weight, own, padding=1)
        return Pending(value.permute(0, 2, 3, 1).contiguous(), pending, order="phases")

    def downsample(self, conv: nn.Conv2d, frames: torch.Tensor) -> Pending:
        """3×3 convolution of stride 2, padded right and bottom: [t, H, W, C] → [t, H/2, W/2, C]."""
        weight = self._weight(conv, "volume", _channels_last)
        padded = F.pad(frames, (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2)
        value = F.conv2d(padded, weight, self._bias(conv, self.dtype), stride=2)
        return Pending(value.permute(0, 2, 3, 1).contiguous())

    def linear(self, conv: Convolution, rows: torch.Tensor) -> torch.Tensor:
        """A convolution of kernel size 1, bias included: [..., C] → [..., C']."""
        weight = self._weight(conv, "rows", lambda w: w.flatten(1))
        return F.linear(rows, weight, self._bias(conv, self.dtype))

    def project(self, conv: Convolution, frames: torch.Tensor) -> Pending:
        """A convolution of kernel size 1: [t, H, W, C] → [t, H, W, C']."""
        own, pending = self._biases(conv)
        weight = self._weight(conv, "rows", lambda w: w.flatten(1))
        return Pending(F.linear(frames, weight, own), pending)

    def norm(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """Each pixel scaled to a root mean square of 1 over its channels, times gamma [C]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
        return x * length.reciprocal_().mul_(math.sqrt(x.shape[-1])) * gamma.to(x.dtype)

    def settle(
        self,
        x: Pending,
        target: torch.Tensor | None = None,
        gamma: torch.Tensor | None = None,
        keep: bool = False,
    ) -> torch.Tensor | None:
        """x = value + bias + skip; target ← SiLU(norm(x) · gamma), or x where there is no gamma.

        Args:
            x: used up: its memory may be written to.
            target: [t, H, W, C], what the next convolution reads.
            gamma: [C] of the norm in front of the next convolution.
            keep: whether x is needed again, for a residual.

        Returns:
            x [t, H, W, C] where `keep`, else None.
        """
        value = x.arranged()
        if x.skip is not None:
            value = value.add_(x.skip)
        if target is not None:
            target.copy_(value if gamma is None else F.silu(self.norm(value, gamma), inplace=True))
        return value if keep else None

    def add_up(self, x: Pending, total: torch.Tensor, scratch: torch.Tensor) -> None:
        """total += every number of the result of the last convolution, so that it is finite as long
        as all of them are. Both are [] fp32 on the same device; nothing waits for them."""
        torch.sum(x.value, dim=(0, 1, 2, 3), dtype=torch.float32, out=scratch)
        total.add_(scratch)
        if x.bias is not None:
            total.add_(x.bias.sum())

    def video(self, x: Pending) -> torch.Tensor:
        """The result of the last convolution → [3, t, H, W] fp32."""
        return x.value.permute(3, 0, 1, 2).float()

    def pictures(self, x: Pending) -> torch.Tensor:
        """The result of the last convolution → uint8 [t, H, W, 3] on the same device."""
        scaled = (x.value.float().clamp_(-1.0, 1.0) + 1.0) * 127.5
        return scaled.round_().to(torch.uint8)


Launch = Callable[..., None]  # launch(kernel name, **its parameters)


class KernelOps(TorchOps):
    """bf16 on a GPU: convolutions by cuDNN, all between them by kernels of ours.

    `launch` enqueues one of triton_kernels/conv_epilogue.py or to_pictures.py on torch's current
    stream.
    """

    biased = False

    def __init__(self, launch: Launch) -> None:
        super().__init__(torch.bfloat16)
        self._launch = launch

    def settle(
        self,
        x: Pending,
        target: torch.Tensor | None = None,
        gamma: torch.Tensor | None = None,
        keep: bool = False,
    ) -> torch.Tensor | None:
        """What `TorchOps.settle` does, in one kernel."""
        t, height, width, channels = shape = x.shape
        if x.bias is None and x.skip is None and gamma is None:
            return super().settle(x, target, gamma, keep)
        kept = x.value.new_empty(shape) if keep or target is None else None
        if gamma is None:
            assert target is None or kept is None, "one of them is the other"
            target, kept = (kept, None) if target is None else (target, None)
        traits = {
            x.order: x.order != "plain",
            "skip": x.skip is not None,
            "norm": gamma is not None,
            "keep": kept is not None,
        }
        variant = "_".join(name for name, present in traits.items() if present) or "bias"
        self._launch(
            f"conv_epilogue.{channels}.{variant}",
            value=x.value,
            bias=x.bias,
            skip=x.skip,
            gamma=gamma,
            kept=kept,
            out=target,
            rows=t * height * width,
            height=height,
            width=width,
        )
        if not keep:
            return None
        return kept if kept is not None else target

    def convolve(self, conv: CausalConv3d, window: torch.Tensor) -> Pending:
        """window [past + t, H, W, C] → [t / stride, H, W, C']; a picture gets padding channels."""
        if conv.weight.shape[0] >= _PICTURE_ROW:
            return super().convolve(conv, window)
        missing = _PICTURE_ROW - conv.weight.shape[0]
        weight = self._weight(
            conv, "padded", lambda w: _channels_last(F.pad(w, (0, 0) * 4 + (0, missing)))
        )
        video = window.permute(3, 0, 1, 2).unsqueeze(0)
        value = F.conv3d(video, weight, padding=(0, 1, 1))
        return Pending(
            value.squeeze(0).permute(1, 2, 3, 0).contiguous(), self._bias(conv, torch.float32)
        )

    def video(self, x: Pending) -> torch.Tensor:
        """The result of the last convolution → [3, t, H, W] fp32."""
        assert x.bias is not None
        return (x.value[..., : len(x.bias)].float() + x.bias).permute(3, 0, 1, 2)

    def pictures(self, x: Pending) -> torch.Tensor:
        """The result of the last convolution → uint8 [t, H, W, 3], in one kernel."""
        t, height, width, _ = x.value.shape
        out = torch.empty(t, height, width, 3, dtype=torch.uint8, device=x.value.device)
        self._launch("to_pictures.bf16", value=x.value, bias=x.bias, out=out, size=out.numel())
        return out


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """[C', C, 3, 3, 3] → [C', 3·C, 3, 3]: see `CausalConv3d.side_by_side`."""
    return _channels_last(weight.transpose(1, 2).flatten(1, 2))


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    last: Any = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    return weight.contiguous(memory_format=last)


def _phases(weight: torch.Tensor) -> torch.Tensor:
    """[C', C, 3, 3] for the doubled picture → [4·C', C, 2, 2] for the small one."""

    def folded(w: torch.Tensor, phase: int, dim: int) -> torch.Tensor:
        first, middle, last = w.split(1, dim)
        taps = (first, middle + last) if phase == 0 else (first + middle, last)
        return torch.cat(taps, dim)

    phases = [folded(folded(weight, a, 2), b, 3) for a in (0, 1) for b in (0, 1)]
    return _channels_last(torch.cat(phases))
