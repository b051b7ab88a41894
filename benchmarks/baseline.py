"""The DiT that a user would otherwise write, in the variants a user would try.

All of them are reference.DiT on the same weights. On a GPU: BF16; FP8 in the linears of the
layers through torch._scaled_mm with the engine's own scales (one per token, one per channel); the
same with every layer through torch.compile. One DiTStream serves all, since its 14 latent frames
of keys and values are 35 GB at the released size: the variants take turns at moving it on.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.models import Loaded
from benchmarks.peaks import row_scales
from liveact.errors import InputError
from reference import DiT, DiTStream


class ScaledLinear(nn.Module):
    """A linear layer in FP8: x is quantised per row at every call, the weight once per channel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = row_scales(linear.weight)  # [n, k], [n, 1]
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())  # [1, n]
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        rows, row_scale = row_scales(x.reshape(-1, x.shape[-1]))
        out = torch._scaled_mm(
            rows,
            self.get_buffer("weight").t(),
            scale_a=row_scale,
            scale_b=self.get_buffer("scale"),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return (out + self.bias).to(self.dtype).view(*x.shape[:-1], -1)


# Linears of a layer whose input is as long as the block; those of text and image are short.
_LONG = ("self_attn", "cross_attn.q", "cross_attn.o", "q_linear", "audio_cross_attn.proj", "ffn")


def with_fp8_linears(model: DiT) -> DiT:
    """A copy that shares everything but the long linears of its layers."""
    result = _shallow(model)
    result.blocks = nn.ModuleList(copy.deepcopy(layer, _kept(layer)) for layer in model.blocks)
    for layer in result.blocks:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and any(part in name for part in _LONG):
                parent, _, own = name.rpartition(".")
                setattr(layer.get_submodule(parent), own, ScaledLinear(module))
    return result


def compiled(model: DiT) -> DiT:
    """A copy whose layers go through torch.compile."""
    result = _shallow(model)
    layers = [cast(nn.Module, torch.compile(layer)) for layer in model.blocks]
    result.blocks = nn.ModuleList(layers)
    return result


def _shallow(model: DiT) -> DiT:
    result = copy.copy(model)
    result._modules = dict(model._modules)
    return result


def _kept(layer: nn.Module) -> dict[int, Any]:
    """What deepcopy must not copy: the parameters."""
    return {id(parameter): parameter for parameter in layer.parameters()}


class Baselines:
    """The variants by name, and the stream that they take turns on.

    `missing` says of each that did not work, why. text [n, text_dim], clip [257, clip_dim],
    y [20, 14, h, w], audio [S, layers, channels] as for DiTStream. Raises InputError for a
    converted checkpoint: the weights that plain PyTorch needs are not in it.
    """

    def __init__(
        self, loaded: Loaded, *, text: Tensor, clip: Tensor, y: Tensor, audio: Tensor
    ) -> None:
        device = loaded.devices.torch_device
        dtype = torch.float32 if loaded.devices.precision == "fp32" else torch.bfloat16
        name = str(dtype).removeprefix("torch.")
        stored = {tensor.dtype for tensor in loaded.weights.values()}
        if not stored <= {torch.float32, torch.bfloat16}:
            raise InputError(f"{loaded.source}: expected weights in bf16 or fp32, found {stored}")
        tensors = {key: loaded.weights[key].to(device) for key in loaded.weights}
        model = DiT.from_tensors(loaded.config, tensors, dtype=dtype).requires_grad_(False)
        self.models = {f"plain PyTorch, {name}": model}
        self.missing: dict[str, str] = {}
        if device.type == "cuda":
            fp8 = with_fp8_linears(model)
            self.models["plain PyTorch, FP8 linears"] = fp8
            self.models["plain PyTorch, FP8 linears, torch.compile"] = compiled(fp8)
        self.stream = DiTStream(model, text=text, clip=clip, y=y, audio=audio)

    def denoise(self, name: str, noise: Tensor, renoise: Tensor) -> Tensor | None:
        """The next block by one variant; None when it failed, now or before."""
        if name in self.missing:
            return None
        self.stream.model = self.models[name]
        try:
            # Without gradients it writes its caches in place, as the released code does.
            with torch.no_grad():
                return self.stream.denoise(noise, list(renoise))
        except Exception as error:  # of torch.compile, whatever they are
            self.missing[name] = " ".join(str(error).split())[:200]
            return None
