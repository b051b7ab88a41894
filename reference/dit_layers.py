"""Layers of the DiT: rotary embedding, the KV cache and its memory, one layer, conditioning.

Written for being read next to the paper. Activations of one block are [B, n * F, D]: n latent
frames of F = h * w tokens, in (frame, row, column) order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.layout import COMPRESSION, BlockPlan

Rotation = tuple[Tensor, Tensor, Tensor]


# ---------------------------------------------------------------------------- rotary embedding


def rotation_table(head_dim: int, positions: int = 1024) -> Rotation:
    """e^{i * position * 10000^(-j/m)} for the m frame, row and column pairs (released code).

    Three tables, each [positions, m] complex128; of the 64 pairs of a head of 128, m = 22, 21, 21.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    tables = []
    for m in (pairs - 2 * spatial, spatial, spatial):
        frequency = 10000.0 ** (-torch.arange(m, dtype=torch.float64) / m)
        angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
        tables.append(torch.polar(torch.ones_like(angle), angle))
    return tables[0], tables[1], tables[2]


def rotate(x: Tensor, table: Rotation, first_slot: int) -> Tensor:
    """3D RoPE on interleaved pairs (released code; eq. 7 for the slot's position), in the precision
    of the table: float64, as released, unless a trainer narrows it.

    x: [B, n, h, w, heads, head_dim], whose first latent frame sits in slot `first_slot`; the result
    has its shape and dtype.
    """
    n, h, w = x.shape[1:4]
    factor = torch.cat(
        [
            table[0][first_slot : first_slot + n].view(n, 1, 1, -1).expand(n, h, w, -1),
            table[1][:h].view(1, h, 1, -1).expand(n, h, w, -1),
            table[2][:w].view(1, 1, w, -1).expand(n, h, w, -1),
        ],
        dim=-1,
    )  # [n, h, w, head_dim / 2]
    wide = x.to(table[0].real.dtype)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factor.unsqueeze(3)).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------- one step's context


@dataclass(frozen=True)
class KVCache:
    """Keys (unrotated) and values of one step and layer, by slot: [B, slots, h, w, heads, d]."""

    k: Tensor
    v: Tensor


def write_slots(stored: Tensor, frames: Mapping[int, Tensor], in_place: bool) -> Tensor:
    """`stored` [B, slots, ...] with some slots replaced by frames [B, ...]: itself or a new one."""
    if in_place:
        for slot, frame in frames.items():
            stored[:, slot] = frame
        return stored
    slots = [frames.get(slot, old) for slot, old in enumerate(stored.unbind(1))]
    return torch.stack(slots, dim=1)


def write_block(stored: Tensor, block: Tensor, plan: BlockPlan) -> Tensor:
    """`stored` [B, slots, ...] with the block's [B, n, ...] in its slots: itself or a new one."""
    if plan.in_place:
        stored[:, plan.first_slot : plan.end_slot] = block
        return stored
    return torch.cat([stored[:, : plan.first_slot], block, stored[:, plan.end_slot :]], dim=1)


# ---------------------------------------------------------------------------- modules


