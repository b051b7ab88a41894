"""The two workers of a session.

    AudioFrontEnd ─► denoise worker ─► latents (1 block) ─► decode worker ─► chunks

Nothing here refers to the Session, so that one that is dropped without `close` can be noticed, and
its workers stopped.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import math
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from liveact.audio.chain import SoundFormat
from liveact.audio.front_end import AudioFrontEnd
from liveact.dit.dit import DitStream
from liveact.errors import SessionError
from liveact.files import one_line
from liveact.finite import NOT_FINITE, all_finite
from liveact.lifetime import OneProcess
from liveact.session.chunk import BlockTimings, Chunk, ChunkTimings
from liveact.session.queue import ClosedError
from liveact.session.state import SessionState
from liveact.session.stats import SessionStats
from liveact.session.timeline import Timeline
from liveact.session.turn import Latent, Turn
from liveact.vae.vae import VaeStream

_log = logging.getLogger("liveact")
# glibc keeps what the threads of a session freed in arenas, up to eight a core, and the threads of
# the next one begin others: 25 MB in a hundred sessions. None: another allocator.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


@dataclass(frozen=True)
class Pipeline:
    """What a session runs on; made by `Engine.open_session`.

    Attributes:
        stream: the DiT's.
        decoder: the VAE's.
        open_audio: makes a front end, for each utterance.
        output: what the sound of the chunks is.
        silence: the features of a number of silent video frames, [rows, layers, hidden].
        encode_prompt: text → [tokens, text_dim].
        fps: video frames per second.
        noise: what the noise of every block is drawn from.
        timeline: where the times of every stage go.
    """

    stream: DitStream
    decoder: VaeStream
    open_audio: Callable[[], AudioFrontEnd]
    output: SoundFormat
    silence: Callable[[int], torch.Tensor]
    encode_prompt: Callable[[str], torch.Tensor]
    fps: Fraction
    noise: torch.Generator
    timeline: Timeline

    @property
    def device_bytes(self) -> int:
        """Of its streams."""
        return self.stream.device_bytes + self.decoder.size_bytes

    def close(self) -> None:
        """Frees the memory, and gives it back to the system."""
        self.stream.close()
        self.decoder.close()
        if _malloc_trim is not None:
            _malloc_trim(0)


class Workers:
    """Two threads: one denoises block b+1 while the other decodes block b."""

    def __init__(self, state: SessionState, pipeline: Pipeline, name: str) -> None:
        """name: of the session, for the log."""
        self._state, self._pipeline, self._name = state, pipeline, name
        self._process = OneProcess(name)
        self._closed = threading.Lock()  # held for ever once it was closed
        self._ending = threading.Lock()
        self._running = 2
        self._prompt_in_use: torch.Tensor | None = None
        self._idle_frames = 0  # so far: sound of them in all is exact
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"liveact-{name}", daemon=True)
            for name, work in (("denoise", self._denoise_blocks), ("decode", self._decode_blocks))
        ]
        for thread in self._threads:
            thread.start()
        _running.add(self)

    def cancel(self) -> None:
        """Tells both to stop, and does not wait: for when nobody is left to talk to."""
        if not self._process.is_here():
            return
        self._state.close()
        self._pipeline.stream.cancel()

    def close(self) -> None:
        """Stops both, and what they held is freed. Any thread, any time, any number of times; in a
        fork of the process, which has neither, it does nothing."""
        if not self._process.is_here():
            return
        self.cancel()
        for thread in self._threads:
            thread.join()
        self._pipeline.timeline.close()
        if self._closed.acquire(blocking=False):
            _log.info("%s closed", self._name)

    @property
    def is_closed(self) -> bool:
        """Whether `close` has ended."""
        return self._closed.locked()

    @property
    def stats(self) -> SessionStats:
        """Of the session, now."""
        device_bytes = self._pipeline.device_bytes
        return self._state.stats(self._name, device_bytes)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ClosedError:
            pass  # closed by the caller or after the other worker's error
        except BaseException as error:  # whatever it is, the consumer must learn of it
            _let_go(error)
            if self._state.fail(error):
                _log.error("%s failed: %s", self._name, one_line(error))
                self._pipeline.stream.cancel()
        finally:
            with self._ending:
                self._running -= 1
                if not self._running:  # nobody uses them any more, whatever becomes of the session
                    self._pipeline.close()

    def _denoise_blocks(self) -> None:
        timeline, track = self._pipeline.timeline, "denoise worker"
        while True:
            with timeline.span("wait for audio", self._state.next_block, track) as span:
                turn = self._state.next_turn()
            if turn is None:
                break
            wait_ms = span.duration_ms
            with timeline.span("audio", turn.block, track) as span:
                features = self._features(turn)
            audio_ms = span.duration_ms
            with timeline.span("denoise", turn.block, track) as span:
                latent = self._denoise(turn, features)
            timings = BlockTimings(
                wait_ms=wait_ms,
                audio_ms=audio_ms,
                denoise_ms=span.duration_ms,
                step_ms=tuple(self._pipeline.stream.timings["step_ms"]),
            )
            self._state.latents.put(Latent(turn, latent, timings))
        self._state.latents.finish()

    def _features(self, turn: Turn) -> torch.Tensor:
        """The audio of the block, [rows, layers, hidden]; [rows, audio_dim] of zeros when it was
        interrupted just now: its number is taken, so it is made, but it will not be delivered."""
        if turn.idle:
            return self._pipeline.silence(self._pipeline.stream.audio_rows_of_next_block)
        try:
            features = turn.utterance.features(turn.block).cpu()  # where the runtime takes them
            if not all_finite(features):
                raise SessionError(
                    f"block {turn.block}: expected finite audio features, found {NOT_FINITE}"
                )
            return features
        except SessionError:
            if not self._state.was_interrupted(turn):
                raise
            return torch.zeros(self._pipeline.stream.audio_shape)
        finally:
            self._state.features_taken()

    def _denoise(self, turn: Turn, features: torch.Tensor) -> torch.Tensor:
        stream = self._pipeline.stream
        if turn.text is not self._prompt_in_use:
            stream.set_prompt(turn.text)
            self._prompt_in_use = turn.text
        return stream.denoise(*stream.draw_noise(self._pipeline.noise), features)

    def _decode_blocks(self) -> None:
        while True:
            try:
                latent = self._state.latents.get()
            except ClosedError:
                break
            self._decode_block(latent)
        self._state.finish()

    def _decode_block(self, latent: Latent) -> None:
        """Decodes one block, chunk by chunk. What was interrupted is decoded too, since the
        decoder's caches go on from there, but not delivered."""
        timeline, turn = self._pipeline.timeline, latent.turn
        frames_of_block = self._pipeline.stream.clock.video_frames(turn.block)
        start, end = frames_of_block.start, self._state.end_of_film(turn, frames_of_block.stop)
        pieces = self._pipeline.decoder.decode(latent.value)
        block_decode_ms = overlap_ms = 0.0
        first_picture_s = math.nan
        while start < end:
            with timeline.span("decode", turn.block, "decode worker") as span:
                frames = self._next_piece(pieces, turn.block)[: end - start]
            if start == frames_of_block.start:
                first_picture_s = time.monotonic() - turn.begun_s
            block_decode_ms += span.duration_ms
            overlap_ms += timeline.overlap_ms(span, "denoise")
            timings = ChunkTimings(span.duration_ms)
            stop = start + len(frames)
            if stop == end:
                whole = replace(latent.timings, decode_ms=block_decode_ms, overlap_ms=overlap_ms)
                timings = timings._replace(block=whole)
            if (chunk := self._chunk(turn, frames, start, stop == end, timings)) is not None:
                self._state.deliver(turn, chunk)
            start = stop
        self._state.decoded(turn, first_picture_s)

    @staticmethod
    def _next_piece(pieces: Iterator[npt.NDArray[np.uint8]], block: int) -> npt.NDArray[np.uint8]:
        try:
            return next(pieces)
        except SessionError as error:  # not finite
            raise SessionError(f"block {block}: {error}") from error

    def _chunk(
        self,
        turn: Turn,
        frames: npt.NDArray[np.uint8],
        start: int,
        last_of_block: bool,
        timings: ChunkTimings,
    ) -> Chunk | None:
        """The frames from `start` of the session on, with their sound; None once interrupted."""
        utterance, stop = turn.utterance, start + len(frames)
        end = None if turn.idle else utterance.end_frame
        try:
            pcm = self._silent(len(frames)) if turn.idle else utterance.pcm(start, stop)
        except SessionError:
            if self._state.was_interrupted(turn):
                return None
            raise
        return Chunk(
            frames=frames,
            pcm=pcm,
            sample_rate_hz=self._pipeline.output.sample_rate_hz,
            pts=0.0,  # known when it is taken
            block=turn.block,
            last_of_block=last_of_block,
            utterance=utterance.number,
            speech=not turn.idle and (end is None or start < end),
            last_of_utterance=end is not None and start < end <= stop,
            timings=timings,
        )

    def _silent(self, num_frames: int) -> npt.NDArray[np.float32]:
        output = self._pipeline.output
        start, stop = self._idle_frames, self._idle_frames + num_frames
        self._idle_frames = stop
        samples = [round(f * output.sample_rate_hz / self._pipeline.fps) for f in (start, stop)]
        return np.zeros((samples[1] - samples[0], output.channels), np.float32)


def _let_go(error: BaseException) -> None:
    """Keeps the lines of the traceback for whoever reads it, but not what their variables held: the
    worker itself, and so the memory of a session that nobody uses any more."""
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next  # without the frame that still runs
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


# A thread that returns from native code into an interpreter that is being torn down ends the
# process with an abort; so whoever still runs at the exit is waited for.
_running: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for workers in list(_running):
        workers.close()
