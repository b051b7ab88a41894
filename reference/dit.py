"""The LiveAct DiT in plain PyTorch: one velocity evaluation of one block, batched, differentiable.

Every step projects text, image and audio anew, keeps the keys of 14 latent frames unrotated, and
rotates the whole cache in float64 each time it is used: what the released code does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.dit_layers import (
    AudioProjection,
    ImageProjection,
    KVCache,
    Layer,
    LayerNorm,
    Rotation,
    rotation_table,
)
from reference.layout import BlockPlan, Layout


class Head(nn.Module):
    """The velocity of each token's patch."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim = config["dim"]
        patch = math.prod(config["patch_size"])
        self.norm = LayerNorm(dim, config["eps"], elementwise_affine=False)
        self.head = nn.Linear(dim, patch * config["out_dim"])
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, T, D], e [B or 1, D] -> [B, T, patch * out_dim]."""
        shift, scale = (self.modulation + e.unsqueeze(1)).unsqueeze(2).unbind(1)  # [B or 1, 1, D]
        return self.head(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """G of eq. 1: its weights; the state of a session is `DiTStream`'s, or the caller's.

    A fresh one has torch's default initialisation (ones in the norms, N(0, 1/D) in the modulation,
    as released); a trainer may want another. The names and shapes of `state_dict()` are those of
    the released checkpoint. It computes in the dtype and on the device of its parameters.

    config: keys of the checkpoint's config.json. clip_dim: width of the image features.
    audio_dim: layers * channels of the audio features.
    """

    def __init__(
        self, config: Mapping[str, Any], *, clip_dim: int = 1280, audio_dim: int = 12 * 768
    ) -> None:
        super().__init__()
        self.config = dict(config)
        dim = config["dim"]
        self.patch_size: tuple[int, int, int] = tuple(config["patch_size"])
        self.patch_embedding = nn.Conv3d(
            config["in_dim"], dim, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config["text_dim"], dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config["freq_dim"], dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_emb = ImageProjection(clip_dim, dim)
        self.audio_proj = AudioProjection(config, audio_dim)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        self.head = Head(config)
        # Not a buffer: `to(dtype)` would make real numbers of it.
        self._rotation: Rotation | None = None

    @classmethod
    def from_tensors(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> DiT:
        """The DiT of a checkpoint; the sizes of image and audio features come from the shapes.

        weights: by released name, on the device to compute on. Those that are in `dtype` already
        are used as they lie, so training changes them; the others are converted. All of them
        require gradients, as those of a fresh one do. Raises RuntimeError (of `load_state_dict`)
        for missing, unexpected or misshapen tensors.
        """
        clip_dim = weights["img_emb.proj.1.weight"].shape[0]
        audio_dim = weights["audio_proj.proj1.weight"].shape[1] // config["audio_window"]
        with torch.device("meta"):
            model = cls(config, clip_dim=clip_dim, audio_dim=audio_dim)
        converted = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(converted, assign=True)
        return model

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and of what `forward` returns."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.patch_embedding.weight.device

    def empty_caches(
        self, batch: int, latent_size: tuple[int, int], layout: Layout | None = None
    ) -> list[KVCache]:
        """What a step starts block 0 from: one cache of zeros per layer.

        latent_size: (h, w) of the latent, multiples of the patch size.
        """
        _, ph, pw = self.patch_size
        heads = self.config["num_heads"]
        slots = (layout or Layout()).slots
        grid = (latent_size[0] // ph, latent_size[1] // pw)
        shape = (batch, slots, *grid, heads, self.config["dim"] // heads)
        empty = torch.zeros(shape, device=self.device, dtype=self.dtype)
        return [KVCache(empty.clone(), empty.clone()) for _ in self.blocks]

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """A scalar or [B] -> e [1 or B, D] for the head, e0 [1 or B, 6, D] for the layers.

        The sinusoid is in float64, as released.
        """
        half = self.config["freq_dim"] // 2
        j = torch.arange(half, dtype=torch.float64, device=self.device)
        angle = timestep.double().reshape(-1, 1) * 10000.0 ** (-j / half)
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=1)  # [1 or B, freq_dim]
        e = self.time_embedding(sinusoid.to(self.dtype))
        return e, self.time_projection(e).unflatten(1, (6, -1))

    def embed_text(self, text: Tensor) -> Tensor:
        """[B, n <= text_len, text_dim] -> [B, text_len, D].

        The padding is attended to, as released; text_len is the config's.
        """
        return self.text_embedding(F.pad(text, (0, 0, 0, self.config["text_len"] - text.shape[1])))

    def narrow_rotation(self) -> None:
        """Rotates in float32 from now on, for training: the released float64 takes a fifth of a
        training step, and its results differ by 1e-7."""
        frame, row, column = (table.to(torch.complex64) for table in self.rotation())
        self._rotation = (frame, row, column)

    def rotation(self) -> Rotation:
        """The tables of the rotary embedding, on the device of the parameters."""
        if self._rotation is None:
            self._rotation = rotation_table(self.config["dim"] // self.config["num_heads"])
        if self._rotation[0].device != self.device:
            frame, row, column = (table.to(self.device) for table in self._rotation)
            self._rotation = (frame, row, column)
        return self._rotation

    def forward(
        self,
        z: Tensor,  # [B, 16, n, h, w]
        y: Tensor,  # [B, 20, n, h, w]
        timestep: Tensor,  # scalar or [B]: 1000 * sigma
        text: Tensor,  # [B, n_tok <= text_len, text_dim]; zeros after the true length
        clip: Tensor,  # [B, 257, clip_dim]
        windows: Tensor,  # [B, 53, 5, layers, channels], of `audio_windows`
        caches: Sequence[KVCache],  # one per layer: what this step left in the block before
        plan: BlockPlan,
        *,
        skip_audio: bool,
    ) -> tuple[Tensor, list[KVCache]]:
        """The velocity [B, 16, n, h, w] (epsilon - x0) and the caches with this block in them.

        skip_audio: no layer hears the audio; the released sampler does so in its first step. With
        `plan.in_place` the returned caches are the given ones, written to.
        """
        x = self.patch_embedding(torch.cat([z.to(self.dtype), y], dim=1))  # [B, D, n, h, w]
        n, h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # [B, n * F, D]
        e, e0 = self.embed_time(timestep)
        context, image = self.embed_text(text), self.img_emb(clip)
        audio = self.audio_proj(windows)  # at step 0 too, where no layer reads it, as released
        heard = None if skip_audio else audio
        written = []
        for layer, cache in zip(self.blocks, caches, strict=True):
            x, after = layer(x, e0, context, image, heard, cache, plan, self.rotation())
            written.append(after)
        out = self.head(x, e).unflatten(1, (n, h, w)).unflatten(4, (*self.patch_size, -1))
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, c, n, pf, h, ph, w, pw]
        return out.flatten(6, 7).flatten(4, 5).flatten(2, 3), written


def stack_texts(texts: Sequence[Tensor], text_len: int) -> Tensor:
    """Prompts of different lengths [n_i, text_dim] -> [B, text_len, text_dim], zeros after each.

    Raises ValueError for a prompt longer than text_len.
    """
    longest = max(len(text) for text in texts)
    if longest > text_len:
        raise ValueError(f"text: expected at most {text_len} rows, found {longest}")
    return torch.stack([F.pad(text, (0, 0, 0, text_len - len(text))) for text in texts])
