"""The two workers of a session, and the state that they share with its caller.

    AudioFrontEnd ─► denoise worker ─► latents (1 block) ─► decode worker ─► chunks

Nothing here refers to the Session, so that one that is dropped without `close` can be noticed, and
its workers stopped.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from liveact.audio.front_end import BLOCK_FRAMES, FIRST_BLOCK_FRAMES, AudioFrontEnd
from liveact.dit.dit import DitStream
from liveact.errors import LiveActError, SessionError
from liveact.session.queue import BoundedQueue, ClosedError
from liveact.session.timeline import Timeline
from liveact.vae.vae import StreamingDecoder, WindowedDecoder

LATENT_QUEUE_BLOCKS = 1  # denoised and not yet being decoded
CHUNK_QUEUE_LENGTH = 16  # decoded and not yet taken: two blocks of 8 latent frames


@dataclass(frozen=True)
class Chunk:
    """The video frames of one latent frame, and the sound that belongs to them."""

    frames: npt.NDArray[np.uint8]  # [n, H, W, 3] RGB; n is 4, in the very first chunk 1
    pcm: npt.NDArray[np.float32]  # [m, channels] at sample_rate_hz, exactly n frames long
    sample_rate_hz: int
    pts: float  # presentation time of the first frame in seconds; frame i plays at pts + i / fps
    block: int
    last_of_block: bool
    # Milliseconds. `decode_ms` is of this chunk. In the last chunk of a block also, of the whole
    # block: `wait_ms` (for audio), `audio_ms` (encoder), `denoise_ms`, `step0_ms`..`step2_ms`,
    # `block_decode_ms`, and `overlap_ms`: how much of the decoding passed while a block denoised.
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Utterance:
    """The audio from the start, or from an interruption, to the next interruption or the end.

    Block b of the session is block b − first_block of `audio`. What follows an interruption begins
    with silence as long as block 0 of `audio`, because only the very first block of a session is
    short; unless it was interrupted before its first block.
    """

    audio: AudioFrontEnd
    first_block: int = 0
    after_interruption: bool = False
    leading_frames: int = 0  # video frames of silence that it begins with
    begun: threading.Event = field(default_factory=threading.Event)  # samples were pushed

    @property
    def unspoken(self) -> bool:
        """An interruption after which nothing was said: its end is no error."""
        return self.after_interruption and not self.begun.is_set()


@dataclass(frozen=True)
class PromptEdit:
    """Blocks first..last (inclusive; None: for good) are made with another prompt."""

    first: int
    last: int | None
    text: torch.Tensor  # [tokens, text_dim]

    def applies_to(self, block: int) -> bool:
        return self.first <= block and (self.last is None or block <= self.last)

    def replaces(self, other: PromptEdit, next_block: int) -> bool:
        """Whether nothing is left of an earlier edit from `next_block` on."""
        if other.last is not None and other.last < next_block:
            return True
        ends_later = self.last is None or (other.last is not None and other.last <= self.last)
        return ends_later and self.first <= max(other.first, next_block)


@dataclass(frozen=True)
class _Turn:
    """What is fixed about a block when the denoise worker takes its number."""

    block: int
    utterance: Utterance
    text: torch.Tensor  # [tokens, text_dim]
    wait_ms: float


@dataclass(frozen=True)
class _Latent:
    block: int
    utterance: Utterance
    value: torch.Tensor  # [16, n, h, w]
    timings: dict[str, float]


class SessionState:
    """What the caller and the workers of a session share. `lock` guards the attributes below it;
    the queues guard themselves."""

    def __init__(self, text: torch.Tensor, audio: AudioFrontEnd) -> None:
        self.latents: BoundedQueue[_Latent] = BoundedQueue(LATENT_QUEUE_BLOCKS)
        self.chunks: BoundedQueue[tuple[Utterance, Chunk]] = BoundedQueue(CHUNK_QUEUE_LENGTH)
        # Re-entrant: a dropped session may be collected, and its workers stopped, anywhere.
        self.lock = threading.RLock()
        self.text = text
        self.edits: list[PromptEdit] = []
        self.utterance = Utterance(audio)
        self.next_block = 0
        self.ended = False
        self.closed = False
        self.error: BaseException | None = None

    def check_open(self) -> None:
        """Raises SessionError once the session failed or was closed."""
        with self.lock:
            if self.error is not None:
                raise SessionError(f"the session failed: {self.error}") from self.error
            if self.closed:
                raise SessionError("the session was closed")

    def was_interrupted(self, utterance: Utterance) -> bool:
        """Whether a session that goes on has left `utterance` behind."""
        with self.lock:
            return not self.closed and self.error is None and utterance is not self.utterance

    def prompt_of(self, block: int) -> torch.Tensor:
        with self.lock:
            texts = [edit.text for edit in self.edits if edit.applies_to(block)]
            return texts[-1] if texts else self.text

    def stop(self) -> None:
        """Wakes whoever waits; nothing more goes in or comes out."""
        with self.lock:
            audio = self.utterance.audio
        audio.close()
        self.latents.close()
        self.chunks.close()


class Workers:
    """Two threads: one denoises block b+1 while the other decodes block b."""

    def __init__(
        self,
        state: SessionState,
        stream: DitStream,
        decoder: StreamingDecoder | WindowedDecoder,
        *,
        fps: Fraction,
        seed: int,
        timeline: Timeline,
        latent_channels: int,
        audio_dim: int,
    ) -> None:
        self._state, self._stream, self._decoder = state, stream, decoder
        self._fps, self._timeline = fps, timeline
        self._latent_channels, self._audio_dim = latent_channels, audio_dim
        self._generator = torch.Generator().manual_seed(seed)
        self._prompt_in_use: torch.Tensor | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"liveact-{name}", daemon=True)
            for name, work in (("denoise", self._denoise_blocks), ("decode", self._decode_blocks))
        ]
        for thread in self._threads:
            thread.start()
        _running.add(self)

    def cancel(self) -> None:
        """Tells both to stop, and does not wait: for when nobody is left to talk to."""
        with self._state.lock:
            self._state.closed = True
        self._stream.cancel()
        self._state.stop()

    def close(self) -> None:
        """Stops both and frees what they held. Any thread, any time, any number of times."""
        self.cancel()
        for thread in self._threads:
            thread.join()
        self._stream.close()
        self._decoder.close()
        self._timeline.close()

    def _run(self, work: Callable[[], None]) -> None:
        state = self._state
        try:
            work()
        except ClosedError:
            pass  # closed by the caller or after the other worker's error
        except BaseException as error:  # whatever it is, the consumer must learn of it
            with state.lock:
                if state.closed and isinstance(error, LiveActError):
                    return  # what a worker runs into when it is closed under its feet
                if state.error is None:
                    state.error = error
            self._stream.cancel()
            state.stop()

    def _denoise_blocks(self) -> None:
        timeline, track = self._timeline, "denoise worker"
        while (turn := self._next_turn()) is not None:
            timings = {"wait_ms": turn.wait_ms}
            with timeline.span("audio", turn.block, track) as span:
                features = self._features(turn)
            timings["audio_ms"] = span.duration_ms
            with timeline.span("denoise", turn.block, track) as span:
                latent = self._denoise(turn, features)
            timings["denoise_ms"] = span.duration_ms
            for step, step_ms in enumerate(self._stream.timings["step_ms"]):
                timings[f"step{step}_ms"] = step_ms
            self._state.latents.put(_Latent(turn.block, turn.utterance, latent, timings))
        self._state.latents.finish()

    def _next_turn(self) -> _Turn | None:
        """Waits for the audio of the next block and takes its number; None when all is said."""
        state = self._state
        wait_ms = 0.0
        while True:
            with state.lock:
                utterance, block = state.utterance, state.next_block
                if state.ended and utterance.unspoken:
                    return None
            local = block - utterance.first_block
            try:
                with self._timeline.span("wait for audio", block, "denoise worker") as span:
                    utterance.audio.wait(local)
                num_blocks = utterance.audio.num_blocks()
            except SessionError:
                with state.lock:
                    if state.was_interrupted(utterance) or (state.ended and utterance.unspoken):
                        continue
                raise
            wait_ms += span.duration_ms
            with state.lock:
                if utterance is not state.utterance:
                    continue
                if local == num_blocks:
                    return None
                state.next_block += 1
                return _Turn(block, utterance, state.prompt_of(block), wait_ms)

    def _features(self, turn: _Turn) -> torch.Tensor:
        """The audio of the block, [rows, layers, hidden]; [rows, audio_dim] of zeros when it was
        interrupted just now: its number is taken, so it is made, but it will not be delivered."""
        try:
            return turn.utterance.audio.block_features(turn.block - turn.utterance.first_block)
        except SessionError:
            if not self._state.was_interrupted(turn.utterance):
                raise
            return torch.zeros(self._stream.audio_rows_of_next_block, self._audio_dim)

    def _denoise(self, turn: _Turn, features: torch.Tensor) -> torch.Tensor:
        stream = self._stream
        if turn.text is not self._prompt_in_use:
            stream.set_prompt(turn.text)
            self._prompt_in_use = turn.text
        shape = (self._latent_channels, stream.frames_of_next_block, *stream.latent_size)
        noise, *renoise = (torch.randn(shape, generator=self._generator) for _ in range(3))
        return stream.denoise(noise, torch.stack(renoise), features)

    def _decode_blocks(self) -> None:
        while True:
            try:
                latent = self._state.latents.get()
            except ClosedError:
                break
            self._decode_block(latent)
        self._state.chunks.finish()

    def _decode_block(self, latent: _Latent) -> None:
        """Decodes one block, chunk by chunk. What was interrupted is decoded too, since the
        decoder's caches go on from there, but not delivered."""
        start = 0 if latent.block == 0 else FIRST_BLOCK_FRAMES + BLOCK_FRAMES * (latent.block - 1)
        end = FIRST_BLOCK_FRAMES + BLOCK_FRAMES * latent.block
        pieces = self._decoder.decode_pictures(latent.value)
        block_decode_ms = overlap_ms = 0.0
        while start < end:
            with self._timeline.span("decode", latent.block, "decode worker") as span:
                frames = next(pieces)
            block_decode_ms += span.duration_ms
            overlap_ms += self._timeline.overlap_ms(span, "denoise")
            timings = {"decode_ms": span.duration_ms}
            stop = start + len(frames)
            if stop == end:
                timings |= latent.timings
                timings |= {"block_decode_ms": block_decode_ms, "overlap_ms": overlap_ms}
            if (pcm := self._pcm(latent, start, stop)) is not None:
                chunk = Chunk(
                    frames=frames,
                    pcm=pcm,
                    sample_rate_hz=latent.utterance.audio.sample_rate_hz,
                    pts=float(start / self._fps),
                    block=latent.block,
                    last_of_block=stop == end,
                    timings=timings,
                )
                self._state.chunks.put((latent.utterance, chunk))
            start = stop

    def _pcm(self, latent: _Latent, start: int, stop: int) -> npt.NDArray[np.float32] | None:
        """The sound of video frames [start, stop) of the session; None once interrupted."""
        before = BLOCK_FRAMES * latent.utterance.first_block
        try:
            return latent.utterance.audio.pcm(start - before, stop - before)
        except SessionError:
            if self._state.was_interrupted(latent.utterance):
                return None
            raise


# A thread that returns from native code into an interpreter that is being torn down ends the
# process with an abort; so whoever still runs at the exit is waited for.
_running: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for workers in list(_running):
        workers.close()
