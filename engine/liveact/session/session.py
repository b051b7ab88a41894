"""One session: audio goes in, chunks of video come out, two workers in between.

    push_audio ─► AudioFrontEnd ─► denoise worker ─► latents (1 block) ─► decode worker ─► chunks

Block b+1 denoises while block b decodes. Every queue is bounded, so a slow consumer slows the
workers down and memory stays constant; `close` and `interrupt` work at any moment and from any
thread. The first error of a worker ends its session and reaches the consumer as SessionError.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from liveact.audio.front_end import BLOCK_FRAMES, FIRST_BLOCK_FRAMES, AudioFrontEnd
from liveact.dit.dit import DitStream
from liveact.errors import InputError, SessionError
from liveact.session.queue import ClosedError
from liveact.session.timeline import Timeline
from liveact.session.workers import Chunk, PromptEdit, SessionState, Utterance, Workers
from liveact.vae.vae import StreamingDecoder, WindowedDecoder

__all__ = ["Chunk", "Session"]


class Session:
    """Made by `Engine.open_session`; iterate over it for chunks.

    Use it as a context manager, or call `close`; a session that is merely dropped is stopped too,
    without waiting for its workers. One thread may push audio while another iterates.
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
        self.fps = fps
        self._encode_prompt, self._open_audio = encode_prompt, open_audio
        self._state = SessionState(text, open_audio())
        self._workers = Workers(
            self._state,
            stream,
            decoder,
            fps=fps,
            seed=seed,
            timeline=timeline,
            latent_channels=latent_channels,
            audio_dim=audio_dim,
        )
        weakref.finalize(self, self._workers.cancel).atexit = False

    def push_audio(
        self, pcm: npt.NDArray[np.float32], sample_rate: int, *, block: bool = False
    ) -> None:
        """Speech as [n] or [n, channels] float32 (or int16), any n, any rate, fixed at the first
        call and again at the first call after an interruption. With `block` it waits while too
        much audio is queued, else that raises InputError.
        """
        pcm = np.asarray(pcm)
        with self._state.lock:
            self._state.check_open()
            utterance = self._state.utterance
            if self._state.ended:
                raise InputError("push_audio: expected no audio after end_of_audio, got some")
        try:
            if pcm.ndim and len(pcm) and not utterance.begun.is_set():
                self._push_leading_silence(utterance, pcm, sample_rate)
                utterance.begun.set()
            utterance.audio.push(pcm, sample_rate, block=block)
        except SessionError:
            # Interrupted while it waited: the rest of what was being said is dropped.
            self._raise_unless_interrupted(utterance)

    def end_of_audio(self) -> None:
        """No more audio: the blocks that it fills are made and the iteration ends. A second call
        does nothing.

        Raises InputError when there was too little audio to make anything of.
        """
        state = self._state
        with state.lock:
            state.check_open()
            if state.ended:
                return
            utterance = state.utterance
        try:
            self._push_trailing_silence(utterance)
            with state.lock:
                state.check_open()
                state.ended = True
                utterance = state.utterance
            if utterance.unspoken:
                utterance.audio.close()
            else:
                utterance.audio.end()
        except SessionError:
            self._raise_unless_interrupted(utterance)

    def set_prompt(self, prompt: str, from_block: int = 0, to_block: int | None = None) -> None:
        """Another prompt for blocks from_block..to_block, for good without to_block.

        Blocks that are already being made keep theirs. Later calls win where they overlap.
        """
        if from_block < 0 or (to_block is not None and to_block < from_block):
            raise InputError(
                f"prompt: expected blocks 0 <= first <= last, got {from_block}, {to_block}"
            )
        edit = PromptEdit(from_block, to_block, self._encode_prompt(prompt))
        state = self._state
        with state.lock:
            state.check_open()
            # What can no longer apply is dropped, so a session of any length holds a few.
            kept = [e for e in state.edits if not edit.replaces(e, state.next_block)]
            state.edits = [*kept, edit]

    def interrupt(self) -> None:
        """Stops speaking: audio that is not used yet and chunks that are not taken yet are dropped.

        The block being made is finished but not delivered; the session then waits for new audio,
        whose first sample belongs to the first frame of the next block. The picture goes on
        from where the model is; `pts` of the next chunk follows the block number. After
        `end_of_audio` the iteration ends.
        """
        state = self._state
        with state.lock:
            state.check_open()
            interrupted, block = state.utterance, state.next_block
            state.utterance = Utterance(
                self._open_audio(),
                first_block=max(block - 1, 0),
                after_interruption=True,
                leading_frames=FIRST_BLOCK_FRAMES if block else 0,
            )
            if state.ended:
                state.utterance.audio.close()
        interrupted.audio.close()
        state.chunks.clear()

    def close(self) -> None:
        """Ends the session now and frees its memory; whoever waits on it gets SessionError.

        Any thread, any time; returns when both workers have ended.
        """
        self._workers.close()

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
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            try:
                utterance, chunk = self._state.chunks.get(left_s)
            except ClosedError:
                self._state.check_open()
                return None
            with self._state.lock:
                if utterance is self._state.utterance:
                    return chunk

    def _push_leading_silence(
        self, utterance: Utterance, pcm: npt.NDArray[np.float32], sample_rate: int
    ) -> None:
        if utterance.leading_frames:
            utterance.audio.push(pcm[:0], sample_rate)  # refuses a format that cannot be
            silence = round(utterance.leading_frames * sample_rate / self.fps)
            utterance.audio.push(np.zeros((silence, *pcm.shape[1:]), np.float32), sample_rate)

    def _push_trailing_silence(self, utterance: Utterance) -> None:
        """Fills the silence at the beginning up to a whole block, so that what is said between
        makes ⌊seconds·fps/32⌋ + 1 blocks as at the start of a session, and at least one."""
        if utterance.leading_frames and not utterance.unspoken:
            rate_hz, channels = utterance.audio.sample_rate_hz, utterance.audio.channels
            leading = round(utterance.leading_frames * rate_hz / self.fps)
            missing = math.ceil(BLOCK_FRAMES * rate_hz / self.fps) - leading
            utterance.audio.push(np.zeros((missing, channels), np.float32), rate_hz)

    def _raise_unless_interrupted(self, utterance: Utterance) -> None:
        """In the handler of a SessionError: one that an interruption explains is none."""
        self._state.check_open()
        if not self._state.was_interrupted(utterance):
            raise
