"""What the caller and the workers of a session share, and every way in which it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from liveact.audio.front_end import AudioFrontEnd
from liveact.errors import InputError, LiveActError, SessionError
from liveact.session.chunk import Chunk
from liveact.session.queue import BoundedQueue
from liveact.session.utterance import Utterance

LATENT_QUEUE_BLOCKS = 1  # denoised and not yet being decoded
CHUNK_QUEUE_LENGTH = 16  # decoded and not yet taken: two blocks of 8 latent frames


@dataclass(frozen=True)
class PromptEdit:
    """Another prompt for some blocks.

    Attributes:
        first: the first block that is made with it.
        last: the last one; None: for good.
        text: [tokens, text_dim].
    """

    first: int
    last: int | None
    text: torch.Tensor

    def applies_to(self, block: int) -> bool:
        """Whether a block is made with it, unless a later edit says otherwise."""
        return self.first <= block and (self.last is None or block <= self.last)

    def replaces(self, other: PromptEdit, next_block: int) -> bool:
        """Whether nothing is left of an earlier edit from `next_block` on."""
        if other.last is not None and other.last < next_block:
            return True
        ends_later = self.last is None or (other.last is not None and other.last <= self.last)
        return ends_later and self.first <= max(other.first, next_block)


@dataclass(frozen=True)
class Turn:
    """What is fixed about a block when the denoise worker takes its number.

    Attributes:
        block: its number.
        utterance: what is said in it.
        text: the prompt, [tokens, text_dim].
    """

    block: int
    utterance: Utterance
    text: torch.Tensor


@dataclass(frozen=True)
class Latent:
    """A denoised block on its way to the decode worker.

    Attributes:
        block: its number.
        utterance: what is said in it.
        value: [16, n, h, w].
        timings: milliseconds, see `Chunk`.
    """

    block: int
    utterance: Utterance
    value: torch.Tensor
    timings: dict[str, float]


class SessionState:
    """Transitions are methods; nobody else takes the lock. The queues have locks of their own.

    Attributes:
        latents: from the denoise worker to the decode worker.
        chunks: from the decode worker to the caller, each with its utterance.
        utterance: what is being said.
        next_block: the block whose number is taken next.
        edits: of the prompt, later ones winning.
    """

    def __init__(self, text: torch.Tensor, open_audio: Callable[[], AudioFrontEnd]) -> None:
        self.latents: BoundedQueue[Latent] = BoundedQueue(LATENT_QUEUE_BLOCKS)
        self.chunks: BoundedQueue[tuple[Utterance, Chunk]] = BoundedQueue(CHUNK_QUEUE_LENGTH)
        # Re-entrant: a dropped session may be collected, and its workers stopped, anywhere.
        self._lock = threading.RLock()
        self._text = text
        self._open_audio = open_audio
        self.edits: list[PromptEdit] = []
        self.utterance = Utterance(open_audio())
        self.next_block = 0
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None

    # ------------------------------------------------------------------------- the caller's side

    def check_open(self) -> None:
        """Raises SessionError once the session failed or was closed."""
        with self._lock:
            if self._error is not None:
                raise SessionError(f"the session failed: {self._error}") from self._error
            if self._closed:
                raise SessionError("the session was closed")

    def speaking(self) -> Utterance:
        """The utterance that takes audio now. Raises InputError after the end of the audio."""
        with self._lock:
            self.check_open()
            if self._ended:
                raise InputError("push_audio: expected no audio after end_of_audio, found some")
            return self.utterance

    def to_end(self) -> Utterance | None:
        """The utterance that `end` will end; None when it was called already."""
        with self._lock:
            self.check_open()
            return None if self._ended else self.utterance

    def end(self) -> Utterance:
        """No more audio comes: the utterance to end."""
        with self._lock:
            self.check_open()
            self._ended = True
            return self.utterance

    def edit(self, edit: PromptEdit) -> None:
        """Adds an edit; those that can no longer apply go, so there are never more than a few."""
        with self._lock:
            self.check_open()
            kept = [e for e in self.edits if not edit.replaces(e, self.next_block)]
            self.edits = [*kept, edit]

    def interrupt(self) -> None:
        """Leaves the utterance behind: its audio goes, and what of it was not taken yet."""
        with self._lock:
            self.check_open()
            interrupted, block = self.utterance, self.next_block
            audio = self._open_audio()
            self.utterance = Utterance(
                audio,
                first_block=max(block - 1, 0),
                after_interruption=True,
                leading_frames=audio.clock.first_video_frames if block else 0,
            )
            if self._ended:
                audio.close()
        interrupted.audio.close()
        self.chunks.clear()

    def is_current(self, utterance: Utterance) -> bool:
        """Whether nothing has interrupted `utterance`."""
        with self._lock:
            return utterance is self.utterance

    # ----------------------------------------------------------------------- the workers' side

    def next_turn(self, wait: Callable[[Utterance, int], None]) -> Turn | None:
        """Takes the number of the next block; None when all is said.

        wait: called, maybe several times, to wait for the audio of a block; it may take any time.
        """
        while (awaited := self._awaited()) is not None:
            utterance, block = awaited
            try:
                wait(utterance, block)
                num_blocks = utterance.audio.num_blocks()
            except SessionError:
                if self._left_behind(utterance):
                    continue
                raise
            with self._lock:
                if utterance is not self.utterance:
                    continue
                if block - utterance.first_block == num_blocks:
                    return None
                self.next_block += 1
                return Turn(block, utterance, self._prompt_of(block))
        return None

    def was_interrupted(self, utterance: Utterance) -> bool:
        """Whether a session that goes on has left `utterance` behind."""
        with self._lock:
            return not self._closed and self._error is None and utterance is not self.utterance

    def fail(self, error: BaseException) -> bool:
        """A worker ends with `error`: the first one is what the caller gets. False for what a
        worker runs into when the session is closed under its feet."""
        with self._lock:
            if self._closed and isinstance(error, LiveActError):
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

    def _stop(self) -> None:
        with self._lock:
            audio = self.utterance.audio
        audio.close()
        self.latents.close()
        self.chunks.close()

    def _awaited(self) -> tuple[Utterance, int] | None:
        """Whose audio makes the next block, and its number; None when nothing more comes."""
        with self._lock:
            if self._ended and self.utterance.unspoken:
                return None
            return self.utterance, self.next_block

    def _left_behind(self, utterance: Utterance) -> bool:
        """Whether the closed audio of `utterance` is no error."""
        with self._lock:
            return self.was_interrupted(utterance) or (self._ended and utterance.unspoken)

    def _prompt_of(self, block: int) -> torch.Tensor:
        texts = [edit.text for edit in self.edits if edit.applies_to(block)]
        return texts[-1] if texts else self._text
