"""The rows of `benchmarks.quality` but for drift; each returns the lines of a table."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liveact.blocks import RELEASED_CLOCK, BlockClock, Slots
from liveact.commands import cli
from liveact.dit.dit import MemoryPolicy
from liveact.engine import Engine
from liveact.media.sound import open_audio
from training.data.clips import HELD_OUT, heard
from training.data.espeak import FloatArray, Phoneme, Utterance
from training.data.expressions import EXPRESSIONS, RAMP, WORDINGS
from training.data.identity import identity
from training.data.motion import FPS, motion_of
from training.data.portrait import draw
from training.films import (
    SIZE,
    TEXTS,
    VOICES,
    Edit,
    Film,
    as_pictures,
    film,
    joined,
    paused,
    spoken,
    talk,
)
from training.measure import (
    CLOSED,
    around_mouth,
    expression_errors,
    mouth_openings,
    shown_expressions,
    synchronisation,
)
from training.sync import load_sync, score

Lines = list[dict[str, Any]]
# The bundled portrait, one trained on, and people nobody trained on.
PEOPLE = (13, 2, HELD_OUT + 5, HELD_OUT + 9)
STEADY_BLOCK = 3  # the memory is full
DRAWN_FRAMES = 85
RECORDED = Path(__file__).resolve().parent / "recorded"
POLICIES = {
    "conv": MemoryPolicy(),
    "conv, sharded": MemoryPolicy(memory="sharded"),
    "mean": MemoryPolicy(memory="mean"),
    "none: a window": MemoryPolicy(slots=(2, 0, 4, 8)),
    "conv, slots 6/6": MemoryPolicy(slots=(2, 2, 2, 6)),
    "conv, slots 8/8": MemoryPolicy(slots=(2, 4, 2, 8)),
}


def open_engine(options: argparse.Namespace, precision: str | Path | None = None) -> Engine:
    """The checkpoint that is measured."""
    return Engine.load(options.checkpoint, device=options.device, precision=precision)


def cases(count: int) -> Iterator[tuple[int, Utterance, str]]:
    """A person, an utterance, and its voice: four of each before a pair comes again."""
    for i in range(count):
        voice = (i + i // len(PEOPLE)) % len(VOICES)
        said = spoken(VOICES[voice], TEXTS[voice])
        yield PEOPLE[i % len(PEOPLE)], said, VOICES[voice].language


def long_case(i: int) -> tuple[int, Utterance]:
    """A person, and three utterances of one voice: some 15 s."""
    return PEOPLE[i % len(PEOPLE)], joined([spoken(VOICES[i % 3], text) for text in TEXTS[:3]])


def psnr(one: Tensor, other: Tensor) -> float:
    """In dB, of pictures from 0 to 1."""
    return float(-10 * (one - other).square().mean().clamp_min(1e-10).log10())


def likeness(person: int, made: Film) -> dict[str, float]:
    """PSNR of a film against its drawing: all of it, and the rectangle around the mouth."""
    drawn = draw(identity(person), made.motion, SIZE)
    mouth = around_mouth(identity(person), SIZE)
    return {
        "psnr_db": psnr(made.pictures, drawn),
        "mouth_db": psnr(made.pictures[mouth], drawn[mouth]),
    }


def measured(person: int, said: Utterance, made: Film) -> dict[str, Any]:
    """Lip synchronisation, by geometry and by the scorer, and likeness, of a neutral face."""
    found = mouth_openings(identity(person), made.pictures)
    speech = torch.from_numpy(heard(said.samples, said.sample_rate_hz, len(made.pictures)))
    scored = score(load_sync(), identity(person), speech, made.pictures)
    return (
        asdict(synchronisation(found, made.motion))
        | {"sync_c": scored.confidence, "sync_d": scored.distance, "offset": scored.offset}
        | likeness(person, made)
    )


def averaged(lines: Lines, **names: Any) -> dict[str, Any]:
    """A line of names and the means of what the others have besides them."""
    means = {}
    for key in lines[0]:
        if key not in names:
            values = [line[key] for line in lines if line[key] is not None]
            means[key] = mean(values) if values else None
    return names | means


def autoencoder(options: argparse.Namespace) -> Lines:
    """What the VAE leaves of drawings of people and voices that nobody trained on."""
    lines = []
    with open_engine(options) as engine:
        for i in range(options.films):
            said = spoken(VOICES[i % len(VOICES)], TEXTS[i % len(TEXTS)])
            motion = torch.from_numpy(motion_of(said.phonemes, DRAWN_FRAMES).values)
            drawn = draw(identity(HELD_OUT + i), motion, SIZE)
            latents = engine.vae.encode(drawn.movedim(1, 0)[None] * 2 - 1)
            with contextlib.closing(engine.vae.open_stream()) as stream:
                made = torch.cat([as_pictures(frames) for frames in stream.decode(latents[0])])
            line = {"person": HELD_OUT + i, "voice": VOICES[i % len(VOICES)].language}
            seen = Film(made, motion, ())
            found = synchronisation(mouth_openings(identity(HELD_OUT + i), made), motion)
            lines.append(line | likeness(HELD_OUT + i, seen) | asdict(found))
    return [*lines, averaged(lines, person="mean", voice="")]


def sync(options: argparse.Namespace) -> Lines:
    """How mouths follow held-out voices."""
    lines = []
    with open_engine(options) as engine:
        for person, said, voice in cases(options.films):
            line = {"person": person, "voice": voice}
            lines.append(line | measured(person, said, film(engine, person, said)))
    return [*lines, averaged(lines, person="mean", voice="")]


def recording() -> Utterance:
    """Human speech, and its phonemes as a recogniser aligned them (recorded/README.md)."""
    sound = open_audio(RECORDED / "austen.flac")
    samples = np.concatenate(list(sound))[:, 0]
    phonemes = json.loads((RECORDED / "austen.json").read_text())["phonemes"]
    return Utterance(samples, sound.sample_rate_hz, tuple(Phoneme(*each) for each in phonemes))


def recorded(options: argparse.Namespace) -> Lines:
    """How mouths follow somebody who is no synthesiser."""
    lines = []
    said = paused(recording(), 0.5)
    with open_engine(options) as engine:
        for person in PEOPLE[: options.films]:
            lines.append({"person": person} | measured(person, said, film(engine, person, said)))
    return [*lines, averaged(lines, person="mean")]


def quiet(kind: str, seconds: float) -> Utterance:
    """Nobody speaks: digital zero, or the hum of a room at -50 dB of full scale."""
    samples: FloatArray = np.zeros(round(16_000 * seconds), np.float32)
    if kind == "room":
        noise = np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32)
        hum = np.convolve(noise, np.ones(12) / 12**0.5, mode="same").astype(np.float32)
        samples += np.float32(10 ** (-50 / 20)) * hum
    return Utterance(samples, 16_000, ())


def silence(options: argparse.Namespace) -> Lines:
    """The share of frames with a closed mouth while nobody speaks, after the first second."""
    lines = []
    with open_engine(options) as engine:
        for kind in ("zero", "room"):
            for person in PEOPLE[: options.films]:
                made = film(engine, person, quiet(kind, 20.0))
                found = mouth_openings(identity(person), made.pictures[FPS:])
                closed = float((found < CLOSED).float().mean())
                lines.append({"sound": kind, "person": person, "closed": closed})
    return lines


def prompts(options: argparse.Namespace) -> Lines:
    """Neutral, from block 2 on something else, from block 6 on neutral again; for each wording."""
    lines = []
    with open_engine(options) as engine:
        for expression in EXPRESSIONS[1:]:
            for i, wording in enumerate(WORDINGS[expression]):
                person, said = long_case(i)
                lines.append(
                    {"expression": expression, "wording": wording, "person": person}
                    | edited(engine, person, said, expression, wording)
                )
    return [*lines, averaged(lines, expression="mean", wording="", person="")]


def edited(
    engine: Engine, person: int, said: Utterance, expression: str, wording: str
) -> dict[str, Any]:
    """The share of seconds in which the expression is shown, and neutral before and after; how the
    mouth follows meanwhile."""
    edits = [Edit(2, wording), Edit(6, WORDINGS["neutral"][0])]
    chunks = talk(engine, person, [said], edits=edits)
    pictures = torch.cat([some for some, _ in chunks])
    first, last = (RELEASED_CLOCK.video_frames(edit.block).start for edit in edits)

    def share(start: int, stop: int, wanted: str) -> float:
        """Of the seconds from a change on, but for the moment that it takes."""
        start += 2 * RAMP
        errors = expression_errors(identity(person), pictures[start:stop], said.phonemes, start)
        shown = shown_expressions(errors)
        return shown.count(wanted) / len(shown)

    during = pictures[first + 2 * RAMP : last]
    motion = torch.from_numpy(motion_of(said.phonemes, len(pictures)).values)
    found = mouth_openings(identity(person), during, expression)
    return {
        "shown": share(first, last, expression),
        "neutral": (share(0, first, "neutral") + share(last, len(pictures), "neutral")) / 2,
        "correlation": synchronisation(found, motion[first + 2 * RAMP : last]).correlation,
    }


def jump(pictures: Tensor, starts: Sequence[int], among: int = 1) -> float:
    """The mean difference of a frame from the one before at these frames, over that elsewhere.

    among: elsewhere counts each so manyth frame only, from frame 1 on. The four frames of a latent
    frame are decoded together, so with 4 a block is compared with what is between any two of them.
    """
    change = pictures.diff(dim=0).abs().mean((1, 2, 3))
    at, counts = torch.zeros(2, len(change), dtype=torch.bool)
    at[torch.tensor([start - 1 for start in starts if start < len(pictures)])] = True
    counts[::among] = True
    return float(change[at].mean() / change[counts & ~at].mean())


def seams(options: argparse.Namespace) -> Lines:
    """How much more changes from block to block than within one, beside drawings of the same."""
    kinds: dict[str, dict[str, Any]] = {
        "streaming": {},
        "whole audio": {"audio_mode": "whole"},
        "windowed decode": {"vae_decode": "windowed"},
    }
    lines = []
    starts = [RELEASED_CLOCK.video_frames(block).start for block in range(1, 20)]
    with open_engine(options) as engine:
        for kind, session in kinds.items():
            found = []
            for i in range(min(options.films, 3)):
                person, said = long_case(i)
                made = film(engine, person, said, **session)
                drawn = draw(identity(person), made.motion, SIZE)
                openings = mouth_openings(identity(person), made.pictures)
                found.append(
                    {
                        "film": jump(made.pictures, starts),
                        "drawn": jump(drawn, starts),
                        "film, latents": jump(made.pictures, starts, among=4),
                        "drawn, latents": jump(drawn, starts, among=4),
                        "correlation": synchronisation(openings, made.motion).correlation,
                    }
                )
            lines.append(averaged(found) | {"kind": kind})
    return [{"kind": line.pop("kind")} | line for line in lines]


def memory(options: argparse.Namespace) -> Lines:
    """The variants of the memory; the model was trained with the first of them."""
    lines = []
    with open_engine(options) as engine:
        for name, policy in POLICIES.items():
            found = []
            for i in range(min(options.films, 3)):
                person, said = long_case(i)
                made = film(engine, person, said, memory=policy)
                frames = BlockClock(Slots(*policy.slots)).block_video_frames
                steady = median(made.denoise_ms[STEADY_BLOCK:])
                found.append(measured(person, said, made) | {"ms_per_frame": steady / frames})
            lines.append(averaged(found, memory=name))
    return lines


def precision(options: argparse.Namespace) -> Lines:
    """Formats of the DiT: lip synchronisation, and how far films are from those in fp32."""
    given = [long_case(i) for i in range(min(options.films, 3))]
    lines, exact = [], list[Film]()
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.json"
        device = ["--device", options.device] if options.device else []
        cli.main(["calibrate", str(options.checkpoint), "--out", str(policy), *device])
        formats: dict[str, str | Path] = {name: name for name in ("fp32", "bf16", "fp8")}
        for name, wanted in (formats | {"policy": policy}).items():
            with open_engine(options, wanted) as engine:
                films = [film(engine, person, said) for person, said in given]
            exact = exact or films
            found = [
                measured(person, said, made) | {"fp32_db": psnr(made.pictures, true.pictures)}
                for (person, said), made, true in zip(given, films, exact, strict=True)
            ]
            lines.append(averaged(found, precision=name))
    return lines
