"""A block on its way through the workers: what is fixed about it when its number is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liveact.session.chunk import BlockTimings
from liveact.session.utterance import Utterance


@dataclass(frozen=True)
class PromptEdit:
    """Another prompt for some blocks.

    Attributes:
        first: the first block that is made with it.
        last: the last one; None: for good.
        text: [tokens, text_dim].
    """

    first: int
    last: int | None
    text: torch.Tensor

    def applies_to(self, block: int) -> bool:
        """Whether a block is made with it, unless a later edit says otherwise."""
        return self.first <= block and (self.last is None or block <= self.last)

    def replaces(self, other: PromptEdit, next_block: int) -> bool:
        """Whether nothing is left of an earlier edit from `next_block` on."""
        if other.last is not None and other.last < next_block:
            return True
        ends_later = self.last is None or (other.last is not None and other.last <= self.last)
        return ends_later and self.first <= max(other.first, next_block)


@dataclass(frozen=True, eq=False)
class Turn:
    """What is fixed about a block when the denoise worker takes its number.

    Attributes:
        block: its number.
        utterance: what is said in it, or is said next where it idles.
        idle: whether nothing is said in it.
        text: the prompt, [tokens, text_dim].
        epoch: interruptions before it.
        begun_s: when, of time.monotonic.
    """

    block: int
    utterance: Utterance
    idle: bool
    text: torch.Tensor
    epoch: int
    begun_s: float


@dataclass(frozen=True)
class Latent:
    """A denoised block on its way to the decode worker.

    Attributes:
        turn: what it is.
        value: [16, n, h, w].
        timings: all but the decoding.
    """

    turn: Turn
    value: torch.Tensor
    timings: BlockTimings
