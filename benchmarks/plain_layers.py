"""Layers of the plain PyTorch DiT (see plain_torch.py): rotary embedding, memory, one layer, head.

Written for being read next to the paper: nothing is fused, nothing is kept that can be computed
again. Activations of one block are [n * F, D]: n latent frames of F = h * w tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPRESSION = 5  # latent frames that one long-term slot is made of


# ---------------------------------------------------------------------------- rotary embedding


def rotation_table(head_dim: int, positions: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """e^{i * position * 10000^(-j/m)} for the frame, row and column pairs; complex128."""
    pairs = head_dim // 2
    spatial = pairs // 3
    tables = []
    for m in (pairs - 2 * spatial, spatial, spatial):
        frequency = 10000.0 ** (-torch.arange(m, dtype=torch.float64) / m)
        angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
        tables.append(torch.polar(torch.ones_like(angle), angle))
    return tables[0], tables[1], tables[2]  # each [positions, m]


def rotate(x: Tensor, table: tuple[Tensor, Tensor, Tensor], first_slot: int) -> Tensor:
    """3D RoPE on interleaved pairs, in float64.

    x: [n, h, w, heads, head_dim], whose first latent frame sits in slot `first_slot`.
    """
    n, h, w = x.shape[:3]
    factor = torch.cat(
        [
            table[0][first_slot : first_slot + n].view(n, 1, 1, -1).expand(n, h, w, -1),
            table[1][:h].view(1, h, 1, -1).expand(n, h, w, -1),
            table[2][:w].view(1, 1, w, -1).expand(n, h, w, -1),
        ],
        dim=-1,
    )  # [n, h, w, head_dim / 2]
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factor.unsqueeze(3)).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------- one step's context


@dataclass(frozen=True)
class UpdateTable:
    """The update before a block: all sources are the values before it."""

    compress: dict[int, tuple[int, ...]]  # long-term slot <- five source slots
    move: dict[int, int]  # short-term slot <- source slot


@dataclass
class KVCache:
    """Keys (unrotated) and values of one step and layer, by slot."""

    k: Tensor  # [slots, h, w, heads, head_dim]
    v: Tensor  # [slots, h, w, heads, head_dim]


@dataclass(frozen=True)
class BlockPlan:
    """What every layer needs to know about the block being denoised."""

    first_slot: int  # where this block's latent frames go; 0 only in block 0
    frames: int
    update: UpdateTable | None  # None before block 2
    memory: str
    compress_axis: str
    value_filter: str

    @property
    def end_slot(self) -> int:
        return self.first_slot + self.frames


# ---------------------------------------------------------------------------- modules


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Normalises in float32 whatever the input is, and returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [..., Tq, heads, d], k and v [..., Tk, heads, d] -> [..., Tq, heads * d]."""
    q, k, v = q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(-3, -2).flatten(-2)


