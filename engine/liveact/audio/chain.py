"""What happens to sound before the encoder hears it: resampled to 16 kHz, gain, tempo."""

from __future__ import annotations

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
        """piece [n, channels] → the samples that it completes; the first channel is heard."""
        return self._given(self._change_tempo(self._resample(piece, last=False)))

    def finish(self, piece: FloatArray, num_samples: int) -> FloatArray:
        """The last piece, maybe empty → the rest: `num_samples` in all with those given before."""
        rest = self._change_tempo(self._resample(piece, last=True))
        if self._tempo is not None:
            missing = num_samples - self._num_samples - len(rest)
            rest = np.concatenate([rest, self._tempo.finish(missing)])
        return self._given(rest)

    def _resample(self, piece: FloatArray, last: bool) -> FloatArray:
        speech = self._resampler.resample_chunk(np.ascontiguousarray(piece[:, 0]), last=last)
        return speech * np.float32(GAIN)

    def _change_tempo(self, speech: FloatArray) -> FloatArray:
        return speech if self._tempo is None else self._tempo.push(speech)

    def _given(self, samples: FloatArray) -> FloatArray:
        self._num_samples += len(samples)
        return samples
