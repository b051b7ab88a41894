"""Random weights for every network of a checkpoint, at any size, under the released names.

The scales keep every activation of order one at any number of layers, and the DiT's output of
order one for any number of blocks: all it carries over to the next block are keys (which are
normalised) and values (whose compression has a gain of about one). Equal seeds give equal weights
for one version of torch and one kind of device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


# ---------------------------------------------------------------------------- names and shapes


def _linear(name: str, out: int, fan_in: int) -> Shapes:
    return {f"{name}.weight": (out, fan_in), f"{name}.bias": (out,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _conv(name: str, out: int, fan_in: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (out, fan_in, *kernel), f"{name}.bias": (out,)}


def _dit_shapes(config: Mapping[str, Any], audio_dim: int, clip_dim: int) -> Shapes:
    """audio_dim: layers times channels of an audio feature; clip_dim: width of an image feature."""
    dim, hidden, out = config["dim"], config["intermediate_dim"], config["output_dim"]
    window, patch = config["audio_window"], config["patch_size"]
    shapes = {
        **_conv("patch_embedding", dim, config["in_dim"], *patch),
        **_linear("text_embedding.0", dim, config["text_dim"]),
        **_linear("text_embedding.2", dim, dim),
        **_linear("time_embedding.0", dim, config["freq_dim"]),
        **_linear("time_embedding.2", dim, dim),
        **_linear("time_projection.1", 6 * dim, dim),
        **_norm("img_emb.proj.0", clip_dim),
        **_linear("img_emb.proj.1", clip_dim, clip_dim),
        **_linear("img_emb.proj.3", dim, clip_dim),
        **_norm("img_emb.proj.4", dim),
        **_linear("audio_proj.proj1", hidden, window * audio_dim),
        **_linear("audio_proj.proj1_vf", hidden, (window + config["vae_scale"] - 1) * audio_dim),
        **_linear("audio_proj.proj2", hidden, hidden),
        **_linear("audio_proj.proj3", config["context_tokens"] * out, hidden),
        **_norm("audio_proj.norm", out),
    }
    for layer in range(config["num_layers"]):
        shapes |= _dit_layer_shapes(f"blocks.{layer}", dim, config["ffn_dim"], out)
    shapes |= _linear("head.head", math.prod(patch) * config["out_dim"], dim)
    shapes["head.modulation"] = (1, 2, dim)
    return shapes


def _dit_layer_shapes(name: str, dim: int, ffn_dim: int, audio_out: int) -> Shapes:
    shapes: Shapes = {f"{name}.modulation": (1, 6, dim)}
    for projection in ("q", "k", "v", "o"):
        shapes |= _linear(f"{name}.self_attn.{projection}", dim, dim)
    for norm in ("norm_q", "norm_k"):
        shapes[f"{name}.self_attn.{norm}.weight"] = (dim,)
    for memory in ("memory_proj_k", "memory_proj_v"):
        shapes[f"{name}.self_attn.{memory}.weight"] = (dim, 1, 5)
    for projection in ("q", "k", "v", "o", "k_img", "v_img"):
        shapes |= _linear(f"{name}.cross_attn.{projection}", dim, dim)
    for norm in ("norm_q", "norm_k", "norm_k_img"):
        shapes[f"{name}.cross_attn.{norm}.weight"] = (dim,)
    return shapes | {
        **_norm(f"{name}.norm3", dim),
        **_norm(f"{name}.norm_x", dim),
        **_linear(f"{name}.audio_cross_attn.q_linear", dim, dim),
        **_linear(f"{name}.audio_cross_attn.kv_linear", 2 * dim, audio_out),
        **_linear(f"{name}.audio_cross_attn.proj", dim, dim),
        **_linear(f"{name}.ffn.0", ffn_dim, dim),
        **_linear(f"{name}.ffn.2", dim, ffn_dim),
    }


def _vae_residual_shapes(name: str, fan_in: int, out: int) -> Shapes:
    shapes: Shapes = {
        f"{name}.residual.0.gamma": (fan_in, 1, 1, 1),
        **_conv(f"{name}.residual.2", out, fan_in, 3, 3, 3),
        f"{name}.residual.3.gamma": (out, 1, 1, 1),
        **_conv(f"{name}.residual.6", out, out, 3, 3, 3),
    }
    return shapes if fan_in == out else shapes | _conv(f"{name}.shortcut", out, fan_in, 1, 1, 1)


def _vae_middle_shapes(name: str, dim: int) -> Shapes:
    return {
        **_vae_residual_shapes(f"{name}.0", dim, dim),
        f"{name}.1.norm.gamma": (dim, 1, 1),
        **_conv(f"{name}.1.to_qkv", 3 * dim, dim, 1, 1),
        **_conv(f"{name}.1.proj", dim, dim, 1, 1),
        **_vae_residual_shapes(f"{name}.2", dim, dim),
    }


def _vae_shapes(base: int) -> Shapes:
    """The Wan 2.1 VAE of a base width: width multipliers 1 2 4 4, 16 latent channels."""
    widths = [base, base, 2 * base, 4 * base, 4 * base]
    top = widths[-1]
    encoder: Shapes = _conv("encoder.conv1", base, 3, 3, 3, 3)
    index = 0
    for level, (fan_in, out) in enumerate(pairwise(widths)):
        for first in (fan_in, out):
            encoder |= _vae_residual_shapes(f"encoder.downsamples.{index}", first, out)
            index += 1
        if level < 3:
            encoder |= _conv(f"encoder.downsamples.{index}.resample.1", out, out, 3, 3)
            if level > 0:  # levels 2 and 3 halve the frame rate too
                encoder |= _conv(f"encoder.downsamples.{index}.time_conv", out, out, 3, 1, 1)
            index += 1
    encoder |= _vae_middle_shapes("encoder.middle", top)
    encoder |= {"encoder.head.0.gamma": (top, 1, 1, 1), **_conv("encoder.head.2", 32, top, 3, 3, 3)}

    decoder = _conv("decoder.conv1", top, 16, 3, 3, 3) | _vae_middle_shapes("decoder.middle", top)
    index = 0
    for level, out in enumerate(reversed(widths[1:])):
        fan_in = top if level == 0 else widths[5 - level] // 2  # an upsampling halves the width
        for first in (fan_in, out, out):
            decoder |= _vae_residual_shapes(f"decoder.upsamples.{index}", first, out)
            index += 1
        if level < 3:
            decoder |= _conv(f"decoder.upsamples.{index}.resample.1", out // 2, out, 3, 3)
            if level < 2:
                decoder |= _conv(f"decoder.upsamples.{index}.time_conv", 2 * out, out, 3, 1, 1)
            index += 1
    decoder |= {"decoder.head.0.gamma": (base, 1, 1, 1)}
    decoder |= _conv("decoder.head.2", 3, base, 3, 3, 3)
    return encoder | _conv("conv1", 32, 32, 1, 1, 1) | _conv("conv2", 16, 16, 1, 1, 1) | decoder


def _text_shapes(config: Mapping[str, Any]) -> Shapes:
    dim, attention, ffn = config["dim"], config["dim_attn"], config["dim_ffn"]
    shapes: Shapes = {"token_embedding.weight": (config["vocab"], dim)}
    for layer in range(config["num_layers"]):
        name = f"blocks.{layer}"
        shapes |= {
            f"{name}.norm1.weight": (dim,),
            f"{name}.attn.q.weight": (attention, dim),
            f"{name}.attn.k.weight": (attention, dim),
            f"{name}.attn.v.weight": (attention, dim),
            f"{name}.attn.o.weight": (dim, attention),
            f"{name}.norm2.weight": (dim,),
            f"{name}.ffn.gate.0.weight": (ffn, dim),
            f"{name}.ffn.fc1.weight": (ffn, dim),
            f"{name}.ffn.fc2.weight": (dim, ffn),
            f"{name}.pos_embedding.embedding.weight": (config["num_buckets"], config["num_heads"]),
        }
    return shapes | {"norm.weight": (dim,)}


def _image_shapes(config: Mapping[str, Any]) -> Shapes:
    dim, patch = config["dim"], config["patch_size"]
    tokens = 1 + (config["image_size"] // patch) ** 2
    shapes: Shapes = {
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, tokens, dim),
        "visual.head": (dim, config["out_dim"]),
        "visual.patch_embedding.weight": (dim, 3, patch, patch),
        **_norm("visual.pre_norm", dim),
    }
    for layer in range(config["num_layers"]):
        name = f"visual.transformer.{layer}"
        shapes |= {
            **_norm(f"{name}.norm1", dim),
            **_linear(f"{name}.attn.to_qkv", 3 * dim, dim),
            **_linear(f"{name}.attn.proj", dim, dim),
            **_norm(f"{name}.norm2", dim),
            **_linear(f"{name}.mlp.0", config["mlp_ratio"] * dim, dim),
            **_linear(f"{name}.mlp.2", dim, config["mlp_ratio"] * dim),
        }
    return shapes | _norm("visual.post_norm", dim)


def _audio_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, conv_dim = config["hidden_size"], config["conv_dim"]
    shapes: Shapes = {}
    for index, kernel in enumerate(config["conv_kernel"]):
        fan_in = conv_dim[index - 1] if index else 1
        name = f"feature_extractor.conv_layers.{index}"
        shapes[f"{name}.conv.weight"] = (conv_dim[index], fan_in, kernel)
        if index == 0:
            shapes |= _norm(f"{name}.layer_norm", conv_dim[0])
    positions, groups = config["num_conv_pos_embeddings"], config["num_conv_pos_embedding_groups"]
    position_conv = "encoder.pos_conv_embed.conv"
    shapes |= {
        **_norm("feature_projection.layer_norm", conv_dim[-1]),
        **_linear("feature_projection.projection", hidden, conv_dim[-1]),
        f"{position_conv}.bias": (hidden,),
        f"{position_conv}.parametrizations.weight.original0": (1, 1, positions),
        f"{position_conv}.parametrizations.weight.original1": (hidden, hidden // groups, positions),
        **_norm("encoder.layer_norm", hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{name}.attention.{projection}", hidden, hidden)
        inner = config["intermediate_size"]
        shapes |= {
            **_norm(f"{name}.layer_norm", hidden),
            **_linear(f"{name}.feed_forward.intermediate_dense", inner, hidden),
            **_linear(f"{name}.feed_forward.output_dense", hidden, inner),
            **_norm(f"{name}.final_layer_norm", hidden),
        }
    return shapes


# ---------------------------------------------------------------------------- drawing


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of one tensor's entries, by what the tensor is."""
    if name.endswith("bias"):
        return 0.0, 0.05
    if name.endswith(("norm_q.weight", "norm_k.weight", "norm_k_img.weight")):
        return 1.5, 0.15  # logits of deviation 2: attention prefers some keys, yet not one
    if name.endswith("gamma") or len(shape) == 1 or name.endswith("original0"):
        return 1.0, 0.1  # gains of norms
    if ".memory_proj_" in name:
        return 0.2, 0.05  # about a mean of five
    if name == "token_embedding.weight":
        return 0.0, 1.0
    if name.endswith("pos_embedding.embedding.weight"):
        return 0.0, 0.5  # a logit bias
    if name.endswith(("modulation", "cls_embedding", "pos_embedding")):
        return 0.0, shape[-1] ** -0.5
    if name == "visual.head":
        return 0.0, shape[0] ** -0.5
    return 0.0, math.prod(shape[1:]) ** -0.5  # linear or convolution: keeps the variance