def widened(x: Tensor) -> Tensor:
    """At least float32: where the released code leaves bf16. float64 stays, for checks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) over all of the last dimension, in float32 or wider, times a weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> same shape and dtype."""
        wide = widened(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Normalises in float32 or wider, and returns the input's shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else widened(self.weight)
        bias = None if self.bias is None else widened(self.bias)
        out = F.layer_norm(widened(x), self.normalized_shape, weight, bias, self.eps)
        return out.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [..., Tq, heads, d], k and v [..., Tk, heads, d] -> [..., Tq, heads * d]."""
    q, k, v = q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(-3, -2).flatten(-2)


class SelfAttention(nn.Module):
    """Attention of a block to every valid slot; its keys and values go into the cache."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        taps: dict[str, Any] = {
            "kernel_size": COMPRESSION,
            "stride": COMPRESSION,
            "groups": dim,
            "bias": False,
        }
        self.memory_proj_k = nn.Conv1d(dim, dim, **taps)
        self.memory_proj_v = nn.Conv1d(dim, dim, **taps)

    def compress(self, frames: Tensor, conv: nn.Conv1d, plan: BlockPlan) -> Tensor:
        """Five latent frames [B, 5, h, w, heads, d] -> one [B, h, w, heads, d] (eq. 6)."""
        batch, five, h, w, heads, d = frames.shape
        tokens = frames.reshape(batch, five, h * w, heads * d)
        if plan.compress_axis == "frame":
            tokens = tokens.transpose(1, 2)  # the five values of one place become neighbours
        tokens = tokens.reshape(batch, five * h * w, heads * d)
        if plan.memory == "mean":
            out = tokens.unflatten(1, (-1, five)).mean(2)
        else:
            out = conv(tokens.transpose(1, 2)).transpose(1, 2)
        return out.reshape(batch, h, w, heads, d)

    def update(self, cache: KVCache, plan: BlockPlan) -> KVCache:
        """Compresses and moves; everything is read before anything is written."""
        if plan.update is None:
            return cache
        value_conv = self.memory_proj_k if plan.value_filter == "key" else self.memory_proj_v
        renewed = []
        for stored, conv in ((cache.k, self.memory_proj_k), (cache.v, value_conv)):
            frames = {
                target: self.compress(stored[:, list(sources)], conv, plan)
                for target, sources in plan.update.compress.items()
            }
            for target, source in plan.update.move.items():
                frames[target] = stored[:, source].clone()
            renewed.append(write_slots(stored, frames, plan.in_place))
        return KVCache(*renewed)

    def forward(
        self, x: Tensor, cache: KVCache, plan: BlockPlan, table: Rotation
    ) -> tuple[Tensor, KVCache]:
        """x [B, n * F, D] -> [B, n * F, D] and the cache with this block in it."""
        shape = (x.shape[0], plan.frames, *cache.k.shape[2:])  # [B, n, h, w, heads, head_dim]
        q = self.norm_q(self.q(x)).view(shape)
        k = self.norm_k(self.k(x)).view(shape)
        v = self.v(x).view(shape)
        cache = self.update(cache, plan)
        cache = KVCache(write_block(cache.k, k, plan), write_block(cache.v, v, plan))
        # As released: every slot is rotated at every use, valid or not, then the valid are cut.
        keys = rotate(cache.k, table, 0)[:, : plan.end_slot]
        values = cache.v[:, : plan.end_slot]
        queries = rotate(q, table, plan.first_slot)
        out = attend(queries.flatten(1, 3), keys.flatten(1, 3), values.flatten(1, 3))
        return self.o(out), cache


