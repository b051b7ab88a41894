"""Clips of somebody speaking: the sound as the encoder hears it, the motion, who it is.

The pictures are not kept: `portrait.draw` makes them of the motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from liveact.audio.chain import ENCODER_RATE_HZ, FEATURES_PER_S, SAMPLES_PER_FEATURE, SpeechChain
from liveact.blocks import RELEASED_CLOCK
from training.data.espeak import FloatArray, Phoneme, Utterance, Voice, synthesise
from training.data.expressions import EXPRESSIONS, SHARES, expression_of, prompt_of
from training.data.flite import SPEAKERS, Speaker, synthesise_flite
from training.data.identity import Identity, identity
from training.data.motion import COLUMNS, FPS, motion_of
from training.data.people import Person
from training.data.portrait import draw
from training.data.texts import HELD_OUT_VARIANTS, VARIANTS, VOICES, random_text

HELD_OUT = 1_000_000  # clips from this seed on have voices and identities nobody trains on
_SILENCE_SHARE = 0.04  # of clips in which nobody speaks
_EDITED_SHARE = 0.4  # of clips whose prompt changes from one block to the next


@dataclass(frozen=True)
class Clip:
    """A clip of T video frames at 20 per second.

    speech [640 * T] float32 at 16 kHz, its tempo changed by 25/20 as the engine does it, before the
    encoder's normalisation. motion [T, 12] in the order of `COLUMNS`. prompts: of each block, the
    index in `PROMPTS`.
    """

    person: int
    prompts: tuple[int, ...]
    speech: FloatArray
    motion: FloatArray

    @property
    def identity(self) -> Identity:
        """Who speaks."""
        return identity(self.person)

    def frames(self, start: int = 0, stop: int | None = None, size: int = 128) -> Tensor:
        """Pictures [n, 3, size, size], 0 to 1, of frames [start, stop)."""
        return draw(self.identity, torch.from_numpy(self.motion[start:stop]), size)


def make_clip(
    seed: int,
    frames: int,
    people: int,
    flite: float = 0.0,
    recorded: Sequence[Person] = (),
) -> Clip:
    """The clip with this number. people: identities that training clips are spread over; held-out
    clips have others. flite: the share of English clips with its voices, none of them held out.
    recorded: who speaks instead of synthetic voices, in all clips."""
    generator = np.random.default_rng([seed, 0xC11F])
    held_out = seed >= HELD_OUT
    person = int(generator.integers(people)) + (HELD_OUT if held_out else 0)
    prompts = _prompts(generator, frames)
    if generator.random() < _SILENCE_SHARE:
        pcm: FloatArray = np.zeros(frames * 1100, np.float32)
        phonemes: tuple[Phoneme, ...] = ()
    else:
        pcm, phonemes = _speak(
            generator, frames / FPS + 0.5, _voice(generator, held_out, flite, recorded)
        )
    speech = heard(_augmented(pcm, generator), 22_050, frames)
    motion = motion_of(phonemes, frames, [expression_of(p) for p in prompts]).values
    # A session starts from the portrait, which is at rest.
    motion[0] = 0
    return Clip(person, prompts, speech, motion)


def _prompts(generator: np.random.Generator, frames: int) -> tuple[int, ...]:
    """Index in `PROMPTS` for each block that begins within the frames; it may change once."""
    blocks = 1
    while RELEASED_CLOCK.video_frames(blocks).start < frames:
        blocks += 1
    first, then = (
        prompt_of(str(generator.choice(EXPRESSIONS, p=SHARES)), int(generator.integers(3)))
        for _ in range(2)
    )
    edited = generator.random() < _EDITED_SHARE
    change = int(generator.integers(1, 3)) if edited else blocks
    return tuple(first if block < change else then for block in range(blocks))


def heard(pcm: FloatArray, rate_hz: int, frames: int) -> FloatArray:
    """PCM [n] at any rate -> [640 * frames] at 16 kHz in the tempo of the encoder."""
    wanted = frames * SAMPLES_PER_FEATURE
    chain = SpeechChain(rate_hz, Fraction(FPS))
    need = math.ceil((frames + 4) * rate_hz / FPS)
    padded = np.zeros((need, 1), np.float32)
    padded[: min(len(pcm), need), 0] = pcm[:need]
    piece = rate_hz // 50  # what the engine pushes at a time
    out = [chain.push(padded[i : i + piece]) for i in range(0, need - piece, piece)]
    return np.concatenate(out)[:wanted].astype(np.float32)


def _voice(
    generator: np.random.Generator, held_out: bool, flite: float, recorded: Sequence[Person]
) -> Callable[[], Utterance]:
    """Somebody, who says something else at each call."""
    if recorded:
        said = recorded[int(generator.integers(len(recorded)))].said
        return lambda: said[int(generator.integers(len(said)))]
    language = str(generator.choice(list(VOICES), p=[0.6, 0.12, 0.1, 0.09, 0.09]))
    variants = HELD_OUT_VARIANTS if held_out else VARIANTS
    voice = Voice(
        f"{generator.choice(VOICES[language])}+{generator.choice(variants)}",
        rate=int(generator.integers(130, 200)),
        pitch=int(generator.integers(20, 80)),
        pitch_range=int(generator.integers(20, 80)),
    )
    if language == "en" and not held_out and generator.random() < flite:
        speaker = Speaker(
            str(generator.choice(SPEAKERS)),
            stretch=float(generator.uniform(0.85, 1.25)),
            pitch_hz=float(generator.uniform(80, 220)),
        )
        return lambda: synthesise_flite(random_text(generator, language), speaker)
    return lambda: synthesise(random_text(generator, language), voice)


def _speak(
    generator: np.random.Generator, seconds: float, say: Callable[[], Utterance]
) -> tuple[FloatArray, tuple[Phoneme, ...]]:
    """Utterances with pauses between them, starting anywhere: PCM at 22050 Hz and its phonemes."""
    # A smaller or larger head: pitch, formants and tempo together.
    size = float(generator.uniform(0.86, 1.16)) if generator.random() < 0.5 else 1.0
    pieces: list[FloatArray] = []
    phonemes: list[Phoneme] = []
    offset_s = 0.0
    # Half of the clips begin in the middle of a sentence, the others with a pause.
    skip_s = float(generator.uniform(0, 2)) if generator.random() < 0.5 else 0.0
    if not skip_s:
        pause = np.zeros(int(generator.uniform(0, 0.6) * 22_050), np.float32)
        pieces.append(pause)
        offset_s += len(pause) / 22_050
    while offset_s < seconds + skip_s:
        utterance = resized(say(), size)
        pieces.append(utterance.samples)
        phonemes += [
            Phoneme(p.symbol, p.start_s + offset_s, p.stop_s + offset_s) for p in utterance.phonemes
        ]
        offset_s += utterance.seconds
        pause = np.zeros(int(generator.uniform(0.05, 1.0) * utterance.sample_rate_hz), np.float32)
        pieces.append(pause)
        offset_s += len(pause) / utterance.sample_rate_hz
    pcm = np.concatenate(pieces)[int(skip_s * 22_050) :]
    shifted = (Phoneme(p.symbol, p.start_s - skip_s, p.stop_s - skip_s) for p in phonemes)
    return pcm, tuple(p for p in shifted if p.stop_s > 0)


def resized(said: Utterance, size: float) -> Utterance:
    """At 22050 Hz and `size` times as long, as a tape that runs slower."""
    count = round(len(said.samples) * 22_050 / said.sample_rate_hz * size)
    if count == len(said.samples):
        return said
    at = np.linspace(0, len(said.samples) - 1, count)
    samples = np.interp(at, np.arange(len(said.samples)), said.samples).astype(np.float32)
    phonemes = tuple(Phoneme(p.symbol, p.start_s * size, p.stop_s * size) for p in said.phonemes)
    return Utterance(samples, 22_050, phonemes)


def _augmented(pcm: FloatArray, generator: np.random.Generator) -> FloatArray:
    """What rooms and microphones do: gain, a tilted spectrum, a band limit, noise, an echo."""
    pcm = pcm * np.float32(10 ** generator.uniform(-0.7, 0.3))
    if generator.random() < 0.6:
        spectrum = np.fft.rfft(pcm)
        frequency = np.fft.rfftfreq(len(pcm), 1 / 22_050)
        tilt_db = generator.uniform(-6, 6) * np.log2(np.maximum(frequency, 60) / 1000) / 2
        for _ in range(3):  # resonances of rooms and loudspeakers
            middle, octaves = (
                generator.uniform(np.log2(150), np.log2(6000)),
                generator.uniform(0.3, 1),
            )
            away = np.log2(np.maximum(frequency, 60)) - middle
            tilt_db = tilt_db + generator.uniform(-7, 7) * np.exp(-((away / octaves) ** 2))
        high = np.exp(generator.uniform(np.log(3000), np.log(11_000)))
        low = generator.uniform(20, 200)
        band = 1 / (1 + (frequency / high) ** 8) / (1 + (low / np.maximum(frequency, 1)) ** 4)
        pcm = np.fft.irfft(spectrum * 10 ** (tilt_db / 20) * band, len(pcm)).astype(np.float32)
    if generator.random() < 0.3:
        delay = int(generator.uniform(0.01, 0.05) * 22_050)
        echo = np.zeros_like(pcm)
        echo[delay:] = pcm[:-delay]
        pcm = pcm + np.float32(generator.uniform(0.1, 0.35)) * echo
    level = np.sqrt(np.mean(pcm**2)) + 1e-4
    noise = generator.standard_normal(len(pcm)).astype(np.float32)
    if generator.random() < 0.5:  # brown-ish: most rooms hum more than they hiss
        noise = np.convolve(noise, np.ones(12) / 3.5, mode="same").astype(np.float32)
    return pcm + noise * np.float32(level * 10 ** generator.uniform(-3.5, -1.1))


@dataclass(frozen=True)
class Clips:
    """Many clips of one length: people [N], prompts [N, blocks], speech [N, 640 * T], motion
    [N, T, 12]."""

    people: np.ndarray
    prompts: np.ndarray
    speech: FloatArray
    motion: FloatArray

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> Clip:
        return Clip(
            int(self.people[index]),
            tuple(int(p) for p in self.prompts[index]),
            self.speech[index],
            self.motion[index],
        )

    def save(self, path: Path) -> None:
        """One .npz; speech as 16 bits with a scale of its own for each clip."""
        peak = np.abs(self.speech).max(axis=1, keepdims=True) + 1e-9
        np.savez(
            path,
            people=self.people,
            prompts=self.prompts,
            speech=np.round(self.speech / peak * 32767).astype(np.int16),
            peak=peak,
            motion=self.motion,
        )

    def with_more(self, other: Clips) -> Clips:
        """These and others of the same length."""
        return Clips(
            np.concatenate([self.people, other.people]),
            np.concatenate([self.prompts, other.prompts]),
            np.concatenate([self.speech, other.speech]),
            np.concatenate([self.motion, other.motion]),
        )

    @classmethod
    def load(cls, path: Path) -> Clips:
        """What `save` wrote."""
        with np.load(path) as stored:
            speech = stored["speech"].astype(np.float32) * stored["peak"] / 32767
            return cls(
                stored["people"], stored["prompts"], speech.astype(np.float32), stored["motion"]
            )


def make_clips(
    first_seed: int,
    count: int,
    frames: int,
    people: int,
    flite: float = 0.0,
    recorded: Sequence[Person] = (),
) -> Clips:
    """Clips `first_seed` to `first_seed + count - 1`, see `make_clip`."""
    clips = [make_clip(first_seed + i, frames, people, flite, recorded) for i in range(count)]
    return Clips(
        np.array([clip.person for clip in clips]),
        np.array([clip.prompts for clip in clips]),
        np.stack([clip.speech for clip in clips]),
        np.stack([clip.motion for clip in clips]),
    )


__all__ = [
    "COLUMNS",
    "ENCODER_RATE_HZ",
    "FEATURES_PER_S",
    "HELD_OUT",
    "Clip",
    "Clips",
    "heard",
    "make_clip",
    "make_clips",
]
