"""The LiveAct DiT as one would otherwise write it: plain PyTorch, nothing fused.

Two users. The benchmark times it as the baseline: it does the work the released code does, so every
step projects text, image and audio anew, keeps the keys of 14 latent frames unrotated, and rotates
the whole cache in float64 each time it is used. The tests use it as the independent oracle of the
C++ runtime: it shares no code with the package and agrees with the recordings of the released model
(tests/test_plain_torch.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_layers import (
    COMPRESSION,
    AudioProjection,
    BlockPlan,
    Head,
    ImageProjection,
    KVCache,
    Layer,
    UpdateTable,
    rotation_table,
)

TIMESTEPS = (1000.0, 937.5, 833.33333333, 0.0)  # as released; the last one ends the sampler
MEMORIES = ("sequential", "sharded", "mean")
COMPRESS_AXES = ("token", "frame")
VALUE_FILTERS = ("key", "own")


# ---------------------------------------------------------------------------- layout and update


@dataclass(frozen=True)
class Layout:
    """How many latent frames each part of the KV layout holds; slots are numbered in this order."""

    reference: int = 2
    long_term: int = 2
    short_term: int = 2
    current: int = 8

    def __post_init__(self) -> None:
        counts = (self.reference, self.long_term, self.short_term, self.current)
        if min(counts) < 0 or self.first_block < 1 or self.current < max(1, self.short_term):
            raise ValueError(
                "layout: expected counts >= 0, a non-empty first block and current >= short_term, "
                f"found (reference, long_term, short_term, current) = {counts}"
            )

    @property
    def first_block(self) -> int:
        """Latent frames of block 0, which fills every slot before the current ones."""
        return self.reference + self.long_term + self.short_term

    @property
    def slots(self) -> int:
        return self.first_block + self.current

    def block_frames(self, block: int) -> int:
        """Latent frames of one block."""
        return self.first_block if block == 0 else self.current


def update_table(layout: Layout, memory: str) -> UpdateTable:
    """Which slot is made of which.

    The released tables exist for (2, 2, 2, 8). For other counts the five sources of long-term slot
    i start where i equal strides over the M slots between the reference and the first moved slot
    put it (rounded half up), so groups overlap where M < 5 * long_term. `sharded` follows from how
    two processes split 14 slots and is defined for (2, 2, 2, 8) only.

    Raises ValueError for an unknown memory or for counts that have no such table.
    """
    if memory not in MEMORIES:
        raise ValueError(f"memory: expected one of {', '.join(MEMORIES)}, found {memory!r}")
    moved_from = layout.slots - layout.short_term
    short_term = layout.reference + layout.long_term
    move = {short_term + i: moved_from + i for i in range(layout.short_term)}
    if memory == "sharded":
        if layout != Layout():
            raise ValueError(f"memory sharded: expected the layout {Layout()}, found {layout}")
        return UpdateTable({2: (2, 6, 7, 8, 9), 3: (3, 4, 5, 10, 11)}, move)

    available = moved_from - layout.reference
    if layout.long_term and available < COMPRESSION:
        raise ValueError(
            f"layout: expected at least {COMPRESSION} slots between the reference and the moved "
            f"slots, found {available} in {layout}"
        )
    gaps = max(layout.long_term - 1, 1)
    compress = {}
    for i in range(layout.long_term):
        start = layout.reference + (i * (available - COMPRESSION) + gaps // 2) // gaps
        compress[layout.reference + i] = tuple(range(start, start + COMPRESSION))
    return UpdateTable(compress, move)


# ---------------------------------------------------------------------------- audio windows


def audio_rows(audio: Tensor, block: int, layout: Layout | None = None) -> Tensor:
    """The features one block reads, clamped at both ends of what there is.

    audio: [S, layers, channels], one feature per video frame. Returns [25, ...] for block 0
    (features -2..22) and [36, ...] for block b >= 1 (features 32(b-1)+19 .. 32(b-1)+54).
    """
    layout = layout or Layout()
    first_block_video = 4 * (layout.first_block - 1) + 1
    if block == 0:
        first, count = 0, first_block_video
    else:
        first, count = 4 * layout.current * (block - 1) + first_block_video, 4 * layout.current
    rows = torch.arange(first - 2, first + count + 2, device=audio.device)
    return audio[rows.clamp(0, audio.shape[0] - 1)]


def audio_windows(audio: Tensor, block: int, layout: Layout) -> Tensor:
    """Five features around each of the video frames the released code looks at in one block.

    audio: [S, layers, channels]. Returns [4 * (slots - 1) + 1, 5, layers, channels]: 53 windows.
    """
    first = 4 * layout.current * max(block - 1, 0)
    frames = torch.arange(first, first + 4 * (layout.slots - 1) + 1, device=audio.device)
    rows = frames[:, None] + torch.arange(-2, 3, device=audio.device)[None, :]
    return audio[rows.clamp(0, audio.shape[0] - 1)]


# ---------------------------------------------------------------------------- model


class PlainDiT(nn.Module):
    """Weights of one model; the state of a session is PlainStream's.

    config: the checkpoint's config.json. weights: its tensors by name; what is not in `dtype` is
    converted, the device is theirs. The sizes of the audio and image features come from the shapes.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = dict(config)
        dim = config["dim"]
        self.dtype = dtype
        self.device = weights["patch_embedding.weight"].device
        self.patch_size: tuple[int, int, int] = tuple(config["patch_size"])
        with torch.device("meta"):
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
            self.img_emb = ImageProjection(weights["img_emb.proj.1.weight"].shape[0], dim)
            feature_dim = weights["audio_proj.proj1.weight"].shape[1] // config["audio_window"]
            self.audio_proj = AudioProjection(config, feature_dim)
            self.blocks = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
            self.head = Head(config)
        converted = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.load_state_dict(converted, assign=True)
        self.requires_grad_(False)
        head_dim = dim // config["num_heads"]
        frame, row, column = (part.to(self.device) for part in rotation_table(head_dim))
        self.rotation = (frame, row, column)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """A float32 scalar -> e [D] (for the head) and e0 [6, D] (for the layers)."""
        half = self.config["freq_dim"] // 2
        j = torch.arange(half, dtype=torch.float64, device=self.device)
        angle = timestep.double() * 10000.0 ** (-j / half)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()]).to(self.dtype))
        return e, self.time_projection(e).view(6, -1)

    def embed_text(self, text: Tensor) -> Tensor:
        """[n <= text_len, text_dim] -> [text_len, D]; the padding is attended to, as released."""
        return self.text_embedding(F.pad(text, (0, 0, 0, self.config["text_len"] - text.shape[0])))

    def forward(
        self,
        z: Tensor,  # [16, n, h, w]
        y: Tensor,  # [20, n, h, w]
        timestep: Tensor,  # float32 scalar
        text: Tensor,  # [n <= text_len, text_dim]
        clip: Tensor,  # [257, clip_dim]
        windows: Tensor,  # [53, 5, layers, channels]
        caches: Sequence[KVCache],  # one per layer, of this step
        plan: BlockPlan,
        *,
        skip_audio: bool,
    ) -> Tensor:
        """The velocity [16, n, h, w], in the model's dtype. Changes `caches`."""
        x = self.patch_embedding(torch.cat([z.to(self.dtype), y]).unsqueeze(0))[0]  # [D, n, h, w]
        n, h, w = x.shape[1:]
        x = x.flatten(1).transpose(0, 1)  # [n * F, D]
        e, e0 = self.embed_time(timestep)
        context, image = self.embed_text(text), self.img_emb(clip)
        audio = self.audio_proj(windows)  # at step 0 too, where no layer reads it, as released
        for layer, cache in zip(self.blocks, caches, strict=True):
            heard = None if skip_audio else audio
            x = layer(x, e0, context, image, heard, cache, plan, self.rotation)
        out = self.head(x, e).view(n, h, w, *self.patch_size, self.config["out_dim"])
        out = out.permute(6, 0, 3, 1, 4, 2, 5)  # [c, n, pf, h, ph, w, pw]
        _, ph, pw = self.patch_size
        return out.reshape(self.config["out_dim"], n, h * ph, w * pw)


