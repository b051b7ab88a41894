"""The streaming audio front end: PCM of any rate in, wav2vec2 features per block out.

The chain is the released one: resample to 16 kHz, gain 3, tempo × 25/fps with the pitch kept (so
that 25 features per second are one per video frame), then the encoder. All before the encoder works
on pieces of a fixed size and is compensated for its delay: the result depends neither on how the
caller cut the audio nor on timing, and feature k belongs to video frame k at any length.

Two ways to encode. `whole` encodes the ended clip once, exactly as released. `stream` encodes a
window of its own for every block, from `history_s` before the block's first feature to its last, so
an endless stream costs the same for every block. The history matters because the encoder normalises
over all it hears. Relative error (‖a − b‖ / ‖b‖ over all 38 complete blocks) against encoding all
at once on the same feature grid; 63 s of synthetic speech, 20 fps, the small wav2vec2 of the
recordings. Its weights are random; a trained one was not measured:

    history_s         0     0.76    1      2      4      8      16
    relative error   0.179  0.133  0.133  0.109  0.097  0.087  0.078

0.76 s is what the released streaming mode looks back. 4 s is the default: doubling it doubles the
cost and takes off a tenth of the error. Nothing is looked ahead, as in the released mode (0.4 s
would give 0.070 with 0.5 s more latency at 20 fps).
NOTE: `whole` inherits a drift from the released code, which stretches the convolutions' frames over
⌊25·seconds⌋ features: up to 40 ms at the end of a clip. With the random weights above, the 63 s
encoded with and without the last partial feature differ by 0.74. The windows of `stream` hold a
whole number of features, so they are free of it up to the last one.
"""

from __future__ import annotations

import math
import threading
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np
import torch

from liveact.audio.chain import (
    FEATURES_PER_S,
    SAMPLES_PER_FEATURE,
    OutputChain,
    SoundFormat,
    SpeechChain,
)
from liveact.audio.samples import SampleStore, as_float
from liveact.audio.tempo import FloatArray
from liveact.blocks import RELEASED_CLOCK, BlockClock, exact_fps, frames_of
from liveact.errors import InputError, SessionError

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
DELAY_S = 0.1  # at most, from what is pushed to what the encoder gets


class Encoder(Protocol):
    """What turns samples into features; `liveact.encoders.speech.AudioEncoder` is the
    real one."""

    def encode(self, samples: torch.Tensor, num_features: int) -> torch.Tensor:
        """`samples` float32 [n] at 16 kHz, not normalised → [num_features, layers, hidden]."""


