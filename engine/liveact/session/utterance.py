"""One stretch of speech: the audio from the start of a session, or from an interruption, on."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from liveact.audio.front_end import AudioFrontEnd


@dataclass(frozen=True)
class Utterance:
    """The audio from the start, or from an interruption, to the next interruption or the end.

    What follows an interruption begins with silence as long as block 0 of `audio`, because only the
    very first block of a session is short; unless it was interrupted before its first block.

    Attributes:
        audio: what is said. Block b of the session is block b − first_block of it.
        first_block: see `audio`.
        after_interruption: whether there was one before.
        leading_frames: video frames of silence that it begins with.
        begun: set once samples were pushed.
    """

    audio: AudioFrontEnd
    first_block: int = 0
    after_interruption: bool = False
    leading_frames: int = 0
    begun: threading.Event = field(default_factory=threading.Event)

    @property
    def unspoken(self) -> bool:
        """An interruption after which nothing was said: its end is no error."""
        return self.after_interruption and not self.begun.is_set()

    def push(self, pcm: npt.NDArray[np.float32], sample_rate_hz: int, *, block: bool) -> None:
        """Samples as `AudioFrontEnd.push` takes them; before the first go the silent frames."""
        if pcm.ndim and len(pcm) and not self.begun.is_set():
            if self.leading_frames:
                self.audio.push(pcm[:0], sample_rate_hz)  # refuses a format that cannot be
                silence = np.zeros((self._leading_samples(sample_rate_hz), *pcm.shape[1:]), "f4")
                self.audio.push(silence, sample_rate_hz)
            self.begun.set()
        self.audio.push(pcm, sample_rate_hz, block=block)

    def push_trailing_silence(self) -> None:
        """Fills the silence at the beginning up to a whole block, so that what is said between
        makes ⌊seconds·fps/32⌋ + 1 blocks as at the start of a session, and at least one."""
        if self.leading_frames and not self.unspoken:
            rate_hz, channels = self.audio.sample_rate_hz, self.audio.channels
            block_samples = math.ceil(
                self.audio.clock.block_video_frames * rate_hz / self.audio.fps
            )
            missing = block_samples - self._leading_samples(rate_hz)
            self.audio.push(np.zeros((missing, channels), np.float32), rate_hz)

    def end(self) -> None:
        """Nothing more will be pushed."""
        if self.unspoken:
            self.audio.close()
        else:
            self.audio.end()

    def features(self, block: int) -> torch.Tensor:
        """The features of a block of the session, [rows, layers, hidden]."""
        return self.audio.block_features(block - self.first_block)

    def pcm(self, start_frame: int, stop_frame: int) -> npt.NDArray[np.float32]:
        """The sound [n, channels] of video frames [start_frame, stop_frame) of the session."""
        before = self.audio.clock.block_video_frames * self.first_block
        return self.audio.pcm(start_frame - before, stop_frame - before)

    def _leading_samples(self, rate_hz: int) -> int:
        return round(self.leading_frames * rate_hz / self.audio.fps)
