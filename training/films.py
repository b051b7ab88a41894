"""Films of the family through the engine as it ships, and what they should show.

Voices and texts are held out. People are, by choice, those trained on or others of the family.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import liveact
from liveact.errors import SessionError
from liveact.session.session import Session
from training.data.espeak import Phoneme, Utterance, Voice, synthesise
from training.data.expressions import WORDINGS
from training.data.identity import identity
from training.data.motion import COLUMNS, motion_of
from training.data.portrait import draw

SIZE = 128
VOICES = (
    Voice("en-us+m6", rate=165, pitch=40),
    Voice("en+belinda", rate=175, pitch=55),
    Voice("en-us+steph", rate=155, pitch=60),
    Voice("de+max", rate=160, pitch=45),
)
TEXTS = (
    "Before breakfast, my brother and I pick apples, plums and pears. Then, we eat all of them!",
    "Can you hear me? Wonderful. Everybody may come in, but please be quiet for a moment.",
    "Mark my words: by the beginning of May, the whole valley will be full of flowers.",
    "Haben Sie vielleicht ein Blatt Papier? Ich möchte meiner Mutter einen Brief schreiben.",
)


@dataclass(frozen=True)
class Edit:
    """From this block on the prompt is another."""

    block: int
    prompt: str


@dataclass(frozen=True)
class Film:
    """pictures [T, 3, S, S], 0 to 1; motion [T, 12]: what its sound and prompts call for."""

    pictures: Tensor
    motion: Tensor
    denoise_ms: tuple[float, ...]  # of each block


def portrait_of(person: int) -> Image.Image:
    """Somebody at rest, as a session is given it."""
    rest = draw(identity(person), torch.zeros(1, len(COLUMNS)), 512)[0]
    return Image.fromarray((rest * 255).round().byte().permute(1, 2, 0).numpy())


def talk(
    engine: liveact.Engine,
    person: int,
    said: Iterable[Utterance],
    prompt: str = WORDINGS["neutral"][0],
    edits: Sequence[Edit] = (),
    **session: Any,
) -> Iterator[tuple[Tensor, float | None]]:
    """The chunks that a live session makes of a portrait of the family and of what is said without
    a pause: pictures [t, 3, S, S], 0 to 1, and at the end of a block the milliseconds it was
    denoised for."""
    with engine.open_session(
        image=portrait_of(person), prompt=prompt, size=(SIZE, SIZE), max_backlog_s=60, **session
    ) as opened:
        for edit in edits:
            opened.set_prompt(edit.prompt, from_block=edit.block)
        feeder = threading.Thread(target=_feed, args=(opened, said), daemon=True)
        feeder.start()
        for chunk in opened:
            block = chunk.timings.block
            yield as_pictures(chunk.frames), None if block is None else block.denoise_ms
        feeder.join()


def _feed(session: Session, said: Iterable[Utterance]) -> None:
    """A second at a time, as fast as the session takes it."""
    try:
        for one in said:
            for first in range(0, len(one.samples), one.sample_rate_hz):
                piece = one.samples[first : first + one.sample_rate_hz]
                session.push_audio(piece, sample_rate=one.sample_rate_hz, timeout_s=None)
        session.end_of_audio()
    except SessionError:
        pass  # it reaches whoever takes chunks


def as_pictures(frames: np.ndarray) -> Tensor:
    """uint8 [t, H, W, 3] -> [t, 3, H, W], 0 to 1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def spoken(voice: Voice, text: str, pause_s: float = 0.5) -> Utterance:
    """An utterance between two pauses."""
    return paused(synthesise(text, voice), pause_s)


def paused(bare: Utterance, pause_s: float) -> Utterance:
    """The same between two pauses."""
    pause = np.zeros(round(pause_s * bare.sample_rate_hz), np.float32)
    phonemes = tuple(
        Phoneme(p.symbol, p.start_s + pause_s, p.stop_s + pause_s) for p in bare.phonemes
    )
    return Utterance(np.concatenate([pause, bare.samples, pause]), bare.sample_rate_hz, phonemes)


def joined(utterances: Sequence[Utterance]) -> Utterance:
    """One after the other."""
    phonemes: list[Phoneme] = []
    offset_s = 0.0
    for one in utterances:
        phonemes += [
            Phoneme(p.symbol, p.start_s + offset_s, p.stop_s + offset_s) for p in one.phonemes
        ]
        offset_s += one.seconds
    samples = np.concatenate([one.samples for one in utterances])
    return Utterance(samples, utterances[0].sample_rate_hz, tuple(phonemes))


def film(
    engine: liveact.Engine,
    person: int,
    said: Utterance,
    expression: str = "neutral",
    **session: Any,
) -> Film:
    """A film of an utterance, with the first wording of an expression."""
    prompt = WORDINGS[expression][0]
    chunks = list(talk(engine, person, [said], prompt, **session))
    pictures = torch.cat([pictures for pictures, _ in chunks])
    motion = motion_of(said.phonemes, len(pictures), [expression])
    times = tuple(ms for _, ms in chunks if ms is not None)
    return Film(pictures, torch.from_numpy(motion.values), times)