def _draw(
    shapes: Shapes,
    label: str,
    seed: int,
    gain: Callable[[str], float],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Normal entries, representable in bf16. gain: factor on the deviation of a named tensor."""
    digest = hashlib.sha256(f"{label} {seed}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    tensors = {}
    for name, shape in shapes.items():
        mean, deviation = _spread(name, shape)
        entries = torch.randn(shape, generator=generator, device=device)
        tensors[name] = entries.mul_(deviation * gain(name)).add_(mean).bfloat16().to(dtype)
    return tensors


def random_checkpoint(
    config: Mapping[str, Any],
    seed: int,
    *,
    audio_layers: int = 12,
    audio_channels: int = 768,
    clip_dim: int = 1280,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """A DiT of the sizes in `config` (keys of a released config.json), bf16, on `device`.

    audio_layers, audio_channels: what one audio feature is made of. clip_dim: width of an image
    feature. Draws one tensor at a time, in float32, so the peak is the result plus one tensor.
    """
    into_residual = ("self_attn.o.weight", "cross_attn.proj.weight", "cross_attn.o.weight")
    per_layer = config["num_layers"] ** -0.5

    def gain(name: str) -> float:
        if name.endswith((*into_residual, "ffn.2.weight")):
            return 2.0 * per_layer
        # An average over many keys is small; a larger value projection makes up for it.
        return 2.0 if name.endswith(("attn.v.weight", "attn.v_img.weight")) else 1.0

    shapes = _dit_shapes(config, audio_layers * audio_channels, clip_dim)
    return _draw(shapes, "dit", seed, gain, device=device)


def random_vae(base_width: int, seed: int) -> dict[str, Tensor]:
    """A Wan 2.1 VAE, bf16, whose decoded pictures fill a good part of [-1, 1]."""

    def gain(name: str) -> float:
        if name == "decoder.head.2.weight":
            return 0.7  # pictures of deviation 0.4
        return 1.7 if ".residual." in name or ".head." in name else 1.0  # E[SiLU(x)^2] = 0.36

    return _draw(_vae_shapes(base_width), "vae", seed, gain)


def random_text_encoder(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """A UMT5 encoder of the sizes in `config` (keys of t5_config.json), bf16."""
    head_dim = config["dim_attn"] // config["num_heads"]
    # The logits of T5 are not scaled, so its query weights carry the 1 / sqrt(head_dim).
    return _draw(
        _text_shapes(config),
        "text",
        seed,
        lambda name: head_dim**-0.5 if name.endswith("attn.q.weight") else 1.0,
    )


def random_image_encoder(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """A CLIP vision tower of the sizes in `config` (keys of clip_config.json), bf16."""
    return _draw(_image_shapes(config), "image", seed, lambda name: 1.0)


def random_audio_encoder(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """A wav2vec2 model of the sizes in `config` (keys of wav2vec's config.json), float32."""

    def gain(name: str) -> float:
        return 1.5 if name.startswith("feature_extractor.conv_layers") else 1.0  # GELU halves

    return _draw(_audio_shapes(config), "audio", seed, gain, dtype=torch.float32)
