"""One session: audio goes in, chunks of video come out, two workers in between.

    push_audio ─► AudioFrontEnd ─► denoise worker ─► latents (1 block) ─► decode worker ─► chunks

Block b+1 denoises while block b decodes. Every queue is bounded, so a slow consumer slows the
workers down and memory stays constant; `close` and `interrupt` work at any moment and from any
thread. The first error of a worker ends its session and reaches the consumer as SessionError.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from liveact import arguments
from liveact.audio.front_end import MAX_RATE_HZ, MIN_RATE_HZ
from liveact.errors import InputError
from liveact.lifetime import OneProcess
from liveact.session import aio
from liveact.session.chunk import Chunk, Interruption
from liveact.session.state import SessionState
from liveact.session.stats import SessionStats
from liveact.session.turn import PromptEdit
from liveact.session.workers import Pipeline, Workers

_log = logging.getLogger("liveact")
_numbers = itertools.count(1)


class Session:
    """Made by `Engine.open_session`; iterate over it for chunks.

    Use it as a context manager, or call `close`; a session that is merely dropped is stopped too,
    without waiting for its workers. One thread may push audio while another iterates.

    Every method raises InputError for arguments of a wrong type or value, SessionError once the
    session failed or was closed, LiveActError in a fork of the process that opened it, where only
    `close` does nothing.

    Attributes:
        fps: video frames per second, exact.
        clock: which video frames each block has.
        name: for messages and the log.
    """

    def __init__(
        self, pipeline: Pipeline, text: torch.Tensor, *, max_backlog_s: float, idles: bool
    ) -> None:
        """text [tokens, text_dim]: the prompt from the first block on."""
        self.fps = pipeline.fps
        self.clock = pipeline.stream.clock
        self._encode_prompt = pipeline.encode_prompt
        self.name = f"session {next(_numbers)}"
        self._process = OneProcess(self.name)
        self._state = SessionState(
            text, pipeline.open_audio, pipeline.fps, max_backlog_s=max_backlog_s, idles=idles
        )
        self._workers = Workers(self._state, pipeline, self.name)
        self._dropped = weakref.finalize(self, self._workers.cancel)
        self._dropped.atexit = False

    def push_audio(
        self,
        pcm: npt.NDArray[np.float32] | npt.NDArray[np.int16],
        sample_rate: int,
        *,
        timeout_s: float | None = 0.0,
    ) -> None:
        """What is said next: float32 (or int16) [n] or [n, channels], any n. Rate and channels may
        change with every utterance.

        timeout_s: how long to wait for space, once `max_backlog_s` of audio wait to be used; None:
        as long as it takes. An interruption meanwhile drops the rest.

        Raises BacklogFull, where nothing is taken (timeout_s 0) or the rest was not; InputError for
        bad samples, or a format other than the utterance began with.
        """
        self._state.push(*self._sound(pcm, sample_rate, timeout_s))

    def end_of_utterance(self) -> int | None:
        """What was said so far is complete. Silence fills its last block, all of it is delivered,
        and the session goes on: what is pushed next is another utterance.

        Returns the number of the utterance; None where nothing was said, and nothing happens.
        """
        self._process.check()
        return self._state.end_utterance()

    def end_of_audio(self) -> None:
        """No more audio: the film is made to the end of its sound, and the iteration ends. A second
        call does nothing.

        Raises InputError when there was too little audio to make anything of.
        """
        self._process.check()
        self._state.end()

    def set_prompt(self, prompt: str, from_block: int = 0, to_block: int | None = None) -> None:
        """Another prompt for blocks from_block..to_block, for good without to_block.

        Blocks that are already being made keep theirs. Later calls win where they overlap.
        """
        self._process.check()
        first = arguments.whole_number("from_block", from_block)
        last = None if to_block is None else arguments.whole_number("to_block", to_block)
        if first < 0 or (last is not None and last < first):
            raise InputError(f"prompt: expected blocks 0 <= first <= last, found {first}, {last}")
        text = arguments.text("prompt", prompt)
        self._state.check_open()
        self._state.edit(PromptEdit(first, last, self._encode_prompt(text)))

    def interrupt(self) -> Interruption:
        """Stops speaking: audio that is not used yet and chunks that are not taken yet are dropped.

        The block being made is finished but not delivered. The session then waits, or idles, until
        new audio comes, whose first sample belongs to the first frame of the next block. The
        picture goes on from where the model is. After `end_of_audio` the iteration ends.

        Returns which utterance was cut off, and how much of it was taken before.
        """
        self._process.check()
        found = self._state.interrupt()
        _log.info("%s interrupted", self.name)
        return found

    @property
    def backlog_s(self) -> float:
        """Seconds of pushed audio that wait to be used."""
        self._process.check()
        return self._state.backlog_s

    @property
    def lag_s(self) -> float:
        """For how many seconds the next chunk has been overdue, for a player that plays what it
        takes without a pause; 0 where it is in time, or where nothing is being made."""
        self._process.check()
        return self._state.lag_s

    def stats(self) -> SessionStats:
        """State, queues, lag and memory at this moment. Any thread, also once it was closed."""
        self._process.check()
        return self._workers.stats

    def close(self) -> None:
        """Ends the session now and frees its memory; whoever waits on it gets SessionError.

        Any thread, any time; returns when both workers have ended.
        """
        self._dropped.detach()
        self._workers.close()

    @property
    def workers(self) -> Workers:
        """What an engine closes together with itself."""
        return self._workers

    def __repr__(self) -> str:
        return self.name

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
        """The next chunk, None after the last; TimeoutError when none came in time.

        timeout_s: seconds, 0 or more; None: for ever.
        """
        self._process.check()
        return self._state.take(arguments.seconds("timeout_s", timeout_s))

    # ------------------------------------------------------------------- for an event loop
    #
    # Each does what its twin without the `a` does, and never holds up the loop.

    async def apush_audio(
        self,
        pcm: npt.NDArray[np.float32] | npt.NDArray[np.int16],
        sample_rate: int,
        *,
        timeout_s: float | None = 0.0,
    ) -> None:
        """`push_audio`. Calls are to be awaited one after the other; a cancelled one has pushed a
        part."""
        await aio.push(self._state, *self._sound(pcm, sample_rate, timeout_s))

    async def aend_of_utterance(self) -> int | None:
        """`end_of_utterance`."""
        return await aio.off_loop(self.end_of_utterance)

    async def aend_of_audio(self) -> None:
        """`end_of_audio`."""
        await aio.off_loop(self.end_of_audio)

    async def aset_prompt(
        self, prompt: str, from_block: int = 0, to_block: int | None = None
    ) -> None:
        """`set_prompt`."""
        await aio.off_loop(self.set_prompt, prompt, from_block, to_block)

    async def ainterrupt(self) -> Interruption:
        """`interrupt`."""
        return await aio.off_loop(self.interrupt)

    async def aclose(self) -> None:
        """`close`; goes on to its end where the caller is cancelled."""
        await asyncio.shield(aio.off_loop(self.close))

    async def anext_chunk(self, timeout_s: float | None = None) -> Chunk | None:
        """`next_chunk`. No chunk is lost where the caller is cancelled."""
        self._process.check()
        return await aio.take(self._state, arguments.seconds("timeout_s", timeout_s))

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self.anext_chunk()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def _sound(
        self, pcm: object, sample_rate: object, timeout_s: object
    ) -> tuple[npt.NDArray[Any], int, float | None]:
        """The arguments of `push_audio`, checked."""
        self._process.check()
        rate_hz = arguments.whole_number("sample rate", sample_rate, MIN_RATE_HZ, MAX_RATE_HZ)
        wait_s = arguments.seconds("timeout_s", timeout_s)
        return arguments.samples("pcm", pcm), rate_hz, wait_s
