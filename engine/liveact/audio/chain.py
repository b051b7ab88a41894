"""What happens to sound before the encoder hears it: resampled to 16 kHz, gain, tempo."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import soxr

from liveact.audio.tempo import FloatArray, TempoChanger

ENCODER_RATE_HZ = 16_000
FEATURES_PER_S = 25
SAMPLES_PER_FEATURE = ENCODER_RATE_HZ // FEATURES_PER_S
GAIN = 3.0  # of the released pipeline; the encoder normalises it away, up to its epsilon


class SpeechChain:
    """PCM of one rate → mono samples at 16 kHz, in a tempo of one audio feature a video frame.

    What comes out depends on the samples alone, not on how they were cut into pieces, as long as
    all pieces but the last have one length.

    Args:
        sample_rate_hz: of what is pushed.
        fps: video frames per second; the tempo changes by 25/fps, the pitch does not.
    """

    def __init__(self, sample_rate_hz: int, fps: Fraction) -> None:
        self._resampler = soxr.ResampleStream(sample_rate_hz, ENCODER_RATE_HZ, 1)
        tempo = FEATURES_PER_S / fps
        self._tempo = None if tempo == 1 else TempoChanger(tempo)
        self._num_samples = 0  # given back so far

    def push(self, piece: FloatArray) -> FloatArray:
        """piece [n, channels] → the samples that it completes; the mean of all channels is
        heard: a voice in one of two is heard 6 dB lower, which the encoder normalises away."""
        return self._given(self._change_tempo(self._resample(piece, last=False)))

    def finish(self, piece: FloatArray, num_samples: int) -> FloatArray:
        """The last piece, maybe empty → the rest: `num_samples` in all with those given before."""
        rest = self._change_tempo(self._resample(piece, last=True))
        if self._tempo is not None:
            missing = num_samples - self._num_samples - len(rest)
            rest = np.concatenate([rest, self._tempo.finish(missing)])
        return self._given(rest)

    def _resample(self, piece: FloatArray, last: bool) -> FloatArray:
        mono = piece.mean(axis=1, dtype=np.float32)  # of one channel: that channel, exactly
        speech = self._resampler.resample_chunk(mono, last=last)
        return speech * np.float32(GAIN)

    def _change_tempo(self, speech: FloatArray) -> FloatArray:
        return speech if self._tempo is None else self._tempo.push(speech)

    def _given(self, samples: FloatArray) -> FloatArray:
        self._num_samples += len(samples)
        return samples


@dataclass
class SoundFormat:
    """Rate and channels of what a session gives out: those asked for, else of the first sound."""

    sample_rate_hz: int = 0  # 0: not known yet
    channels: int = 0

    def settle(self, sample_rate_hz: int, channels: int) -> None:
        """Takes over what is not known yet."""
        self.sample_rate_hz = self.sample_rate_hz or sample_rate_hz
        self.channels = self.channels or channels


class OutputChain:
    """PCM as it was pushed → PCM in the session's format: resampled where the rates differ; mono
    goes to all channels, other numbers of channels become their mean first."""

    def __init__(self, sample_rate_hz: int, channels: int, output: SoundFormat) -> None:
        self._channels = output.channels
        self._same = channels == output.channels
        width = channels if self._same else 1
        self._resampler = (
            soxr.ResampleStream(sample_rate_hz, output.sample_rate_hz, width)
            if sample_rate_hz != output.sample_rate_hz
            else None
        )

    def push(self, piece: FloatArray, *, last: bool = False) -> FloatArray:
        """piece [n, channels] → [m, output channels]; `last` gives the rest."""
        if not self._same:
            piece = piece.mean(axis=1, keepdims=True)
        if self._resampler is not None:
            piece = self._resampler.resample_chunk(np.ascontiguousarray(piece), last=last)
        return piece if self._same else np.repeat(piece, self._channels, axis=1)
