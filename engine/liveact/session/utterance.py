"""One stretch of speech: what is said from one silence, or interruption, to the next."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from liveact.audio.front_end import AudioFrontEnd


class Utterance:
    """The sound of an utterance, and where it is in the session.

    It begins with the first frame of a block. Only the very first block of a session is short, so
    what comes later begins with silence as long as that block, which is never delivered: block b of
    the session is block b − first_block of `audio`. `SessionState` guards the attributes.

    Attributes:
        number: 0 is the first of a session.
        audio: what is said.
        begun: whether samples were pushed.
        leading_frames: video frames of silence that it begins with.
        first_block: None until its first block is next.
    """

    def __init__(self, number: int, audio: AudioFrontEnd) -> None:
        self.number = number
        self.audio = audio
        self.begun = False
        self.leading_frames = 0
        self.first_block: int | None = None

    def push_leading_silence(self, pcm: npt.NDArray[np.float32], sample_rate_hz: int) -> None:
        """The silence that goes before the first samples `pcm`."""
        if self.leading_frames:
            samples = round(self.leading_frames * sample_rate_hz / self.audio.fps)
            self.audio.push(np.zeros((samples, *pcm.shape[1:]), np.float32), sample_rate_hz)
            self.audio.skip(self.leading_frames)

    def place(self, next_block: int) -> None:
        """It begins in `next_block` of the session, if that was not settled before."""
        if self.first_block is None:
            self.first_block = next_block - 1 if self.leading_frames else next_block

    @property
    def begins_in(self) -> int:
        """The block of the session in which it is heard first."""
        assert self.first_block is not None
        return self.first_block + 1 if self.leading_frames else self.first_block

    def local(self, block: int) -> int:
        """The number in `audio` of a block of the session; of the next one, before `place`."""
        if self.first_block is None:
            return 1 if self.leading_frames else 0
        return block - self.first_block

    def is_ready(self, block: int) -> bool:
        """Whether all that a block of the session is made of was pushed."""
        return self.begun and self.audio.ready(self.local(block))

    def is_over(self, block: int) -> bool:
        """Whether it ended before a block of the session."""
        num_blocks = self.audio.num_blocks() if self.begun else None
        return num_blocks is not None and self.local(block) >= num_blocks

    def missing_s(self, block: int) -> float:
        """Seconds of sound that a block of the session waits for; 0 where it has begun before, for
        then nothing else can be made in its place."""
        return 0.0 if self.first_block is not None else self.audio.missing_s(self.local(block))

    def features(self, block: int) -> torch.Tensor:
        """The features of a block of the session, [rows, layers, hidden]."""
        return self.audio.block_features(self.local(block))

    def pcm(self, start_frame: int, stop_frame: int) -> npt.NDArray[np.float32]:
        """The sound [n, channels] of video frames [start_frame, stop_frame) of the session."""
        before = self._frames_before
        return self.audio.pcm(start_frame - before, stop_frame - before)

    @property
    def end_frame(self) -> int | None:
        """The video frame of the session after its last; None while it goes on."""
        frames = self.audio.num_frames
        return None if frames is None else self._frames_before + frames

    @property
    def seconds(self) -> float:
        """Of sound that were pushed, without the silence before it."""
        if not self.begun:
            return 0.0
        return max(0.0, self.audio.pushed_s - float(self.leading_frames / self.audio.fps))

    @property
    def _frames_before(self) -> int:
        assert self.first_block is not None
        return self.audio.clock.block_video_frames * self.first_block
