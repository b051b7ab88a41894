"""A session and everybody who is at it: sound goes in at any pace, frames come out when they are
due, events tell what happens, and time limits end what nobody uses.

    feed ─► bounded queue ─► feeder ─► session ─► Pacer ─► frames ─► one stream

Everything here belongs to one event loop and never holds it up.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from liveact.audio.samples import as_float
from liveact.errors import BacklogFull, LiveActError
from liveact.serve.errors import Busy, Refused
from liveact.serve.metrics import Metrics
from liveact.serve.settings import ServeSettings
from liveact.session.chunk import Interruption
from liveact.session.pacing import Frame, Pacer
from liveact.session.session import Session

SAMPLE_RATE_HZ = 48_000  # of the sound that comes out, mono
STATS_S = 1.0
# Receivers hold more than that, so a loop that was held up is not heard. Beginning anew would be a
# gap in the sound as long as the delay.
CATCH_UP_S = 0.2
PIECE_S = 0.1  # what is fed in smaller pieces is put together
MAX_PIECES = 4096  # and ends of utterances, that wait
MAX_UTTERANCES = 8  # ended in the session, and not shown yet
MAX_PROMPTS = 8  # that wait for the text encoder
MAX_EVENTS = 256  # that wait for a stream; one that is further behind is let go

State = Literal["waiting", "reserved", "attached", "closing", "closed"]
Event = dict[str, Any]
_Sound = tuple[npt.NDArray[np.float32], int]

_log = logging.getLogger("liveact.serve")


class Events:
    """What one stream is told; made by `LiveSession.events`. The last one is `closed`.

    Attributes:
        exclusive: see `LiveSession.events`.
        is_over: nothing comes after what waits.
    """

    def __init__(self, exclusive: bool) -> None:
        self.exclusive = exclusive
        self._queue: deque[Event] = deque()
        self._changed = asyncio.Event()
        self.is_over = False

    def put(self, event: Event) -> None:
        """Adds an event. For a reader that is far behind, it is the last."""
        if not self.is_over:
            self._queue.append(event)
            self.is_over = len(self._queue) >= MAX_EVENTS or event["type"] == "closed"
            self._changed.set()

    def take(self) -> Event | None:
        """The next event; None where there is none now."""
        return self._queue.popleft() if self._queue else None

    async def wait(self) -> bool:
        """Until there is an event; False where there will be none."""
        while not self._queue:
            if self.is_over:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True


class LiveSession:
    """Owns a session, its pacer, and the tasks that feed and watch it. `close` frees all of it.

    Attributes:
        id: a capability: who knows it may use the session.
        name: a hash of it, for logs.
        session: opened with 48 kHz mono.
        pacer: of the session; read it through `frames`.
        settings: of the server.
        size: width and height of the picture.
        sample_rate_hz: of the sound that comes out, mono.
        state: `waiting` until a stream takes the frames; `reserved` while one is about to.
        reason: why it was closed; empty before.
        epoch: how often it was interrupted: speech that was handed out before is stale.
    """

    def __init__(
        self,
        session: Session,
        settings: ServeSettings,
        metrics: Metrics,
        *,
        size: tuple[int, int],
        asked_s: float,
        on_closed: Callable[[LiveSession], None],
    ) -> None:
        """asked_s: when it was asked for, of the loop's clock."""
        self.id = secrets.token_urlsafe(24)
        self.name = hashlib.sha256(self.id.encode()).hexdigest()[:12]
        self.session, self.settings, self.size = session, settings, size
        self.sample_rate_hz = SAMPLE_RATE_HZ
        self.pacer = Pacer(session, late_s=CATCH_UP_S)
        self.state: State = "waiting"
        self._reservation_lost: Callable[[], None] = lambda: None
        self.reason = ""
        self.epoch = 0
        self._metrics, self._on_closed = metrics, on_closed
        self._loop = asyncio.get_running_loop()
        self._asked_s = asked_s
        self._opened_s = self._heard_s = self._loop.time()
        self._subscribers: set[Events] = set()
        self._sound: deque[_Sound | None] = deque()  # None: the end of an utterance
        self._sound_s = 0.0  # in the queue
        self._pushing_s = 0.0  # taken from it, and not all in the session
        self._has_sound = asyncio.Event()
        self._format: tuple[int, int] | None = None  # rate and channels of the open utterance
        self._interrupting = asyncio.Lock()
        self._prompting = asyncio.Lock()
        self._prompts = 0  # that wait for the text encoder, or are there
        self._frames = 0  # handed out
        self._utterance = 0  # of the last frame
        self._spoken = 0  # frames of the utterance that is being shown; 0: none is
        self._begun_s: deque[float] = deque()  # when utterances that are not shown yet began
        self._interrupted_s: float | None = None  # and nothing was shown since
        self._closing: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Future[int | None]] = set()  # an utterance, by the feeder
        self._feeder = self._start(self._feed_session())
        self._start(self._watch())
        self._start(self._tell_stats())

    # ------------------------------------------------------------------------ what goes in

    async def feed(self, pcm: npt.NDArray[Any], sample_rate_hz: int) -> None:
        """What is said next: float32 or int16 [n] or [n, channels]. Never waits.

        Raises BacklogFull where more than `settings.backlog_s` wait: nothing of it is taken, and
        the session goes on. InputError for bad samples.
        """
        samples = as_float(pcm)
        seconds = len(samples) / sample_rate_hz
        waiting_s = self._sound_s + self._pushing_s
        if waiting_s + seconds > self.settings.backlog_s:
            raise BacklogFull(
                f"audio: expected at most {self.settings.backlog_s:g} s that wait, "
                f"found {seconds:.1f} s on top of {waiting_s:.1f} s"
            )
        self._heard_s = self._loop.time()
        last = self._sound[-1] if self._sound else None
        if last is not None and _continues(last, samples, sample_rate_hz):
            self._sound[-1] = (np.concatenate([last[0], samples]), sample_rate_hz)
        elif len(samples):
            self._put((samples, sample_rate_hz))
        self._sound_s += seconds

    def end_of_utterance(self) -> None:
        """What was fed so far is complete; it comes out to its last frame. Raises BacklogFull."""
        if not self._sound or self._sound[-1] is not None:
            self._put(None)

    async def interrupt(self) -> Interruption:
        """Stops speaking at once: of what was fed before, nothing is handed out from now on.

        Returns the utterance that was cut off, or would have been next, and how many seconds of it
        were handed out. Raises SessionError once the session is closed.
        """
        now_s = self._loop.time()
        async with self._interrupting:
            self._drop_sound()
            self._feeder.cancel()
            under_way: set[asyncio.Future[Any]] = {self._feeder, *self._ending}
            await asyncio.wait(under_way)
            self._pushing_s, self._format = 0.0, None
            found = await self.pacer.interrupt()
            if self._spoken:  # the session counts what was taken, this what was handed out
                found = Interruption(self._utterance, self._spoken / float(self.session.fps))
                self._interrupted_s = now_s
            self.epoch += 1
            self._spoken = 0
            if self.state not in ("closing", "closed"):
                self._feeder = self._start(self._feed_session())
        self.tell({"type": "interrupted", **found._asdict()})
        return found

    async def set_prompt(self, text: str) -> None:
        """Another prompt, from the next block on; those that are asked for at once are changed to
        one after the other. Raises Refused where too many wait, SessionError."""
        if self._prompts >= MAX_PROMPTS:
            raise Refused(
                429, "too_many_prompts", f"prompt: expected at most {MAX_PROMPTS} that wait"
            )
        self._prompts += 1
        try:
            async with self._prompting:
                await self.session.aset_prompt(text)
        finally:
            self._prompts -= 1
        self.tell({"type": "prompt_changed", "prompt": text})

    # ------------------------------------------------------------------------ what comes out

    def reserve(self, lost: Callable[[], None]) -> None:
        """Keeps the frames for a stream that is being connected. It takes them with
        `frames(reserved=True)`; where another stream takes them before, `lost` is called. Raises
        Busy where they are taken or reserved."""
        if self.state != "waiting":
            raise Busy
        self.state, self._reservation_lost = "reserved", lost

    def frames(self, *, reserved: bool = False) -> AsyncIterator[Frame]:
        """Every frame when it is due, until the session is closed. Once only: raises Busy.

        reserved: for the stream that has reserved them.
        """
        if self.state not in (("reserved",) if reserved else ("reserved", "waiting")):
            raise Busy
        if self.state == "reserved" and not reserved:
            self._reservation_lost()
        self.state = "attached"
        return self._next_frames()

    async def _next_frames(self) -> AsyncIterator[Frame]:
        try:
            while self.state == "attached":
                frame = await self.pacer.next_frame()
                if frame is None or self.state != "attached":
                    return
                self._note(frame)
                yield frame
                if frame.last_of_utterance and self._spoken:
                    spoken_s, self._spoken = self._spoken / float(self.session.fps), 0
                    event = {"utterance": frame.utterance, "delivered_s": spoken_s}
                    self.tell({"type": "utterance_finished"} | event)
        except LiveActError as error:
            self._failed(error)

    def _note(self, frame: Frame) -> None:
        """A frame is handed out now."""
        now_s = self._loop.time()
        self._metrics.shown(frame)
        if not self._frames:
            self._metrics.first_frame.observe(now_s - self._asked_s)
        if self._interrupted_s is not None and not frame.speech:
            self._metrics.interrupt.observe(now_s - self._interrupted_s)
            self._interrupted_s = None
        self._frames += 1
        if frame.speech:
            if not self._spoken:
                self.tell({"type": "utterance_started", "utterance": frame.utterance})
                if self._begun_s:
                    self._metrics.speech_to_frame.observe(now_s - self._begun_s.popleft())
            self._spoken += 1
        self._utterance = frame.utterance

    # ------------------------------------------------------------------------ what happens

    def events(self, exclusive: bool = False) -> Events:
        """What happens from now on; `leave` ends it. Exclusive: raises Busy where another one that
        is exclusive has not left."""
        if exclusive and any(events.exclusive for events in self._subscribers):
            raise Busy
        events = Events(exclusive)
        self._subscribers.add(events)
        if self.state in ("closing", "closed"):
            events.put({"type": "closed", "reason": self.reason})
        return events

    def leave(self, events: Events) -> None:
        """Nobody reads these any more."""
        self._subscribers.discard(events)

    def tell(self, event: Event) -> None:
        """Tells every stream."""
        for events in self._subscribers:
            events.put(event)

    @property
    def is_speaking(self) -> bool:
        """Whether something that was fed has not been handed out."""
        waits = self._sound_s + self._pushing_s > 0 or self._spoken > 0
        return waits or self.session.stats().state == "speaking"

    def stats(self) -> Event:
        """What it does at this moment."""
        found = self.session.stats()
        return {
            "state": found.state,
            "utterance": found.utterance,
            "frames": self._frames,
            "repeated": self.pacer.repeated,
            "underruns": self.pacer.underruns,
            "blocks": found.blocks,
            "lag_s": round(found.lag_s, 3),
            "backlog_s": round(self._sound_s + self._pushing_s + found.backlog_s, 3),
            "interruptions": found.interruptions,
            "age_s": round(self._loop.time() - self._opened_s, 3),
        }

    # ------------------------------------------------------------------------ its end

    async def close(self, reason: str) -> None:
        """Frees the session; returns when that is done. Any number of times: the first counts."""
        if self._closing is None:
            self.state, self.reason = "closing", reason
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.tell({"type": "closed", "reason": self.reason})
        self._drop_sound()
        for task in self._tasks:
            task.cancel()
        try:
            await self.session.aclose()
        finally:
            self.state = "closed"
            self._on_closed(self)

    def _failed(self, error: LiveActError) -> None:
        """The session ended with an error of its own, unless it is being closed anyway."""
        if self._closing is None:
            _log.error("failed: %s", error, extra={"session": self.name})
            self.tell({"type": "error", "code": "session_failed", "message": str(error)})
            self._start(self.close("failed"))

    async def _watch(self) -> None:
        """Closes the session when a time limit is over."""
        limits = self.settings
        while True:
            ends = {
                "idle_timeout": self._heard_s + limits.idle_s,
                "total_timeout": self._opened_s + limits.total_s,
            }
            if self.state == "waiting":
                ends["attach_timeout"] = self._opened_s + limits.attach_s
            reason = min(ends, key=lambda name: ends[name])
            left_s = ends[reason] - self._loop.time()
            if left_s <= 0:
                return await self.close(reason)
            await asyncio.sleep(left_s)

    async def _tell_stats(self) -> None:
        frames = underruns = 0
        while True:
            asked_s = self._loop.time()
            await asyncio.sleep(STATS_S)
            fps = (self._frames - frames) / (self._loop.time() - asked_s)
            self._metrics.underruns.inc(self.pacer.underruns - underruns)
            frames, underruns = self._frames, self.pacer.underruns
            self.tell({"type": "stats", "fps": round(fps, 2)} | self.stats())

    # ------------------------------------------------------------------------ the feeder

    async def _feed_session(self) -> None:
        try:
            while True:
                while self._sound:
                    await self._feed_next(self._sound.popleft())
                self._has_sound.clear()
                await self._has_sound.wait()
        except LiveActError as error:
            self._failed(error)

    async def _feed_next(self, sound: _Sound | None) -> None:
        if sound is None:
            return await self._end_utterance()
        pcm, rate_hz = sound
        seconds = len(pcm) / rate_hz
        self._sound_s = max(0.0, self._sound_s - seconds)
        self._pushing_s = seconds
        if self._format not in (None, (rate_hz, pcm.shape[1])):  # an utterance has one only
            await self._end_utterance()
        if self._format is None:
            self._begun_s.append(self._loop.time())
        self._format = (rate_hz, pcm.shape[1])
        await self.session.apush_audio(pcm, rate_hz, timeout_s=None)
        self._pushing_s = 0.0

    async def _end_utterance(self) -> None:
        self._format = None
        # Cancelled, it would still be done: later, maybe to the utterance after an interruption.
        ending = asyncio.ensure_future(self.session.aend_of_utterance())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.shield(ending)
        # The session bounds the sound that waits in it, but not the number of utterances.
        while self.session.stats().utterance - self._utterance > MAX_UTTERANCES:
            await asyncio.sleep(0.05)

    def _put(self, sound: _Sound | None) -> None:
        if len(self._sound) >= MAX_PIECES:
            raise BacklogFull(f"audio: expected at most {MAX_PIECES} pieces that wait, found more")
        self._sound.append(sound)
        self._has_sound.set()

    def _drop_sound(self) -> None:
        self._sound.clear()
        self._begun_s.clear()
        self._sound_s = 0.0

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _continues(last: _Sound, samples: npt.NDArray[np.float32], sample_rate_hz: int) -> bool:
    """Whether small pieces of one format follow one another."""
    before, rate_hz = last
    same = rate_hz == sample_rate_hz and before.shape[1] == samples.shape[1]
    return same and len(before) < PIECE_S * rate_hz
