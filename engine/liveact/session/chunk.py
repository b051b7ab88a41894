"""What comes out of a session."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Chunk:
    """The video frames of one latent frame, and the sound that belongs to them.

    Attributes:
        frames: uint8 [n, H, W, 3] RGB; n is 4, in the very first chunk 1.
        pcm: float32 [m, channels] at sample_rate_hz, exactly n frames long.
        sample_rate_hz: of `pcm`.
        pts: presentation time of the first frame in seconds; frame i plays at pts + i / fps.
        block: the block that it is of.
        last_of_block: whether the next chunk is of another block.
        timings: milliseconds. `decode_ms` is of this chunk. The last chunk of a block has, of the
            whole block, also `wait_ms` (for audio), `audio_ms` (encoder), `denoise_ms`, `step0_ms`
            to `step2_ms`, `block_decode_ms`, and `overlap_ms`: how much of the decoding passed
            while a block denoised.
    """

    frames: npt.NDArray[np.uint8]
    pcm: npt.NDArray[np.float32]
    sample_rate_hz: int
    pts: float
    block: int
    last_of_block: bool
    timings: dict[str, float] = field(default_factory=dict)