class CrossAttention(nn.Module):
    """One query, two key sets (text, image), two softmaxes, one output projection."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.k_img = nn.Linear(dim, dim)
        self.v_img = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """x [B, T, D], text [B, text_len, D], image [B, 257, D] -> [B, T, D]."""
        per_head = (self.heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, per_head)
        k = self.norm_k(self.k(text)).unflatten(-1, per_head)
        v = self.v(text).unflatten(-1, per_head)
        k_img = self.norm_k_img(self.k_img(image)).unflatten(-1, per_head)
        v_img = self.v_img(image).unflatten(-1, per_head)
        return self.o(attend(q, k, v) + attend(q, k_img, v_img))


class AudioCrossAttention(nn.Module):
    """Each latent frame attends to the audio tokens of its own time."""

    def __init__(self, dim: int, audio_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(audio_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, audio: Tensor, plan: BlockPlan) -> Tensor:
        """x [B, n * F, D], audio [B, slots, tokens, audio_dim] -> [B, n * F, D].

        Zero in slot 0, so in the very first latent frame of a session (released code).
        """
        per_frame = (plan.frames, -1, self.heads, x.shape[-1] // self.heads)
        q = self.q_linear(x).view(x.shape[0], *per_frame)
        kv = self.kv_linear(audio).unflatten(-1, (2, self.heads, -1))
        kv = kv[:, plan.first_slot : plan.end_slot]  # [B, n, tokens, 2, heads, head_dim]
        out = self.proj(attend(q, kv[:, :, :, 0], kv[:, :, :, 1]))  # [B, n, F, D]
        if plan.first_slot == 0:
            out = torch.cat([torch.zeros_like(out[:, :1]), out[:, 1:]], dim=1)
        return out.flatten(1, 2)


class Layer(nn.Module):
    """Self-attention, text and image, audio, FFN; every one added to the residual stream."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim, heads, eps = config["dim"], config["num_heads"], config["eps"]
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, heads, eps)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config["ffn_dim"]),
            nn.GELU(approximate="tanh"),
            nn.Linear(config["ffn_dim"], dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.audio_cross_attn = AudioCrossAttention(dim, config["output_dim"], heads)
        self.norm_x = LayerNorm(dim, eps)

    def forward(
        self,
        x: Tensor,  # [B, n * F, D]
        e0: Tensor,  # [B or 1, 6, D]
        text: Tensor,  # [B, text_len, D]
        image: Tensor,  # [B, 257, D]
        audio: Tensor | None,  # [B, slots, tokens, audio_dim]; None where the step skips audio
        cache: KVCache,
        plan: BlockPlan,
        table: Rotation,
    ) -> tuple[Tensor, KVCache]:
        """[B, n * F, D] and the cache with this block in it."""
        modulation = (self.modulation + e0).unsqueeze(2)  # [B or 1, 6, 1, D]
        shift0, scale0, gate0, shift1, scale1, gate1 = modulation.unbind(1)
        h = (widened(self.norm1(x)) * (1 + scale0) + shift0).to(x.dtype)
        attended, cache = self.self_attn(h, cache, plan, table)
        x = x + attended * gate0
        x = x + self.cross_attn(self.norm3(x), text, image)
        if audio is not None:
            x = x + self.audio_cross_attn(self.norm_x(x), audio, plan)
        h = (widened(self.norm2(x)) * (1 + scale1) + shift1).to(x.dtype)
        return x + self.ffn(h) * gate1, cache


class ImageProjection(nn.Module):
    """CLIP features -> keys and values' width."""

    def __init__(self, clip_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, clip: Tensor) -> Tensor:
        """[B, 257, clip_dim] -> [B, 257, D]."""
        return self.proj(clip)


class AudioProjection(nn.Module):
    """Feature windows of single video frames -> the audio tokens of each latent frame."""

    def __init__(self, config: Mapping[str, Any], feature_dim: int) -> None:
        super().__init__()
        self.window, self.vae_scale = config["audio_window"], config["vae_scale"]
        self.tokens = config["context_tokens"]
        hidden, out = config["intermediate_dim"], config["output_dim"]
        self.proj1 = nn.Linear(self.window * feature_dim, hidden)
        self.proj1_vf = nn.Linear((self.window + self.vae_scale - 1) * feature_dim, hidden)
        self.proj2 = nn.Linear(hidden, hidden)
        self.proj3 = nn.Linear(hidden, self.tokens * out)
        self.norm = nn.LayerNorm(out)

    def forward(self, windows: Tensor) -> Tensor:
        """[B, 1 + 4 * (slots - 1), 5, layers, channels] -> [B, slots, tokens, output_dim]."""
        middle = self.window // 2
        later = windows[:, 1:].unflatten(1, (-1, self.vae_scale))  # [B, slots - 1, 4, 5, ...]
        later = torch.cat(
            [later[:, :, 0, : middle + 1], later[:, :, 1:-1, middle], later[:, :, -1, middle:]],
            dim=2,
        )  # [B, slots - 1, 8, layers, channels]
        hidden = torch.cat(
            [
                torch.relu(self.proj1(windows[:, :1].flatten(2))),
                torch.relu(self.proj1_vf(later.flatten(2))),
            ],
            dim=1,
        )
        tokens = self.proj3(torch.relu(self.proj2(hidden)))
        return self.norm(tokens.unflatten(-1, (self.tokens, -1)))