class AudioFrontEnd:
    """Audio of one session: pushed at any pace, given back as block features and as PCM.

    One thread pushes and calls `end`, one takes features, one takes PCM; all methods may be called
    from any thread. The encoder runs outside the lock. Blocks and PCM ranges are taken in order:
    taking one releases all audio before it, so what is held is `backlog_s` of PCM and what is in
    flight, plus `history_s` of 16 kHz samples. The loop of a worker:

        for block in itertools.count():
            front_end.wait(block)
            if block == front_end.num_blocks():
                break
            features = front_end.block_features(block)

    A block is ready 2 video frames and about 0.1 s after its last frame was pushed (20 ms pieces,
    ~40 ms in the resampler at 44.1 kHz, ~40 ms in the tempo change).

    Args:
        encoder: turns 16 kHz samples into features.
        fps: video frames per second, 1 to 100; the tempo is changed by 25/fps, not at all at 25.
            Below 12 the tempo more than doubles and parts of sounds are skipped.
        clock: which video frames and features a block has.
        mode: `stream` or `whole`, see the top of the file.
        history_s: what the encoder hears before a block, in seconds of tempo-adjusted audio.
        output: the format that `pcm` gives; None: the pushed one.
        max_whole_s: longest clip in mode `whole` (the cost of attention grows with its square).

    Raises:
        InputError: bad arguments, see also each method.
        SessionError: from every method but `close` once `close` was called.
    """

    def __init__(
        self,
        encoder: Encoder,
        fps: float | Fraction,
        clock: BlockClock = RELEASED_CLOCK,
        *,
        mode: Literal["stream", "whole"] = "stream",
        history_s: float = 4.0,
        max_whole_s: float = 120.0,
        output: SoundFormat | None = None,
    ) -> None:
        self.fps = exact_fps(fps)
        self.clock = clock
        if mode not in ("stream", "whole"):
            raise InputError(f"audio mode: expected 'stream' or 'whole', found {mode!r}")
        if not 0 <= history_s <= 60:
            raise InputError(f"history_s: expected 0 to 60, found {history_s}")
        self._encoder = encoder
        self._mode = mode
        self._history_features = round(history_s * FEATURES_PER_S)
        self._max_whole_s = max_whole_s
        self._output = SoundFormat() if output is None else output

        self._changed = threading.Condition()  # guards everything below
        self._closed = False
        # Words only: an exception would hold whoever called `end` for as long as this lives.
        self._failure: str | None = None
        self._sample_rate_hz = 0  # 0: nothing pushed yet
        self._channels = 0
        self._pushed = 0  # PCM samples so far
        self._fill = 0  # those of them that wait for their piece to be full
        self._pcm = SampleStore(0)  # [n, channels] at the pushed rate
        self._speech = SampleStore()  # [n], 16 kHz, tempo-adjusted
        self._num_speech: int | None = None  # its exact length; None until the end
        self._num_frames: int | None = None  # video frames that it lasts; None until the end
        self._features_frame = 0  # video frames whose features were taken
        self._whole: torch.Tensor | None = None  # [S, layers, hidden]

    def push(self, pcm: np.ndarray, sample_rate_hz: int) -> None:
        """Appends PCM; the mean of its channels is what the encoder hears.

        Args:
            pcm: [n] or [n, channels], n ≥ 0, float32, or int16 which is scaled to [−1, 1).
            sample_rate_hz: 4000 to 384000; like the channels it is fixed by the first push.
        """
        samples = as_float(pcm)
        with self._changed:
            self._check_open()
            self._check_format(samples, sample_rate_hz)
            if self._num_speech is not None:
                raise InputError("push: expected no audio after the end, found some")
            clip_s = (self._pushed + len(samples)) / sample_rate_hz
            if self._mode == "whole" and clip_s > self._max_whole_s:
                raise InputError(
                    f"audio: expected at most {self._max_whole_s:g} s in mode 'whole', "
                    f"found {clip_s:.1f} s"
                )
            self._pushed += len(samples)
            while len(samples):
                part = samples[: len(self._pending) - self._fill]
                self._pending[self._fill : self._fill + len(part)] = part
                self._fill += len(part)
                samples = samples[len(part) :]
                if self._fill == len(self._pending):
                    self._take_piece(self._pending.copy())
                    self._fill = 0
            self._changed.notify_all()

    def skip(self, num_frames: int) -> None:
        """Nobody asks for the features of the first video frames: they are no backlog."""
        with self._changed:
            self._features_frame = max(self._features_frame, num_frames)

    def end(self, *, silence: bool = False) -> None:
        """Marks the end of the audio; a second call does nothing.

        silence: what follows in the last block is silence, and the encoder hears it; otherwise the
        last feature stands for all that would follow, as in the released code.

        Raises InputError when there is no audio, or without `silence` less than one video frame of
        it (which is also more than the convolutions of wav2vec2 need: 640 of at least 400 samples);
        those waiting get a SessionError with it as the cause.
        """
        with self._changed:
            self._check_open()
            if self._num_speech is not None:
                return
            seconds = Fraction(self._pushed, self._sample_rate_hz or 1)
            if not self._pushed or (seconds * self.fps < 1 and not silence):
                self._failure = (
                    f"audio: expected at least {float(1 / self.fps):.3f} s (one video frame), "
                    f"found {float(seconds):.3f} s"
                )
                self._changed.notify_all()
                raise InputError(self._failure)
            self._num_frames = frames_of(self._pushed, self._sample_rate_hz, self.fps)
            last_block = self.clock.num_blocks(self._num_frames) - 1
            self._flush(
                self.clock.features(last_block).stop * SAMPLES_PER_FEATURE
                if silence
                else math.floor(seconds * self.fps * SAMPLES_PER_FEATURE)
            )
            self._changed.notify_all()

    def close(self) -> None:
        """Drops all audio and wakes whoever waits; may be called more than once."""
        with self._changed:
            self._closed = True
            self._pcm, self._speech, self._whole = SampleStore(0), SampleStore(), None
            self._changed.notify_all()

    @property
    def backlog_s(self) -> float:
        """Seconds of audio that were pushed and whose features were not taken yet."""
        with self._changed:
            if not self._pushed:
                return 0.0
            taken_s = float(self._features_frame / self.fps)
            return max(0.0, self._pushed / self._sample_rate_hz - taken_s)

    @property
    def pushed_s(self) -> float:
        """Seconds of audio that were pushed."""
        with self._changed:
            return self._pushed / self._sample_rate_hz if self._pushed else 0.0

    @property
    def num_frames(self) -> int | None:
        """Video frames that the audio lasts, a begun one included; None before its end."""
        with self._changed:
            return self._num_frames

    def num_blocks(self) -> int | None:
        """Blocks that hold `num_frames`; None before the end of the audio."""
        with self._changed:
            self._check_open()
            return self._num_blocks()

    def ready(self, block: int) -> bool:
        """Whether `block_features` could be called: its audio is there, or all audio is."""
        with self._changed:
            self._check_open()
            return self._ready(block)

    def missing_s(self, block: int) -> float:
        """Seconds of audio that a block that is not `ready` waits for, about."""
        needed_s = self.clock.features(block).stop / self.fps
        return max(0.0, float(needed_s) + DELAY_S - self.pushed_s)

    def wait(self, block: int, timeout_s: float | None = None) -> bool:
        """Blocks until `ready(block)`; False when `timeout_s` passed first."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._failure is not None or self._ready(block), timeout_s
            )
            self._check_open()
            return self._ready(block)

    def block_features(self, block: int) -> torch.Tensor:
        """Features of a ready block: [25, layers, hidden] for block 0, [36, ...] for later ones.

        In mode `stream` one call encodes at most `history_s` + 1.44 s of audio, and the audio
        before that is released: an earlier block cannot be asked for again.
        """
        wanted = self.clock.features(block)
        with self._changed:
            self._check_open()
            if not self._ready(block):
                raise InputError(f"block {block}: its audio is not there yet, wait for it first")
            num_blocks = self._num_blocks()
            if num_blocks is not None and block >= num_blocks:
                raise InputError(f"block {block}: the audio has {num_blocks} blocks")
            start, stop, samples = self._window(block, wanted)
            self._features_frame = self.clock.video_frames(block + 1).start
            features = self._whole
            self._changed.notify_all()
        if features is None:
            features = self._encoder.encode(samples, stop - start)
        if self._mode == "whole":
            with self._changed:
                self._check_open()
                self._whole = features
                self._speech.drop_before(self._speech.stop)
        rows = torch.tensor(wanted).clamp(start, stop - 1) - start
        return features[rows.to(features.device)]

    def pcm(self, start_frame: int, stop_frame: int) -> FloatArray:
        """The PCM [n, channels] that sounds during video frames [start_frame, stop_frame).

        Sample round(frame·rate/fps) is the first of a frame (ties to even); zeros follow the end of
        the audio. PCM before `start_frame` is released. Raises InputError for a range that was
        released, or that was not pushed entirely and may still be.
        """
        with self._changed:
            self._check_open()
            rate_hz = self._output.sample_rate_hz
            if not rate_hz:
                raise InputError("pcm: expected audio to be pushed before, found none")
            if not 0 <= start_frame <= stop_frame:
                raise InputError(
                    f"pcm: expected 0 ≤ start ≤ stop, found {start_frame}, {stop_frame}"
                )
            start, stop = (round(f * rate_hz / self.fps) for f in (start_frame, stop_frame))
            if start < self._pcm.start:
                raise InputError(f"pcm: frame {start_frame} was already released")
            if stop > self._pcm.stop and self._num_speech is None:
                raise InputError(
                    f"pcm: frames up to {stop_frame} need {stop} samples, {self._pcm.stop} arrived"
                )
            self._pcm.drop_before(start)
            self._changed.notify_all()
            return self._pcm.read(start, stop)

    # Inside; the lock is held.

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the audio front end was closed")
        if self._failure is not None:
            cause = InputError(self._failure)
            raise SessionError(f"the audio front end failed: {self._failure}") from cause

    def _check_format(self, samples: FloatArray, sample_rate_hz: int) -> None:
        """The first push fixes the format and sets the chain up; later ones must agree."""
        channels = samples.shape[1]
        if self._sample_rate_hz:
            if (sample_rate_hz, channels) != (self._sample_rate_hz, self._channels):
                raise InputError(
                    f"push: the audio began with {self._sample_rate_hz} Hz, {self._channels} "
                    f"channels, found {sample_rate_hz} Hz, {channels} channels"
                )
            return
        limits = f"{MIN_RATE_HZ} to {MAX_RATE_HZ} Hz"
        if sample_rate_hz % 1 or not MIN_RATE_HZ <= sample_rate_hz <= MAX_RATE_HZ:
            raise InputError(f"sample rate: expected a whole {limits}, found {sample_rate_hz}")
        self._sample_rate_hz, self._channels = int(sample_rate_hz), channels
        # 20 ms: small against a block, large against the cost of one call of the resampler.
        self._pending = np.zeros((self._sample_rate_hz // 50, channels), np.float32)
        self._chain = SpeechChain(self._sample_rate_hz, self.fps)
        self._output.settle(self._sample_rate_hz, channels)
        self._to_output = OutputChain(self._sample_rate_hz, channels, self._output)
        self._pcm = SampleStore(self._output.channels)

    def _take_piece(self, piece: FloatArray) -> None:
        self._pcm.append(self._to_output.push(piece))
        self._speech.append(self._chain.push(piece))

    def _flush(self, num_speech: int) -> None:
        """Pushes the rest through the chain; the result has exactly `num_speech` samples."""
        rest = self._pending[: self._fill].copy()
        self._pcm.append(self._to_output.push(rest, last=True))
        self._speech.append(self._chain.finish(rest, num_speech))
        self._num_speech = num_speech

    def _num_blocks(self) -> int | None:
        return None if self._num_frames is None else self.clock.num_blocks(self._num_frames)

    def _ready(self, block: int) -> bool:
        if self._num_speech is not None:
            return True
        if self._mode == "whole":
            return False
        heard = self.clock.features(block).stop * SAMPLES_PER_FEATURE
        sound = round(self.clock.video_frames(block).stop * self._output.sample_rate_hz / self.fps)
        return self._speech.stop >= heard and self._pcm.stop >= sound

    def _window(self, block: int, wanted: range) -> tuple[int, int, torch.Tensor]:
        """The features [start, stop) to encode for a block, and their samples.

        The window ends with the last feature of the block even if more is there, so the result
        does not depend on timing; at the end of the audio it takes in the last partial feature.
        """
        start, stop = max(0, wanted.start - self._history_features), wanted.stop
        stop_sample = stop * SAMPLES_PER_FEATURE
        if self._mode == "whole":
            start = 0
        if self._num_speech is not None:
            num_features = self._num_speech // SAMPLES_PER_FEATURE
            if self._mode == "whole" or stop > num_features:
                stop, stop_sample = num_features, self._num_speech
        start_sample = start * SAMPLES_PER_FEATURE
        if self._whole is not None:
            return start, stop, torch.empty(0)
        if start_sample < self._speech.start:
            raise InputError(f"block {block}: its audio was already released")
        self._speech.drop_before(start_sample)
        samples = self._speech.read(start_sample, stop_sample)
        return start, stop, torch.from_numpy(samples)