# ---------------------------------------------------------------------------- session


class PlainStream:
    """One session: conditioning, the KV caches of every step and layer, the block counter.

    text [n, text_dim] T5 rows; clip [257, clip_dim] or [1, ...]; y [20, slots, h, w] or [1, ...];
    audio [S, layers, channels], all of it, clamped at its ends. With `audio_guidance` other than 1
    the steps that hear audio run a second time on zero features, with their own caches.

    Raises ValueError for an unknown setting or a tensor of the wrong shape.
    """

    def __init__(
        self,
        model: PlainDiT,
        *,
        text: Tensor,
        clip: Tensor,
        y: Tensor,
        audio: Tensor,
        memory: str = "sequential",
        compress_axis: str = "token",
        value_filter: str = "key",
        audio_guidance: float = 1.0,
        layout: Layout | None = None,
    ) -> None:
        self.model, self.layout, self.memory = model, layout or Layout(), memory
        self.update = update_table(self.layout, memory)
        _expect_one_of("compress_axis", compress_axis, COMPRESS_AXES)
        _expect_one_of("value_filter", value_filter, VALUE_FILTERS)
        self.compress_axis, self.value_filter = compress_axis, value_filter
        self.audio_guidance = audio_guidance
        self.y = self._place(y.squeeze(0) if y.dim() == 5 else y)
        if self.y.dim() != 4 or self.y.shape[1] < self.layout.slots:
            raise ValueError(
                f"y: expected [20, >= {self.layout.slots}, h, w], found {list(y.shape)}"
            )
        self.clip = self._place(clip.squeeze(0) if clip.dim() == 3 else clip)
        self.audio = self._place(audio)
        self.set_prompt(text)
        self.block = 0
        self.velocities: list[Tensor] = []  # of the last block, one per step, [16, n, h, w] float32
        steps = range(len(TIMESTEPS) - 1)
        self._caches = [self._new_caches() for _ in steps]
        guided = [i for i in steps if i > 0 and audio_guidance != 1.0]
        self._silent_caches = {i: self._new_caches() for i in guided}

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.model.device, dtype=self.model.dtype)

    def _new_caches(self) -> list[KVCache]:
        config, (h, w) = self.model.config, self.y.shape[-2:]
        _, ph, pw = self.model.patch_size
        heads = config["num_heads"]
        shape = (self.layout.slots, h // ph, w // pw, heads, config["dim"] // heads)
        empty = torch.zeros(shape, device=self.model.device, dtype=self.model.dtype)
        return [KVCache(empty.clone(), empty.clone()) for _ in range(config["num_layers"])]

    def set_prompt(self, text: Tensor) -> None:
        """Other T5 rows [n <= text_len, text_dim] from the next block on."""
        self.text = self._place(text)

    def cache(self, step: int, layer: int) -> tuple[Tensor, Tensor]:
        """(k, v) after the last block, each [slots * F, heads, head_dim]; keys are unrotated."""
        cache = self._caches[step][layer]
        return cache.k.flatten(0, 2), cache.v.flatten(0, 2)

    def _plan(self) -> BlockPlan:
        return BlockPlan(
            first_slot=0 if self.block == 0 else self.layout.first_block,
            frames=self.layout.block_frames(self.block),
            update=self.update if self.block >= 2 else None,
            memory=self.memory,
            compress_axis=self.compress_axis,
            value_filter=self.value_filter,
        )

    @torch.no_grad()
    def denoise(self, noise: Tensor, renoise: Sequence[Tensor]) -> Tensor:
        """The next block: noise [16, n, h, w] and one re-noising per step -> latent, float32."""
        plan = self._plan()
        y = self.y[:, plan.first_slot : plan.end_slot]
        expected = (self.model.config["out_dim"], *y.shape[1:])
        found = [tuple(tensor.shape) for tensor in (noise, *renoise)]
        if found != [expected] * len(TIMESTEPS):
            raise ValueError(
                f"noise and {len(TIMESTEPS) - 1} re-noisings of block {self.block}: expected "
                f"{expected} each, found {found}"
            )
        windows = audio_windows(self.audio, self.block, self.layout)
        timesteps = torch.tensor(TIMESTEPS, dtype=torch.float32, device=self.model.device)
        sigmas = timesteps / 1000
        z = noise.to(self.model.device, torch.float32)
        self.velocities = []
        for i, epsilon in enumerate(renoise):
            heard = (timesteps[i], self.text, self.clip, windows, self._caches[i], plan)
            velocity = self.model(z, y, *heard, skip_audio=i == 0).float()
            if i in self._silent_caches:
                silent = (*heard[:3], torch.zeros_like(windows), self._silent_caches[i], plan)
                silence = self.model(z, y, *silent, skip_audio=False).float()
                velocity = silence + self.audio_guidance * (velocity - silence)
            self.velocities.append(velocity)
            x0 = z - sigmas[i] * velocity
            z = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * epsilon.to(z)
        self.block += 1
        return z


def _expect_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
