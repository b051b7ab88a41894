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
from collections import deque
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np
import soxr
import torch

from liveact.audio.tempo import FloatArray, TempoChanger
from liveact.errors import InputError, SessionError

ENCODER_RATE_HZ = 16_000
FEATURES_PER_S = 25
SAMPLES_PER_FEATURE = ENCODER_RATE_HZ // FEATURES_PER_S
FIRST_BLOCK_FRAMES = 21
BLOCK_FRAMES = 32
GAIN = 3.0  # of the released pipeline; the encoder normalises it away, up to its epsilon

MIN_FPS, MAX_FPS = 1, 100
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_CHANNELS = 64
PEAK_LIMIT = 32_768.0  # 16-bit samples handed over as float are let through; beyond is garbage


class Encoder(Protocol):
    """What turns samples into features; `liveact.encoders.speech.AudioEncoder` is the real one."""

    def encode(self, samples: torch.Tensor, num_features: int) -> torch.Tensor:
        """`samples` float32 [n] at 16 kHz, not normalised → [num_features, layers, hidden]."""


def exact_fps(fps: float | Fraction) -> Fraction:
    """The frame rate as a fraction (denominator ≤ 1001), so that no timestamp ever drifts."""
    if not (math.isfinite(fps) and MIN_FPS <= fps <= MAX_FPS):
        raise InputError(f"fps: expected {MIN_FPS} to {MAX_FPS}, got {fps}")
    return Fraction(fps).limit_denominator(1001)


def block_feature_range(block: int) -> tuple[int, int]:
    """First and last feature index of a block, before clamping: 25 rows, then 36 per block.

    Block 0 has video frames 0..20 with a window of −2..+2 each; a later one the frames of eight
    latent frames, 32(b−1)+21 .. 32(b−1)+52, likewise.
    """
    if block < 0:
        raise InputError(f"block: expected 0 or more, got {block}")
    if block == 0:
        return -2, 22
    return BLOCK_FRAMES * (block - 1) + 19, BLOCK_FRAMES * (block - 1) + 54


class _SampleStore:
    """Samples [n, *shape] by absolute index, appended at the back and dropped at the front."""

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        self._pieces: deque[FloatArray] = deque()
        self.start = 0  # index of the oldest sample still held
        self.stop = 0  # index after the newest

    def append(self, piece: FloatArray) -> None:
        self._pieces.append(piece)
        self.stop += len(piece)

    def drop_before(self, index: int) -> None:
        """Forgets the pieces that end at or before `index`."""
        while self._pieces and self.start + len(self._pieces[0]) <= index:
            self.start += len(self._pieces.popleft())

    def read(self, start: int, stop: int) -> FloatArray:
        """A copy of [start, stop), start ≥ self.start; zeros where nothing was appended yet."""
        out = np.zeros((stop - start, *self._shape), np.float32)
        at = self.start
        for piece in self._pieces:
            if at >= stop:
                break
            if at + len(piece) > start:
                part = piece[max(0, start - at) : stop - at]
                first = max(0, at - start)
                out[first : first + len(part)] = part
            at += len(piece)
        return out


