"""Which slot of the KV layout holds what: blocks, the memory's update, the audio of a block.

Latent frames are numbered by slot: reference, long-term memory, short-term memory, current block.
No weights and no state here; the layers execute what `plan_block` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COMPRESSION = 5  # λ of eq. 6: latent frames that one long-term slot is made of
MEMORIES = ("sequential", "sharded", "mean")
COMPRESS_AXES = ("token", "frame")
VALUE_FILTERS = ("key", "own")
AUDIO_REACH = 2  # audio features on either side of a video frame
VIDEO_FRAMES = 4  # per latent frame; the very first latent frame is one video frame


@dataclass(frozen=True)
class Layout:
    """How many latent frames each part of the KV layout holds; slots are numbered in this order.

    The defaults are the released counts (section 2.3 and table 5 of the paper). Raises ValueError
    for counts that no session can run with.
    """

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
        """Latent frames that the layout holds in all."""
        return self.first_block + self.current

    def block_frames(self, block: int) -> int:
        """Latent frames of one block."""
        return self.first_block if block == 0 else self.current


@dataclass(frozen=True)
class UpdateTable:
    """The update before a block: all sources are the values before it.

    compress: long-term slot -> its five source slots. move: short-term slot -> its source slot.
    """

    compress: dict[int, tuple[int, ...]]
    move: dict[int, int]


def update_table(layout: Layout, memory: str) -> UpdateTable:
    """Which slot is made of which.

    The released tables exist for (2, 2, 2, 8): `sequential` and `mean` are what the released code
    does on one GPU, `sharded` what it does on two. For other counts the five sources of long-term
    slot i start where i equal strides over the M slots between the reference and the first moved
    slot put it (rounded half up), so groups overlap where M < 5 * long_term. `sharded` follows from
    how two processes split 14 slots and is defined for (2, 2, 2, 8) only.

    Raises ValueError for an unknown memory or for counts that have no such table.
    """
    expect_one_of("memory", memory, MEMORIES)
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


@dataclass(frozen=True)
class BlockPlan:
    """What every layer needs to know about the block being denoised; see `plan_block`."""

    first_slot: int
    """Where this block's latent frames go; 0 only in block 0."""
    frames: int
    """Latent frames of the block."""
    update: UpdateTable | None
    """Applied before the block's keys are written; None before block 2."""
    memory: str
    compress_axis: str
    value_filter: str
    in_place: bool

    @property
    def end_slot(self) -> int:
        """The slot after the block's last; the slots before it are valid."""
        return self.first_slot + self.frames


def plan_block(
    block: int,
    layout: Layout | None = None,
    *,
    memory: str = "sequential",
    compress_axis: str = "token",
    value_filter: str = "key",
    in_place: bool = False,
) -> BlockPlan:
    """The plan of one block; the defaults are what the released code does on one GPU.

    memory: which slots are compressed, see `update_table`; `mean` averages instead of filtering.
    compress_axis: `token` filters five raster-adjacent tokens (released code), `frame` the five
    latent frames at one place (the text of section 2.3). value_filter: the taps that compress the
    values, `key` those of the keys too (released code), `own` memory_proj_v (eq. 6).
    in_place: the layers write into the caches they are given, as the released code does. False:
    they leave them alone and return new ones, which gradients need.

    Raises ValueError for an unknown setting or a layout without such a table.
    """
    expect_one_of("compress_axis", compress_axis, COMPRESS_AXES)
    expect_one_of("value_filter", value_filter, VALUE_FILTERS)
    layout = layout or Layout()
    table = update_table(layout, memory)
    return BlockPlan(
        first_slot=0 if block == 0 else layout.first_block,
        frames=layout.block_frames(block),
        update=table if block >= 2 else None,
        memory=memory,
        compress_axis=compress_axis,
        value_filter=value_filter,
        in_place=in_place,
    )


def audio_rows(audio: Tensor, block: int, layout: Layout | None = None) -> Tensor:
    """The features that the latent frames of one block read, clamped at both ends of what there is.

    audio: [..., S, layers, channels], one feature per video frame (25 per second of the audio as
    the model hears it). Returns [..., 25, layers, channels] for block 0 (features -2..22) and
    [..., 36, layers, channels] for block b >= 1 (features 32(b-1)+19 .. 32(b-1)+54).
    """
    layout = layout or Layout()
    first_block_video = VIDEO_FRAMES * (layout.first_block - 1) + 1
    video_frames_per_block = VIDEO_FRAMES * layout.current
    if block == 0:
        first, count = 0, first_block_video
    else:
        first = video_frames_per_block * (block - 1) + first_block_video
        count = video_frames_per_block
    rows = torch.arange(first - AUDIO_REACH, first + count + AUDIO_REACH, device=audio.device)
    return audio[..., rows.clamp(0, audio.shape[-3] - 1), :, :]


def audio_windows(audio: Tensor, block: int, layout: Layout | None = None) -> Tensor:
    """Five features around each of the video frames the released code looks at in one block.

    audio: [..., S, layers, channels]. Returns [..., 1 + 4 * (slots - 1), 5, layers, channels]: 53
    windows, clamped at both ends of what there is.
    """
    layout = layout or Layout()
    first = VIDEO_FRAMES * layout.current * max(block - 1, 0)
    count = VIDEO_FRAMES * (layout.slots - 1) + 1
    frames = torch.arange(first, first + count, device=audio.device)
    around = torch.arange(-AUDIO_REACH, AUDIO_REACH + 1, device=audio.device)
    rows = frames[:, None] + around[None, :]
    return audio[..., rows.clamp(0, audio.shape[-3] - 1), :, :]


def expect_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError where a setting is none of the allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
