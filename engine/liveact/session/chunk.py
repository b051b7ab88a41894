"""What comes out of a session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class BlockTimings:
    """Where the time of a block went, in milliseconds.

    Attributes:
        wait_ms: until its audio was there.
        audio_ms: the audio encoder.
        denoise_ms: all steps, and the projection of the audio.
        step_ms: each step, on the device.
        decode_ms: all of its chunks.
        overlap_ms: how much of that passed while a block was denoised.
    """

    wait_ms: float
    audio_ms: float
    denoise_ms: float
    step_ms: tuple[float, ...]
    decode_ms: float = 0.0
    overlap_ms: float = 0.0


class ChunkTimings(NamedTuple):
    """Where the time of a chunk went.

    Attributes:
        decode_ms: milliseconds of its latent frame.
        block: of the whole block, in the last chunk of it; else None.
    """

    decode_ms: float = 0.0
    block: BlockTimings | None = None


_NO_TIMINGS = ChunkTimings()


@dataclass(frozen=True)
class Chunk:
    """The video frames of one latent frame, and the sound that belongs to them.

    Two timelines: `block` counts what the model has made, whether it was delivered or not; `pts` is
    the time of the player, which has no hole.

    Attributes:
        frames: uint8 [n, H, W, 3] RGB; n is 4, in the very first chunk 1, in the last one maybe
            less.
        pcm: float32 [m, channels] at sample_rate_hz, exactly n frames long.
        sample_rate_hz: of `pcm`; the same for all chunks of a session, as are the channels.
        pts: presentation time of the first frame in seconds: the length of all that was taken
            before. Frame i plays at pts + i / fps.
        block: the block that it is of.
        last_of_block: whether the next chunk is of another block.
        utterance: number of the utterance that it belongs to; of idling, of the one to come.
        speech: whether there is pushed sound in it, and not only the silence of idling or after the
            end of an utterance.
        last_of_utterance: whether the sound of the utterance ends in it.
        timings: where the time went.
    """

    frames: npt.NDArray[np.uint8]
    pcm: npt.NDArray[np.float32]
    sample_rate_hz: int
    pts: float
    block: int
    last_of_block: bool
    utterance: int = 0
    speech: bool = True
    last_of_utterance: bool = False
    timings: ChunkTimings = _NO_TIMINGS


class Interruption(NamedTuple):
    """What `Session.interrupt` cut off.

    Attributes:
        utterance: number of the utterance that was being delivered, or would have been next.
        delivered_s: seconds of its sound in the chunks that were taken.
    """

    utterance: int
    delivered_s: float