class SelfAttention(nn.Module):
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
        """Five latent frames [5, h, w, heads, d] -> one [h, w, heads, d]."""
        five, h, w, heads, d = frames.shape
        tokens = frames.reshape(five, h * w, heads * d)
        if plan.compress_axis == "frame":
            tokens = tokens.transpose(0, 1)  # the five values of one place become neighbours
        tokens = tokens.reshape(1, five * h * w, heads * d)
        if plan.memory == "mean":
            out = tokens.unflatten(1, (-1, five)).mean(2)
        else:
            out = conv(tokens.transpose(1, 2)).transpose(1, 2)
        return out.reshape(h, w, heads, d)

    def update(self, cache: KVCache, plan: BlockPlan) -> None:
        """Compresses and moves; everything is read before anything is written."""
        assert plan.update is not None
        value_conv = self.memory_proj_k if plan.value_filter == "key" else self.memory_proj_v
        for stored, conv in ((cache.k, self.memory_proj_k), (cache.v, value_conv)):
            new = {
                target: self.compress(stored[list(sources)], conv, plan)
                for target, sources in plan.update.compress.items()
            }
            new |= {target: stored[source].clone() for target, source in plan.update.move.items()}
            for target, frame in new.items():
                stored[target] = frame

    def forward(
        self, x: Tensor, cache: KVCache, plan: BlockPlan, table: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """x: [n * F, D] -> [n * F, D]."""
        shape = (plan.frames, *cache.k.shape[1:])  # [n, h, w, heads, head_dim]
        q = self.norm_q(self.q(x)).view(shape)
        k = self.norm_k(self.k(x)).view(shape)
        v = self.v(x).view(shape)
        if plan.update is not None:
            self.update(cache, plan)
        cache.k[plan.first_slot : plan.end_slot] = k
        cache.v[plan.first_slot : plan.end_slot] = v
        # As released: every slot is rotated at every use, valid or not, then the valid are cut.
        keys = rotate(cache.k, table, 0)[: plan.end_slot]
        values = cache.v[: plan.end_slot]
        queries = rotate(q, table, plan.first_slot)
        return self.o(attend(queries.flatten(0, 2), keys.flatten(0, 2), values.flatten(0, 2)))


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
        """x [T, D], text [text_len, D], image [257, D] -> [T, D]."""
        per_head = (self.heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, per_head)
        k = self.norm_k(self.k(text)).unflatten(-1, per_head)
        v = self.v(text).unflatten(-1, per_head)
        k_img = self.norm_k_img(self.k_img(image)).unflatten(-1, per_head)
        v_img = self.v_img(image).unflatten(-1, per_head)
        return self.o(attend(q, k, v) + attend(q, k_img, v_img))


class AudioCrossAttention(nn.Module):
    def __init__(self, dim: int, audio_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(audio_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, audio: Tensor, plan: BlockPlan) -> Tensor:
        """x [n * F, D], audio [slots, tokens, audio_dim] -> [n * F, D]; zero in the first frame."""
        q = self.q_linear(x).view(plan.frames, -1, self.heads, x.shape[-1] // self.heads)
        kv = self.kv_linear(audio).unflatten(-1, (2, self.heads, -1))
        kv = kv[plan.first_slot : plan.end_slot]  # [n, tokens, 2, heads, head_dim]
        out = self.proj(attend(q, kv[:, :, 0], kv[:, :, 1]))  # [n, F, D]
        if plan.first_slot == 0:
            out[0] = 0
        return out.flatten(0, 1)


class Layer(nn.Module):
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
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.audio_cross_attn = AudioCrossAttention(dim, config["output_dim"], heads)
        self.norm_x = LayerNorm(dim, eps)

    def forward(
        self,
        x: Tensor,  # [n * F, D]
        e0: Tensor,  # [6, D]
        text: Tensor,  # [text_len, D]
        image: Tensor,  # [257, D]
        audio: Tensor | None,  # [slots, tokens, audio_dim]; None where the step skips audio
        cache: KVCache,
        plan: BlockPlan,
        table: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        shift0, scale0, gate0, shift1, scale1, gate1 = (self.modulation[0] + e0).unbind(0)
        h = (self.norm1(x).float() * (1 + scale0) + shift0).to(x.dtype)
        x = x + self.self_attn(h, cache, plan, table) * gate0
        x = x + self.cross_attn(self.norm3(x), text, image)
        if audio is not None:
            x = x + self.audio_cross_attn(self.norm_x(x), audio, plan)
        h = (self.norm2(x).float() * (1 + scale1) + shift1).to(x.dtype)
        return x + self.ffn(h) * gate1


class Head(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim = config["dim"]
        patch = math.prod(config["patch_size"])
        self.norm = LayerNorm(dim, config["eps"], elementwise_affine=False)
        self.head = nn.Linear(dim, patch * config["out_dim"])
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation[0] + e).unbind(0)
        return self.head(self.norm(x) * (1 + scale) + shift)


class ImageProjection(nn.Module):
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
        """[1 + 4 * (slots - 1), 5, layers, channels] -> [slots, tokens, output_dim]."""
        middle = self.window // 2
        later = windows[1:].unflatten(
            0, (-1, self.vae_scale)
        )  # [slots - 1, 4, 5, layers, channels]
        later = torch.cat(
            [later[:, 0, : middle + 1], later[:, 1:-1, middle], later[:, -1, middle:]], dim=1
        )  # [slots - 1, 8, layers, channels]
        hidden = torch.cat(
            [
                torch.relu(self.proj1(windows[:1].flatten(1))),
                torch.relu(self.proj1_vf(later.flatten(1))),
            ]
        )
        tokens = self.proj3(torch.relu(self.proj2(hidden)))
        return self.norm(tokens.unflatten(-1, (self.tokens, -1)))
