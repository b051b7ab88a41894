"""One session: audio goes in, chunks of video come out, two workers in between.

    push_audio ─► AudioFrontEnd ─► denoise worker ─► latents (1 block) ─► decode worker ─► chunks

Block b+1 denoises while block b decodes. Every queue is bounded, so a slow consumer slows the
workers down and memory stays constant; `close` and `interrupt` work at any moment and from any
thread. The first error of a worker closes its session and reaches the consumer as SessionError.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from liveact.audio import BLOCK_FRAMES, FIRST_BLOCK_FRAMES, AudioFrontEnd
from liveact.dit import DitStream
from liveact.errors import InputError, LiveActError, SessionError
from liveact.queues import BoundedQueue, ClosedError
from liveact.trace import Timeline
from liveact.vae import StreamingDecoder, WindowedDecoder, to_uint8

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
class _Utterance:
    """The audio from the start, or from an interruption, to the next interruption or the end.

    Block b of the session is block b − first_block of `audio`. After an interruption `audio` begins
    with silence as long as its block 0, because only the very first block of a session is short.
    """

    audio: AudioFrontEnd
    first_block: int
    leading_silence: bool = False
    begun: threading.Event = field(default_factory=threading.Event)  # something was pushed


@dataclass(frozen=True)
class _Latent:
    block: int
    utterance: _Utterance
    value: torch.Tensor  # [16, n, h, w]
    timings: dict[str, float]


@dataclass(frozen=True)
class PromptEdit:
    """Blocks first..last (inclusive; None: for good) are made with another prompt."""

    first: int
    last: int | None
    text: torch.Tensor  # [tokens, text_dim]


class Session:
    """Made by `Engine.open_session`; iterate over it for chunks.

    Use it as a context manager, or call `close`. One thread may push audio while another iterates.
    """

    def __init__(
        self,
        *,
        stream: DitStream,
        decoder: StreamingDecoder | WindowedDecoder,
        text: torch.Tensor,
        encode_prompt: Callable[[str], torch.Tensor],
        open_audio: Callable[[], AudioFrontEnd],
        fps: Fraction,
        seed: int,
        timeline: Timeline,
        latent_channels: int,
        audio_dim: int,
    ) -> None:
        self._stream, self._decoder = stream, decoder
        self._latent_channels, self._audio_dim = latent_channels, audio_dim
        self._text, self._encode_prompt = text, encode_prompt
        self._open_audio = open_audio
        self.fps = fps
        self._generator = torch.Generator().manual_seed(seed)
        self._timeline = timeline
        self._prompt_in_use: torch.Tensor | None = None
        self._lock = threading.Lock()  # guards what follows
        self._edits: list[PromptEdit] = []
        self._utterance = _Utterance(open_audio(), first_block=0)
        self._ended = False
        self._error: BaseException | None = None
        self._closed = False
        self._next_block = 0
        self._latents: BoundedQueue[_Latent] = BoundedQueue(LATENT_QUEUE_BLOCKS)
        self._chunks: BoundedQueue[tuple[_Utterance, Chunk]] = BoundedQueue(CHUNK_QUEUE_LENGTH)
        self._workers = [
            threading.Thread(target=self._run, args=(work,), name=f"liveact-{name}", daemon=True)
            for name, work in (("denoise", self._denoise_blocks), ("decode", self._decode_blocks))
        ]
        for worker in self._workers:
            worker.start()

    # What a caller does.

    def push_audio(
        self, pcm: npt.NDArray[np.float32], sample_rate: int, *, block: bool = False
    ) -> None:
        """Speech as [n] or [n, channels] float32 (or int16), any n, any rate, fixed at the first
        call. With `block` it waits while too much audio is queued, else that raises InputError.
        """
        with self._lock:
            self._check_open()
            utterance = self._utterance
            if utterance.leading_silence and not utterance.begun.is_set():
                channels = 1 if pcm.ndim == 1 else pcm.shape[1]
                silence = round(FIRST_BLOCK_FRAMES * sample_rate / self.fps)
                utterance.audio.push(np.zeros((silence, channels), np.float32), sample_rate)
            utterance.begun.set()
        try:
            utterance.audio.push(pcm, sample_rate, block=block)
        except SessionError:
            with self._lock:
                self._check_open()
                if utterance is self._utterance:
                    raise
            # Interrupted while it waited: the rest of what was being said is dropped.

    def end_of_audio(self) -> None:
        """No more audio: the blocks that it fills are made and the iteration ends.

        Raises InputError when there was too little audio to make anything of.
        """
        with self._lock:
            self._check_open()
            self._ended = True
            utterance = self._utterance
        if utterance.leading_silence and not utterance.begun.is_set():
            utterance.audio.close()  # interrupted, and nothing was said since
        else:
            utterance.audio.end()

    def set_prompt(self, prompt: str, from_block: int = 0, to_block: int | None = None) -> None:
        """Another prompt for blocks from_block..to_block, for good without to_block.

        Blocks that are already being made keep theirs. Later calls win where they overlap.
        """
        if from_block < 0 or (to_block is not None and to_block < from_block):
            raise InputError(
                f"prompt: expected blocks 0 <= first <= last, got {from_block}, {to_block}"
            )
        text = self._encode_prompt(prompt)
        with self._lock:
            self._check_open()
            # What can no longer apply is dropped, so a session of any length holds a few.
            now = self._next_block
            live = [e for e in self._edits if e.last is None or e.last >= now]
            if to_block is None and from_block <= now:
                live = [e for e in live if e.first > now]
            self._edits = [*live, PromptEdit(from_block, to_block, text)]

    def interrupt(self) -> None:
        """Stops speaking: audio that is not used yet and chunks that are not taken yet are dropped.

        The block being made is finished but not delivered; the session then waits for new audio,
        whose first sample belongs to the first frame of the next block. The picture goes on
        from where the model is; `pts` of the next chunk follows the block number. After
        `end_of_audio` the iteration ends.
        """
        with self._lock:
            self._check_open()
            interrupted, block = self._utterance, self._next_block
            later = block > 0
            self._utterance = _Utterance(self._open_audio(), max(block - 1, 0), later)
            if self._ended:
                self._utterance.audio.close()
        interrupted.audio.close()
        self._chunks.clear()

    def close(self) -> None:
        """Ends the session now; whoever waits on it gets SessionError. Any thread, any time."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            audio = self._utterance.audio
        self._stream.cancel()
        audio.close()
        self._latents.close()
        self._chunks.close()
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join()
        self._timeline.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = self.next_chunk()
        if chunk is None:
            raise StopIteration
        return chunk

    def next_chunk(self, timeout_s: float | None = None) -> Chunk | None:
        """The next chunk, None after the last; TimeoutError when none came in time."""
        while True:
            try:
                utterance, chunk = self._chunks.get(timeout_s)
            except ClosedError:
                with self._lock:
                    self._check_open()
                return None
            with self._lock:
                if utterance is self._utterance:
                    return chunk

    # The workers.

    def _check_open(self) -> None:
        if self._error is not None:
            raise SessionError(f"the session failed: {self._error}") from self._error
        if self._closed:
            raise SessionError("the session was closed")

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ClosedError:
            pass  # closed by the caller or after the other worker's error
        except BaseException as error:  # whatever it is, the consumer must learn of it
            with self._lock:
                if self._closed and isinstance(error, LiveActError):
                    return  # what a worker runs into when it is closed under its feet
                if self._error is None:
                    self._error = error
                audio = self._utterance.audio
            self._stream.cancel()
            audio.close()
            self._latents.close()
            self._chunks.close()

    def _denoise_blocks(self) -> None:
        timeline = self._timeline
        while (turn := self._next_turn()) is not None:
            utterance, block = turn
            timings: dict[str, float] = {}
            with timeline.span("audio", block, "denoise worker") as span:
                try:
                    features = utterance.audio.block_features(block - utterance.first_block)
                except SessionError:
                    # Interrupted just now. The block number is taken, so the block is made, of
                    # silence; it will not be delivered.
                    if not self._was_interrupted(utterance):
                        raise
                    features = torch.zeros(self._stream.audio_rows_of_next_block, self._audio_dim)
            timings["audio_ms"] = span.duration_ms
            with timeline.span("denoise", block, "denoise worker") as span:
                latent = self._denoise(block, features)
            timings["denoise_ms"] = span.duration_ms
            for step, step_ms in enumerate(self._stream.timings["step_ms"]):
                timings[f"step{step}_ms"] = step_ms
            self._latents.put(_Latent(block, utterance, latent, timings))
        self._latents.finish()

    def _was_interrupted(self, utterance: _Utterance) -> bool:
        with self._lock:
            return not self._closed and self._error is None and utterance is not self._utterance

    def _next_turn(self) -> tuple[_Utterance, int] | None:
        """Waits for the audio of the next block and takes its number; None when all is said."""
        while True:
            with self._lock:
                utterance, block = self._utterance, self._next_block
            local = block - utterance.first_block
            try:
                with self._timeline.span("wait for audio", block, "denoise worker"):
                    utterance.audio.wait(local)
                if local == utterance.audio.num_blocks():
                    return None
            except SessionError:
                if self._was_interrupted(utterance):
                    continue
                with self._lock:
                    if self._ended and utterance.leading_silence and not utterance.begun.is_set():
                        return None
                raise
            with self._lock:
                if utterance is self._utterance:
                    self._next_block += 1
                    return utterance, block

    def _denoise(self, block: int, features: torch.Tensor) -> torch.Tensor:
        stream = self._stream
        with self._lock:
            text = self._text
            for edit in self._edits:
                if edit.first <= block and (edit.last is None or block <= edit.last):
                    text = edit.text
        if text is not self._prompt_in_use:
            stream.set_prompt(text)
            self._prompt_in_use = text
        shape = (self._latent_channels, stream.frames_of_next_block, *stream.latent_size)
        noise, *renoise = (torch.randn(shape, generator=self._generator) for _ in range(3))
        return stream.denoise(noise, torch.stack(renoise), features)

    def _decode_blocks(self) -> None:
        while True:
            try:
                latent = self._latents.get()
            except ClosedError:
                break
            self._decode_block(latent)
        self._chunks.finish()

    def _decode_block(self, latent: _Latent) -> None:
        """Decodes one block, chunk by chunk. What was interrupted is decoded too, since the
        decoder's caches go on from there, but not delivered."""
        num_frames = latent.value.shape[1]
        start = 0 if latent.block == 0 else FIRST_BLOCK_FRAMES + BLOCK_FRAMES * (latent.block - 1)
        pieces = self._decoder.decode_block(latent.value)
        block_decode_ms = 0.0
        overlap_ms = 0.0
        for i in range(num_frames):
            with self._timeline.span("decode", latent.block, "decode worker") as span:
                frames = to_uint8(next(pieces))
            block_decode_ms += span.duration_ms
            overlap_ms += self._timeline.overlap_ms(span, "denoise")
            timings = {"decode_ms": span.duration_ms}
            last = i == num_frames - 1
            if last:
                timings |= latent.timings
                timings |= {"block_decode_ms": block_decode_ms, "overlap_ms": overlap_ms}
            stop = start + len(frames)
            if (pcm := self._pcm(latent, start, stop)) is not None:
                chunk = Chunk(
                    frames=frames,
                    pcm=pcm,
                    sample_rate_hz=latent.utterance.audio.sample_rate_hz,
                    pts=float(start / self.fps),
                    block=latent.block,
                    last_of_block=last,
                    timings=timings,
                )
                self._chunks.put((latent.utterance, chunk))
            start = stop

    def _pcm(self, latent: _Latent, start: int, stop: int) -> npt.NDArray[np.float32] | None:
        """The sound of video frames [start, stop) of the session; None once interrupted."""
        first_block = latent.utterance.first_block
        before = 0 if first_block == 0 else BLOCK_FRAMES * first_block
        try:
            return latent.utterance.audio.pcm(start - before, stop - before)
        except SessionError:
            if self._was_interrupted(latent.utterance):
                return None
            raise
