"""What the caller and the workers of a session share, and every way in which it changes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from liveact.audio.front_end import AudioFrontEnd
from liveact.audio.samples import as_float
from liveact.blocks import FEATURE_REACH, BlockClock
from liveact.errors import BacklogFull, InputError, LiveActError, SessionError
from liveact.session.chunk import Chunk, Interruption
from liveact.session.playback import PlaybackClock
from liveact.session.queue import BoundedQueue, ClosedError
from liveact.session.stats import SessionStats, State
from liveact.session.turn import Latent, PromptEdit, Turn
from liveact.session.utterance import Utterance

LATENT_QUEUE_BLOCKS = 1  # denoised and not yet being decoded
CHUNK_QUEUE_LENGTH = 16  # decoded and not yet taken: two blocks of 8 latent frames


def least_backlog_s(clock: BlockClock, fps: Fraction) -> float:
    """Audio that a block may have to wait for: its frames, the two that it looks ahead, and 0.2 s
    of delay before the encoder."""
    return float((clock.block_video_frames + FEATURE_REACH) / fps) + 0.2


class SessionState:
    """Transitions are methods; nobody else takes the lock. The queues have locks of their own.

    Attributes:
        latents: from the denoise worker to the decode worker.
        chunks: from the decode worker to the caller, each with its turn.
        utterances: what is being said, then what is said after it; the last one takes audio.
        next_block: the block whose number is taken next.
        edits: of the prompt, later ones winning.
    """

    def __init__(
        self,
        text: torch.Tensor,
        open_audio: Callable[[], AudioFrontEnd],
        fps: Fraction,
        *,
        max_backlog_s: float,
        idles: bool,
    ) -> None:
        self.latents: BoundedQueue[Latent] = BoundedQueue(LATENT_QUEUE_BLOCKS)
        self.chunks: BoundedQueue[tuple[Turn, Chunk]] = BoundedQueue(CHUNK_QUEUE_LENGTH)
        # Re-entrant: a dropped session may be collected, and its workers stopped, anywhere.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._listeners: list[Callable[[], None]] = []
        self._text = text
        self._open_audio = open_audio
        self._max_backlog_s = max_backlog_s
        self._idles = idles
        self._playback = PlaybackClock(fps)
        self._fps = fps
        self.edits: list[PromptEdit] = []
        self.utterances: deque[Utterance] = deque([Utterance(0, open_audio())])
        self.next_block = 0
        self._in_flight: list[Turn] = []  # taken and not decoded to their end
        self._delivered = (0, 0)  # utterance of the last speaking chunk taken, its frames so far
        self._delivered_all = False  # that chunk was its last
        self._epoch = 0
        self._spoken_from = 0  # block in which the last utterance that was delivered begins
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._opened_s = time.monotonic()
        self._last_taken: Chunk | None = None  # without what an interruption came after

    # ------------------------------------------------------------------------- the caller's side

    @property
    def utterance(self) -> Utterance:
        """The one that takes audio."""
        with self._lock:
            return self.utterances[-1]

    def check_open(self) -> None:
        """Raises SessionError once the session failed or was closed."""
        with self._lock:
            if self._error is not None:
                raise SessionError(f"the session failed: {self._error}") from self._error
            if self._closed:
                raise SessionError("the session was closed")

    @property
    def epoch(self) -> int:
        """Interruptions so far."""
        with self._lock:
            return self._epoch

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """`listener` is called whenever something changes; under the lock, so it must not wait."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)

    def push(
        self,
        pcm: npt.NDArray[np.float32],
        sample_rate_hz: int,
        timeout_s: float | None,
        epoch: int | None = None,
    ) -> None:
        """Gives audio to the last utterance, in pieces where it has to wait for space.

        After an interruption the rest of what was being pushed is dropped, and all of it where
        there were more than `epoch` of them. Raises InputError,
        BacklogFull, SessionError.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._check_speaking()
            if epoch not in (None, self._epoch):
                return
            epoch = self._epoch
            utterance = self.utterances[-1]
            pcm = as_float(pcm)
            utterance.audio.push(pcm[:0], sample_rate_hz)  # refuses a format that cannot be
            if not len(pcm):
                return
            if timeout_s == 0 and self._space_s() * sample_rate_hz < len(pcm):
                raise self._full(len(pcm) / sample_rate_hz)
            self._begin(utterance, pcm, sample_rate_hz)
            while len(pcm):
                count = int(min(len(pcm), self._space_s() * sample_rate_hz))
                if count:
                    utterance.audio.push(pcm[:count], sample_rate_hz)
                    pcm = pcm[count:]
                    self._wake()
                    continue
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise self._full(len(pcm) / sample_rate_hz)
                self._changed.wait(left_s)
                self.check_open()
                if self._epoch != epoch:
                    return

    def end_utterance(self) -> int | None:
        """What was said so far is complete, and another utterance may begin; its number, None where
        nothing was said. Raises InputError after the end of the audio."""
        with self._lock:
            self._check_speaking()
            utterance = self.utterances[-1]
            if not utterance.begun:
                return None
            utterance.audio.end(silence=True)
            self.utterances.append(Utterance(utterance.number + 1, self._open_audio()))
            self._wake()
            return utterance.number

    def end(self) -> None:
        """No more audio comes. Raises InputError where there was none at all, or too little."""
        with self._lock:
            self.check_open()
            if self._ended:
                return
            self._ended = True
            utterance = self.utterances[-1]
            nothing_ever = not (utterance.number or self.next_block or self._epoch)
            try:
                if utterance.begun or nothing_ever:
                    utterance.audio.end()
            finally:
                self._wake()

    def edit(self, edit: PromptEdit) -> None:
        """Adds an edit; those that can no longer apply go, so there are never more than a few."""
        with self._lock:
            self.check_open()
            kept = [e for e in self.edits if not edit.replaces(e, self.next_block)]
            self.edits = [*kept, edit]

    def interrupt(self) -> Interruption:
        """Leaves all utterances behind: their audio goes, and what of them was not taken yet."""
        with self._lock:
            self.check_open()
            left = list(self.utterances)
            result = self._interruption()
            number = left[-1].number + left[-1].begun
            self.utterances = deque([Utterance(number, self._open_audio())])
            self._delivered, self._delivered_all = (number, 0), False
            self._last_taken = None
            self._epoch += 1
            self._wake()
        for utterance in left:
            utterance.audio.close()
        self.chunks.clear()
        return result

    def take(self, timeout_s: float | None, asked_s: float | None = None) -> Chunk | None:
        """The next chunk that still counts, None after the last; TimeoutError when none came.

        asked_s: since when it is waited for, of time.monotonic; None: since now.
        """
        now_s = time.monotonic()
        asked_s = now_s if asked_s is None else asked_s
        deadline_s = None if timeout_s is None else now_s + timeout_s
        while True:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            try:
                turn, chunk = self.chunks.get(left_s)
            except ClosedError:
                self.check_open()
                return None
            with self._lock:
                if self._stale(turn, chunk.speech):
                    continue
                chunk = replace(chunk, pts=self._playback.pts)
                self._playback.take(len(chunk.frames), asked_s, self._follows_on(chunk))
                self._last_taken = chunk
                self._note_delivered(chunk)
                self._wake()
                return chunk

    @property
    def backlog_s(self) -> float:
        """Seconds of audio that wait to be used."""
        with self._lock:
            return sum(utterance.audio.backlog_s for utterance in self.utterances)

    @property
    def lag_s(self) -> float:
        """See `Session.lag_s`."""
        with self._lock:
            due = [t for t in self._in_flight if not self._stale(t, not t.idle)]
            if not due or self._waiting_frames():
                return 0.0
            return self._playback.late_s(due[0].begun_s)

    def stats(self, name: str, device_bytes: int) -> SessionStats:
        """Of the session, now. `name` and `device_bytes` of it are known elsewhere."""
        with self._lock:
            return SessionStats(
                name=name,
                state=self._named(),
                utterance=self.utterances[-1].number,
                blocks=self.next_block,
                frames=self._playback.taken_frames,
                latents_waiting=len(self.latents),
                chunks_waiting=len(self.chunks),
                backlog_s=self.backlog_s,
                lag_s=self.lag_s,
                underruns=self._playback.underruns,
                stalled_s=self._playback.stalled_s,
                interruptions=self._epoch,
                age_s=time.monotonic() - self._opened_s,
                device_bytes=device_bytes,
            )

    # ----------------------------------------------------------------------- the workers' side

    def next_turn(self) -> Turn | None:
        """Waits for what the next block is made of and takes its number; None when all is said."""
        with self._lock:
            while True:
                if self._closed or self._error is not None:
                    raise ClosedError
                utterance = self.utterances[0]
                if utterance.is_over(self.next_block):
                    if len(self.utterances) == 1:
                        return None
                    self.utterances.popleft()
                    continue
                if utterance.is_ready(self.next_block):
                    utterance.place(self.next_block)
                    return self._turn(utterance, idle=False)
                if not utterance.begun and self._ended:
                    utterance.audio.num_blocks()  # raises where there was no audio at all
                    return None
                deadline_s = self._idle_deadline_s(utterance)
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return self._turn(utterance, idle=True)
                self._changed.wait(left_s)

    def features_taken(self) -> None:
        """The audio of a block was used: there is space for more."""
        with self._lock:
            self._wake()

    def deliver(self, turn: Turn, chunk: Chunk) -> None:
        """Hands a chunk over, unless it does not count any more; waits where the queue is full."""
        with self._lock:
            if self._stale(turn, chunk.speech):
                return
            if chunk.speech:
                self._spoken_from = turn.utterance.begins_in
        self.chunks.put((turn, chunk))
        with self._lock:
            self._wake()

    def decoded(self, turn: Turn, seconds: float) -> None:
        """A block is decoded to its end; `seconds` from its start to its first picture."""
        with self._lock:
            self._in_flight.remove(turn)
            self._playback.note_block(seconds)
            self._wake()

    def finish(self) -> None:
        """Every block is decoded."""
        self.chunks.finish()
        with self._lock:
            self._wake()

    def was_interrupted(self, turn: Turn) -> bool:
        """Whether a session that goes on has left the utterance of `turn` behind."""
        with self._lock:
            return not self._closed and self._error is None and turn.epoch != self._epoch

    def end_of_film(self, turn: Turn, end_frame: int) -> int:
        """`end_frame` of a block, or the frame after the last one where the film ends in it: with
        the sound of its last utterance."""
        with self._lock:
            last = turn.utterance
            if turn.idle or not self._ended or last is not self.utterances[-1]:
                return end_frame
            return min(end_frame, last.end_frame or end_frame)

    def fail(self, error: BaseException) -> bool:
        """A worker ends with `error`: the first one is what the caller gets. False for what a
        worker runs into when the session is closed, or the other one fails, under its feet."""
        with self._lock:
            if isinstance(error, LiveActError) and (self._closed or self._error is not None):
                return False
            if self._error is None:
                self._error = error
        self._stop()
        return True

    def close(self) -> None:
        """Wakes whoever waits; nothing more goes in or comes out."""
        with self._lock:
            self._closed = True
        self._stop()

    # ------------------------------------------------------------------------------------ inside

    def _wake(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def _stop(self) -> None:
        self.latents.close()
        self.chunks.close()
        with self._lock:
            utterances = list(self.utterances)
            self._wake()
        for utterance in utterances:
            utterance.audio.close()

    def _check_speaking(self) -> None:
        self.check_open()
        if self._ended:
            raise InputError("push_audio: expected no audio after end_of_audio, found some")

    def _space_s(self) -> float:
        return max(0.0, self._max_backlog_s - self.backlog_s)

    def _full(self, seconds: float) -> BacklogFull:
        return BacklogFull(
            f"push_audio: expected at most {self._max_backlog_s:g} s ahead of what is used, "
            f"found {seconds:.1f} s on top of {self.backlog_s:.1f} s"
        )

    def _begin(
        self, utterance: Utterance, pcm: npt.NDArray[np.float32], sample_rate_hz: int
    ) -> None:
        if utterance.begun:
            return
        if self.next_block or len(self.utterances) > 1:
            utterance.leading_frames = utterance.audio.clock.first_video_frames
        utterance.push_leading_silence(pcm, sample_rate_hz)
        utterance.begun = True

    def _interruption(self) -> Interruption:
        number, frames = self._delivered
        if self._delivered_all:
            number, frames = number + 1, 0
        return Interruption(number, float(frames / self._fps))

    def _note_delivered(self, chunk: Chunk) -> None:
        if chunk.speech:
            frames = self._delivered[1] if self._delivered[0] == chunk.utterance else 0
            self._delivered = (chunk.utterance, frames + len(chunk.frames))
            self._delivered_all = chunk.last_of_utterance

    def _stale(self, turn: Turn, speech: bool) -> bool:
        # Idling is there to be looked at until speech is, and not a moment longer.
        return turn.epoch != self._epoch or (not speech and turn.block < self._spoken_from)

    def _idle_deadline_s(self, utterance: Utterance) -> float | None:
        """When to idle for a block, of time.monotonic; None: not as things are."""
        if not self._idles:
            return None
        if self.next_block == 0:
            return None if utterance.begun else 0.0  # the first picture at once
        # Speech that comes at the pace of a microphone is not there before the block is made.
        if utterance.begun and utterance.missing_s(self.next_block) <= self._playback.block_s:
            return None
        waiting = self._waiting_frames()
        clock = self.utterances[-1].audio.clock
        made = [turn.block for turn in self._in_flight if not self._stale(turn, not turn.idle)]
        waiting += sum(len(clock.video_frames(block)) for block in made)
        return self._playback.idle_deadline_s(waiting)

    def _waiting_frames(self) -> int:
        """In chunks that still count and were not taken yet."""
        return self.chunks.sum(
            lambda item: 0 if self._stale(item[0], item[1].speech) else len(item[1].frames)
        )

    def _follows_on(self, chunk: Chunk) -> bool:
        """Whether a player that took the chunk before is still at it."""
        last = self._last_taken
        if last is None or self._idles:
            return last is not None
        return last.utterance == chunk.utterance and not last.last_of_utterance

    def _named(self) -> State:
        if self._error is not None:
            return "failed"
        if self._closed:
            return "closed"
        if self.chunks.is_drained:
            return "ended"
        speaks = any(utterance.begun for utterance in self.utterances) or any(
            not turn.idle and turn.epoch == self._epoch for turn in self._in_flight
        )
        if speaks or self.chunks.sum(lambda item: item[1].speech):
            return "speaking"
        return "idling" if self._idles else "waiting"

    def _turn(self, utterance: Utterance, idle: bool) -> Turn:
        block = self.next_block
        self.next_block += 1
        texts = [edit.text for edit in self.edits if edit.applies_to(block)]
        text = texts[-1] if texts else self._text
        turn = Turn(block, utterance, idle, text, self._epoch, time.monotonic())
        self._in_flight.append(turn)
        return turn
