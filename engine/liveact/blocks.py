"""The one clock: which latent frames, video frames and audio features a block has.

A latent frame is four video frames, the very first one a single video frame. A block is the group
of latent frames that is made together: the first block fills the context slots, every later one the
current slots (docs/model.md, "Vocabulary"). There is one audio feature for each video frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from liveact.errors import InputError

if TYPE_CHECKING:
    import torch

TEMPORAL_STRIDE = 4  # video frames of a latent frame
SPATIAL_STRIDE = 8  # pixels of a latent position, in height and in width
SIDE_MULTIPLE = 2 * SPATIAL_STRIDE  # the patch embedding takes 2×2 latent positions
MIN_SIDE, MAX_SIDE = 32, 2048
FEATURE_REACH = 2  # features before and after its own that a video frame is made from
MIN_FPS, MAX_FPS = 1, 100


class Slots(NamedTuple):
    """Latent frames in each part of the key/value layout; the defaults are the released ones."""

    reference: int = 2
    long_term: int = 2
    short_term: int = 2
    current: int = 8

    @property
    def context(self) -> int:
        """What lives from block to block, and what the first block fills."""
        return self.reference + self.long_term + self.short_term

    @property
    def total(self) -> int:
        """Context and current block."""
        return self.context + self.current


RELEASED_SLOTS = Slots()


@dataclass(frozen=True)
class BlockClock:
    """Frames and features of each block, counted from the start of a session."""

    slots: Slots = RELEASED_SLOTS

    @property
    def first_video_frames(self) -> int:
        """Video frames of block 0; 21 with the released slots."""
        return TEMPORAL_STRIDE * (self.slots.context - 1) + 1

    @property
    def block_video_frames(self) -> int:
        """Video frames of every later block; 32 with the released slots."""
        return TEMPORAL_STRIDE * self.slots.current

    @property
    def condition_frames(self) -> int:
        """Video frames that the conditioning y is encoded from; 53 with the released slots."""
        return TEMPORAL_STRIDE * (self.slots.total - 1) + 1

    def latent_frames(self, block: int) -> int:
        """How many latent frames a block has; 6, then 8, with the released slots."""
        _check_block(block)
        return self.slots.current if block else self.slots.context

    def video_frames(self, block: int) -> range:
        """The video frames of a block; 0 to 20, then 32 a block, with the released slots."""
        _check_block(block)
        if block == 0:
            return range(self.first_video_frames)
        start = self.first_video_frames + self.block_video_frames * (block - 1)
        return range(start, start + self.block_video_frames)

    def features(self, block: int) -> range:
        """The audio features of a block, from −2 in block 0 on: those of its video frames and two
        more on either side. 25, then 36 a block, with the released slots."""
        frames = self.video_frames(block)
        return range(frames.start - FEATURE_REACH, frames.stop + FEATURE_REACH)

    def num_blocks(self, num_frames: int) -> int:
        """Blocks that hold this many video frames, at least one."""
        later = max(0, num_frames - self.first_video_frames)
        return 1 - -later // self.block_video_frames


RELEASED_CLOCK = BlockClock()


def audio_rows(
    features: torch.Tensor, block: int, clock: BlockClock = RELEASED_CLOCK
) -> torch.Tensor:
    """The rows of whole-clip features [S, …] that a block needs; indices clamp to the clip."""
    last = len(features) - 1
    return features[[min(max(index, 0), last) for index in clock.features(block)]]


def exact_fps(fps: float | Fraction) -> Fraction:
    """The frame rate as a fraction (denominator ≤ 1001), so that no timestamp ever drifts."""
    if not (math.isfinite(fps) and MIN_FPS <= fps <= MAX_FPS):
        raise InputError(f"fps: expected {MIN_FPS} to {MAX_FPS}, found {fps}")
    return Fraction(fps).limit_denominator(1001)


def frames_of(num_samples: int, sample_rate_hz: int, fps: Fraction) -> int:
    """Video frames that sound lasts: begun ones count, but for the length of one sample, which is
    what rounding the start of a frame to a sample may cost."""
    return max(1, math.ceil((num_samples - 1) * fps / sample_rate_hz))


def check_size(width: int, height: int) -> None:
    """Raises InputError unless both sides are multiples of 16 from 32 to 2048 pixels."""
    for side in (width, height):
        if side % SIDE_MULTIPLE or not MIN_SIDE <= side <= MAX_SIDE:
            raise InputError(
                f"size: expected multiples of {SIDE_MULTIPLE} from {MIN_SIDE} to {MAX_SIDE}, "
                f"found {width}×{height}"
            )


def latent_size(size: Sequence[int]) -> tuple[int, int]:
    """(width, height) of a picture → (h, w) of its latent."""
    width, height = size
    return height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def _check_block(block: int) -> None:
    if block < 0:
        raise InputError(f"block: expected 0 or more, found {block}")
