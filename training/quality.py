"""What a trained checkpoint does, through the engine as it ships: sync, identity, silence.

Voices and texts are held out. People are, by choice, those trained on, others of the family, or one
whose portrait is in a file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import liveact
from training.data.clips import PROMPTS
from training.data.espeak import FloatArray, Phoneme, Utterance, Voice, synthesise
from training.data.identity import identity
from training.data.motion import COLUMNS, FPS, motion_of
from training.data.portrait import draw
from training.measure import mouth_openings, synchronisation

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
class Film:
    """pictures [T, 3, S, S], 0 to 1; expected [T]: how far the mouth should be open."""

    pictures: Tensor
    expected: Tensor


def talk(
    engine: liveact.Engine,
    person: int,
    pcm: FloatArray,
    rate_hz: int,
    prompt: str = PROMPTS[0],
    **session: Any,
) -> Tensor:
    """What a live session makes of a portrait of the family and of PCM: [T, 3, S, S], 0 to 1."""
    rest = draw(identity(person), torch.zeros(1, len(COLUMNS)), 512)[0]
    portrait = Image.fromarray((rest * 255).round().byte().permute(1, 2, 0).numpy())
    frames = []
    with engine.open_session(
        image=portrait, prompt=prompt, size=(SIZE, SIZE), max_backlog_s=600, **session
    ) as opened:
        opened.push_audio(pcm, sample_rate=rate_hz)
        opened.end_of_audio()
        for chunk in opened:
            frames.append(chunk.frames)
    return torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2).float() / 255


def spoken(voice: Voice, text: str, pause_s: float = 0.5) -> Utterance:
    """An utterance between two pauses."""
    bare = synthesise(text, voice)
    pause = np.zeros(round(pause_s * bare.sample_rate_hz), np.float32)
    phonemes = tuple(
        Phoneme(p.symbol, p.start_s + pause_s, p.stop_s + pause_s) for p in bare.phonemes
    )
    return Utterance(np.concatenate([pause, bare.samples, pause]), bare.sample_rate_hz, phonemes)


def film(engine: liveact.Engine, person: int, voice: Voice, text: str, prompt: int = 0) -> Film:
    """A film of an utterance, and the mouth that its phonemes call for."""
    said = spoken(voice, text)
    pictures = talk(engine, person, said.samples, said.sample_rate_hz, PROMPTS[prompt])
    motion = motion_of(said.phonemes, len(pictures), float(prompt))
    return Film(pictures, torch.from_numpy(motion.column("opening")))


def lip_sync(checkpoint: Path, people: list[int]) -> list[dict[str, Any]]:
    """A row for each person, with the next voice and text: `Sync`, and how well the person stays.

    detail: PSNR in dB of everything above the mouth against the drawn portrait, in the last second.
    """
    rows = []
    with liveact.Engine.load(checkpoint, device="cpu") as engine:
        for i, person in enumerate(people):
            voice, text = VOICES[i % len(VOICES)], TEXTS[i % len(TEXTS)]
            made = film(engine, person, voice, text)
            found = mouth_openings(identity(person), made.pictures)
            drawn = draw(identity(person), torch.zeros(1, len(COLUMNS)), SIZE)[0]
            upper = slice(0, SIZE // 2)
            error = (made.pictures[-FPS:, :, upper] - drawn[:, upper]).square().mean()
            row = {"person": person, "voice": voice.language, "frames": len(found)}
            row |= asdict(synchronisation(found, made.expected))
            row["detail"] = float(-10 * error.log10())
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows
