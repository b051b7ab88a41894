"""One session: audio goes in, chunks of video come out, two workers in between.

    push_audio ─► AudioFrontEnd ─► denoise worker ─► latents (1 block) ─► decode worker ─► chunks

Block b+1 denoises while block b decodes. Every queue is bounded, so a slow consumer slows the
workers down and memory stays constant; `close` and `interrupt` work at any moment and from any
thread. The first error of a worker ends its session and reaches the consumer as SessionError.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from liveact.errors import InputError, SessionError
from liveact.session.chunk import Chunk
from liveact.session.queue import ClosedError
from liveact.session.state import PromptEdit, SessionState
from liveact.session.utterance import Utterance
from liveact.session.workers import Pipeline, Workers


class Session:
    """Made by `Engine.open_session`; iterate over it for chunks.

    Use it as a context manager, or call `close`; a session that is merely dropped is stopped too,
    without waiting for its workers. One thread may push audio while another iterates.
    """

    def __init__(self, pipeline: Pipeline, text: torch.Tensor) -> None:
        """text [tokens, text_dim]: the prompt from the first block on."""
        self.fps = pipeline.fps
        self.clock = pipeline.stream.clock
        self._encode_prompt = pipeline.encode_prompt
        self._state = SessionState(text, pipeline.open_audio)
        self._workers = Workers(self._state, pipeline)
        weakref.finalize(self, self._workers.cancel).atexit = False

    def push_audio(
        self, pcm: npt.NDArray[np.float32], sample_rate: int, *, block: bool = False
    ) -> None:
        """Speech as [n] or [n, channels] float32 (or int16), any n, any rate, fixed at the first
        call and again at the first call after an interruption. With `block` it waits while too
        much audio is queued, else that raises InputError.
        """
        utterance = self._state.speaking()
        try:
            utterance.push(np.asarray(pcm), sample_rate, block=block)
        except SessionError:
            # Interrupted while it waited: the rest of what was being said is dropped.
            self._raise_unless_interrupted(utterance)

    def end_of_audio(self) -> None:
        """No more audio: the blocks that it fills are made and the iteration ends. A second call
        does nothing.

        Raises InputError when there was too little audio to make anything of.
        """
        utterance = self._state.to_end()
        if utterance is None:
            return
        try:
            utterance.push_trailing_silence()
            utterance = self._state.end()
            utterance.end()
        except SessionError:
            self._raise_unless_interrupted(utterance)

    def set_prompt(self, prompt: str, from_block: int = 0, to_block: int | None = None) -> None:
        """Another prompt for blocks from_block..to_block, for good without to_block.

        Blocks that are already being made keep theirs. Later calls win where they overlap.
        """
        if from_block < 0 or (to_block is not None and to_block < from_block):
            raise InputError(
                f"prompt: expected blocks 0 <= first <= last, found {from_block}, {to_block}"
            )
        self._state.edit(PromptEdit(from_block, to_block, self._encode_prompt(prompt)))

    def interrupt(self) -> None:
        """Stops speaking: audio that is not used yet and chunks that are not taken yet are dropped.

        The block being made is finished but not delivered; the session then waits for new audio,
        whose first sample belongs to the first frame of the next block. The picture goes on
        from where the model is; `pts` of the next chunk follows the block number. After
        `end_of_audio` the iteration ends.
        """
        self._state.interrupt()

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
            if self._state.is_current(utterance):
                return chunk

    def _raise_unless_interrupted(self, utterance: Utterance) -> None:
        """In the handler of a SessionError: one that an interruption explains is none."""
        self._state.check_open()
        if not self._state.was_interrupted(utterance):
            raise