class AudioFrontEnd:
    """Audio of one session: pushed at any pace, given back as block features and as PCM.

    One thread pushes and calls `end`, one takes features, one takes PCM; all methods may be called
    from any thread. The encoder runs outside the lock. Blocks and PCM ranges are taken in order:
    taking one releases all audio before it, so what is held never exceeds `max_backlog_s` of PCM
    plus `history_s` of 16 kHz samples. The loop of a worker:

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
        mode: `stream` or `whole`, see the top of the file.
        history_s: what the encoder hears before a block, in seconds of tempo-adjusted audio.
        max_backlog_s: how much audio may be pushed ahead of the slower of both consumers.
        max_whole_s: longest clip in mode `whole` (the cost of attention grows with its square).

    Raises:
        InputError: bad arguments, see also each method.
        SessionError: from every method but `close` once `close` was called.
    """

    def __init__(
        self,
        encoder: Encoder,
        fps: float | Fraction,
        *,
        mode: Literal["stream", "whole"] = "stream",
        history_s: float = 4.0,
        max_backlog_s: float = 600.0,
        max_whole_s: float = 120.0,
    ) -> None:
        self.fps = exact_fps(fps)
        if mode not in ("stream", "whole"):
            raise InputError(f"audio mode: expected 'stream' or 'whole', got {mode!r}")
        if not 0 <= history_s <= 60:
            raise InputError(f"history_s: expected 0 to 60, got {history_s}")
        # Ten blocks: a piece may be half the backlog, and the other half must hold what a pipeline
        # needs to go on (three blocks in flight and one being waited for), or it would stall.
        least_backlog_s = float(10 * BLOCK_FRAMES / self.fps)
        if not max_backlog_s >= least_backlog_s:
            raise InputError(f"max_backlog_s: expected ≥ {least_backlog_s:g}, got {max_backlog_s}")
        self._encoder = encoder
        self._mode = mode
        self._history_features = round(history_s * FEATURES_PER_S)
        self._max_backlog_s = max_backlog_s
        self._max_whole_s = max_whole_s

        self._changed = threading.Condition()  # guards everything below
        self._closed = False
        self._failure: InputError | None = None
        self._sample_rate_hz = 0  # 0: nothing pushed yet
        self._channels = 0
        self._pushed = 0  # PCM samples so far
        self._fill = 0  # those of them that wait for their piece to be full
        self._pcm = _SampleStore(0)  # [n, channels] at the pushed rate
        self._speech = _SampleStore()  # [n], 16 kHz, tempo-adjusted
        self._num_speech: int | None = None  # its exact length; None until the end
        self._features_frame = self._pcm_frame = 0  # video frames the consumers are done with
        self._whole: torch.Tensor | None = None  # [S, layers, hidden]

    def push(self, pcm: np.ndarray, sample_rate_hz: int, *, block: bool = False) -> None:
        """Appends PCM; the first channel is what the encoder hears.

        Args:
            pcm: [n] or [n, channels], n ≥ 0, float32, or int16 which is scaled to [−1, 1).
            sample_rate_hz: 4000 to 384000; like the channels it is fixed by the first push.
            block: wait for room in the backlog instead of raising; a piece may then be at most
                half of `max_backlog_s`. `close` ends the wait with SessionError.
        """
        samples = _as_float(pcm)
        with self._changed:
            self._check_open()
            self._check_format(samples, sample_rate_hz)
            self._make_room(len(samples) / sample_rate_hz, block)
            if self._num_speech is not None:
                raise InputError("push: the audio has already ended")
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

    def end(self) -> None:
        """Marks the end of the audio; a second call does nothing.

        Raises InputError when there is less audio than one video frame lasts (which is also more
        than the convolutions of wav2vec2 need: 640 of at least 400 samples); those waiting get a
        SessionError with it as the cause.
        """
        with self._changed:
            self._check_open()
            if self._num_speech is not None:
                return
            seconds = Fraction(self._pushed, self._sample_rate_hz or 1)
            if seconds * self.fps < 1:
                self._failure = InputError(
                    f"nothing can be made of {float(seconds):.3f} s of audio: "
                    f"at least {float(1 / self.fps):.3f} s (one video frame) needed"
                )
                self._changed.notify_all()
                raise self._failure
            self._flush(math.floor(seconds * self.fps * SAMPLES_PER_FEATURE))
            self._changed.notify_all()

    def close(self) -> None:
        """Drops all audio and wakes whoever waits; may be called more than once."""
        with self._changed:
            self._closed = True
            self._pcm, self._speech, self._whole = _SampleStore(0), _SampleStore(), None
            self._changed.notify_all()

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the PCM, also of `pcm()`. Raises InputError before the first push."""
        return self._format()[0]

    @property
    def channels(self) -> int:
        """Channels of the PCM. Raises InputError before the first push."""
        return self._format()[1]

    def num_blocks(self) -> int | None:
        """⌊seconds·fps/32⌋ + 1, or None before the end of the audio."""
        with self._changed:
            self._check_open()
            return self._num_blocks()

    def ready(self, block: int) -> bool:
        """Whether `block_features` could be called: its audio is there, or all audio is."""
        with self._changed:
            self._check_open()
            return self._ready(block)

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
        first, last = block_feature_range(block)
        with self._changed:
            self._check_open()
            if not self._ready(block):
                raise InputError(f"block {block}: its audio is not there yet, wait for it first")
            num_blocks = self._num_blocks()
            if num_blocks is not None and block >= num_blocks:
                raise InputError(f"block {block}: the audio has {num_blocks} blocks")
            start, stop, samples = self._window(block, first, last)
            self._features_frame = FIRST_BLOCK_FRAMES + BLOCK_FRAMES * block
            features = self._whole
            self._changed.notify_all()
        if features is None:
            features = self._encoder.encode(samples, stop - start)
        if self._mode == "whole":
            with self._changed:
                self._check_open()
                self._whole = features
                self._speech.drop_before(self._speech.stop)
        rows = torch.arange(first, last + 1).clamp(start, stop - 1) - start
        return features[rows.to(features.device)]

    def pcm(self, start_frame: int, stop_frame: int) -> FloatArray:
        """The PCM [n, channels] that sounds during video frames [start_frame, stop_frame).

        Sample round(frame·rate/fps) is the first of a frame (ties to even); zeros follow the end of
        the audio. PCM before `start_frame` is released. Raises InputError for a range that was
        released, or that was not pushed entirely and may still be.
        """
        with self._changed:
            self._check_open()
            rate_hz, _ = self._format()
            if not 0 <= start_frame <= stop_frame:
                raise InputError(f"pcm: expected 0 ≤ start ≤ stop, got {start_frame}, {stop_frame}")
            start, stop = (round(f * rate_hz / self.fps) for f in (start_frame, stop_frame))
            if start < self._pcm.start:
                raise InputError(f"pcm: frame {start_frame} was already released")
            if stop > self._pcm.stop and self._num_speech is None:
                raise InputError(
                    f"pcm: frames up to {stop_frame} need {stop} samples, {self._pcm.stop} arrived"
                )
            self._pcm.drop_before(start)
            self._pcm_frame = stop_frame
            self._changed.notify_all()
            return self._pcm.read(start, stop)

    # Inside; the lock is held.

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the audio front end was closed")
        if self._failure is not None:
            raise SessionError(f"the audio front end failed: {self._failure}") from self._failure

    def _format(self) -> tuple[int, int]:
        with self._changed:
            if not self._sample_rate_hz:
                raise InputError("sample rate and channels are not known before the first push")
            return self._sample_rate_hz, self._channels

    def _check_format(self, samples: FloatArray, sample_rate_hz: int) -> None:
        """The first push fixes the format and sets the chain up; later ones must agree."""
        channels = samples.shape[1]
        if self._sample_rate_hz:
            if (sample_rate_hz, channels) != (self._sample_rate_hz, self._channels):
                raise InputError(
                    f"push: the audio began with {self._sample_rate_hz} Hz, {self._channels} "
                    f"channels, got {sample_rate_hz} Hz, {channels} channels"
                )
            return
        limits = f"{MIN_RATE_HZ} to {MAX_RATE_HZ} Hz"
        if sample_rate_hz % 1 or not MIN_RATE_HZ <= sample_rate_hz <= MAX_RATE_HZ:
            raise InputError(f"sample rate: expected a whole {limits}, got {sample_rate_hz}")
        self._sample_rate_hz, self._channels = int(sample_rate_hz), channels
        # 20 ms: small against a block, large against the cost of one call of the resampler.
        self._pending = np.zeros((self._sample_rate_hz // 50, channels), np.float32)
        self._pcm = _SampleStore(channels)
        self._resampler = soxr.ResampleStream(self._sample_rate_hz, ENCODER_RATE_HZ, 1)
        tempo = FEATURES_PER_S / self.fps
        self._tempo = None if tempo == 1 else TempoChanger(tempo)

    def _make_room(self, seconds: float, block: bool) -> None:
        pushed_s = self._pushed / self._sample_rate_hz
        if self._mode == "whole":
            longest_s, clip_s = self._max_whole_s, pushed_s + seconds
            if clip_s > longest_s:
                raise InputError(f"audio: mode 'whole' takes {longest_s:g} s, got {clip_s:.1f} s")
            return
        limit_s = self._max_backlog_s
        if block:
            if seconds > limit_s / 2:
                raise InputError(f"push: expected a piece ≤ {limit_s / 2:g} s, got {seconds:.1f} s")
            self._changed.wait_for(
                lambda: self._closed or self._failure or self._backlog_s() + seconds <= limit_s
            )
            self._check_open()
        elif self._backlog_s() + seconds > limit_s:
            raise InputError(
                f"push: expected at most {limit_s:g} s ahead of what is consumed, "
                f"got {seconds:.1f} s on top of {self._backlog_s():.1f} s"
            )

    def _backlog_s(self) -> float:
        consumed_frames = min(self._features_frame, self._pcm_frame)
        return self._pushed / self._sample_rate_hz - float(consumed_frames / self.fps)

    def _take_piece(self, piece: FloatArray) -> None:
        self._pcm.append(piece)
        speech = self._resampler.resample_chunk(np.ascontiguousarray(piece[:, 0]))
        speech = speech * np.float32(GAIN)
        self._speech.append(self._tempo.push(speech) if self._tempo else speech)

    def _flush(self, num_speech: int) -> None:
        """Pushes the rest through the chain; the result has exactly `num_speech` samples."""
        if self._fill:
            self._pcm.append(self._pending[: self._fill].copy())
        rest = self._resampler.resample_chunk(self._pending[: self._fill, 0].copy(), last=True)
        rest = rest * np.float32(GAIN)
        if self._tempo:
            self._speech.append(self._tempo.push(rest))
            rest = self._tempo.finish(num_speech - self._speech.stop)
        self._speech.append(rest)
        self._num_speech = num_speech

    def _num_blocks(self) -> int | None:
        if self._num_speech is None:
            return None
        return math.floor(self._pushed * self.fps / (self._sample_rate_hz * BLOCK_FRAMES)) + 1

    def _ready(self, block: int) -> bool:
        _, last = block_feature_range(block)
        available = self._speech.stop if self._mode == "stream" else 0
        return self._num_speech is not None or available >= (last + 1) * SAMPLES_PER_FEATURE

    def _window(self, block: int, first: int, last: int) -> tuple[int, int, torch.Tensor]:
        """The features [start, stop) to encode for a block, and their samples.

        The window ends with the last feature of the block even if more is there, so the result
        does not depend on timing; at the end of the audio it takes in the last partial feature.
        """
        start, stop = max(0, first - self._history_features), last + 1
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


def _as_float(pcm: np.ndarray) -> FloatArray:
    """Checked PCM as float32 [n, channels]."""
    if pcm.dtype not in (np.float32, np.int16) or pcm.ndim not in (1, 2):
        raise InputError(
            "pcm: expected float32 or int16 of shape [n] or [n, channels], "
            f"got {pcm.dtype} of shape {list(pcm.shape)}"
        )
    samples = pcm[:, None] if pcm.ndim == 1 else pcm
    if not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise InputError(
            f"pcm: expected [n, channels] with 1 to {MAX_CHANNELS} channels, got {list(pcm.shape)}"
        )
    if pcm.dtype == np.int16:
        return samples.astype(np.float32) / np.float32(32_768)
    if samples.size and not np.abs(samples).max() <= PEAK_LIMIT:  # also catches NaN
        raise InputError(f"pcm: expected finite samples within ±{PEAK_LIMIT:g}, got others")
    return samples
