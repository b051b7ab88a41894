"""What a session and an engine say of themselves, for operators and their dashboards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["waiting", "idling", "speaking", "ended", "failed", "closed"]


@dataclass(frozen=True, kw_only=True)
class SessionStats:
    """A session at one moment.

    Attributes:
        name: as in the log.
        state: `waiting` for audio; `idling`, which is waiting with `idle="silence"`; `speaking`
            from the first pushed sample until the last chunk of it was taken; `ended` when the
            iteration is over; `failed` after an error of its own; `closed`.
        utterance: number of the utterance that takes audio.
        blocks: begun so far.
        frames: video frames that were taken so far.
        latents_waiting: blocks that are denoised and not yet being decoded.
        chunks_waiting: decoded and not yet taken.
        backlog_s: seconds of pushed audio that wait to be used.
        lag_s: see `Session.lag_s`.
        underruns: how often a player that plays what it takes without a pause stood still in the
            middle of something, because the next chunk was not there.
        stalled_s: for how long, in all.
        interruptions: so far.
        age_s: since it was opened.
        device_bytes: memory of its own, on the devices of the DiT and of the VAE.
    """

    name: str
    state: State
    utterance: int
    blocks: int
    frames: int
    latents_waiting: int
    chunks_waiting: int
    backlog_s: float
    lag_s: float
    underruns: int
    stalled_s: float
    interruptions: int
    age_s: float
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """An engine at one moment.

    Attributes:
        sessions: those that are open, oldest first.
        sessions_opened: so far.
        device_bytes: allocated by the runtime on the devices of the DiT: weights and sessions.
        cached_prompts, cached_pictures: results of the encoders that are kept.
        age_s: since it was loaded.
    """

    sessions: tuple[SessionStats, ...]
    sessions_opened: int
    device_bytes: int
    cached_prompts: int
    cached_pictures: int
    age_s: float
