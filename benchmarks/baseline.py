"""The DiT that a user would otherwise write, in the variants a user would try.

All of them are reference.DiT on the same weights. On a GPU: BF16; FP8 in the linears of the
layers through torch._scaled_mm with the engine's own scales (one per token, one per channel); the
same with every layer through torch.compile. One DiTStream serves all, since its 14 latent frames
of keys and values are 35 GB at the released size: the variants take turns at moving it on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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
        self.bias = linear.bias  # and nothing else of it: its weight may go
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
        _replace_long(layer)
    return result


def to_fp8_linears(model: DiT) -> None:
    """The same of the model itself, layer by layer: not every GPU holds both sets of weights."""
    for layer in model.blocks:
        _replace_long(layer)


def _replace_long(layer: nn.Module) -> None:
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear) and any(part in name for part in _LONG):
            parent, _, own = name.rpartition(".")
            setattr(layer.get_submodule(parent), own, ScaledLinear(module))


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


FP8, COMPILED = "FP8 linears", "FP8 linears, torch.compile"
VARIANTS = {"plain": "as it is", "fp8": FP8, "compile": COMPILED}


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
        model, name = plain_model(loaded, loaded.weights)
        self.models = {name: model}
        self.missing: dict[str, str] = {}
        self.stream = DiTStream(model, text=text, clip=clip, y=y, audio=audio)
        if device.type == "cuda":
            fp8 = with_fp8_linears(model)
            self.models[f"plain PyTorch, {FP8}"] = fp8
            self.models[f"plain PyTorch, {COMPILED}"] = compiled(fp8)

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
            self.missing[name] = one_line(error)
            return None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def plain_model(loaded: Loaded, weights: Mapping[str, Tensor]) -> tuple[DiT, str]:
    """The plain model of these weights, and its name. Raises InputError for converted ones."""
    dtype = torch.float32 if loaded.devices.precision == "fp32" else torch.bfloat16
    stored = {tensor.dtype for tensor in weights.values()}
    if not stored <= {torch.float32, torch.bfloat16}:
        raise InputError(f"{loaded.source}: expected weights in bf16 or fp32, found {stored}")
    device = loaded.devices.torch_device
    tensors = {key: weights[key].to(device) for key in weights}
    model = DiT.from_tensors(loaded.config, tensors, dtype=dtype).requires_grad_(False)
    return model, f"plain PyTorch, {str(dtype).removeprefix('torch.')}"


def open_alone(
    loaded: Loaded, variant: str, given: dict[str, Any]
) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """One of VARIANTS with nothing beside it: its name, and what denoises its next block.

    given: what DiTStream takes. Empties `loaded.weights`, so that what is quantised is not kept in
    bf16 too.
    """
    model, name = plain_model(loaded, loaded.weights)
    cast(dict[str, Tensor], loaded.weights).clear()
    if variant != "plain":
        name = f"plain PyTorch, {VARIANTS[variant]}"
        to_fp8_linears(model)
    stream = DiTStream(model, **given)
    if variant == "compile":
        stream.model = compiled(model)

    def denoise(noise: Tensor, renoise: Tensor) -> Tensor:
        with torch.no_grad():
            return stream.denoise(noise, list(renoise))

    return name, denoise
