"""Recordings of people with their texts, and the time of every phoneme in them.

Synthetic voices do not teach an encoder what people do. Whoever has recordings and what is said in
them can add them: espeak-ng tells the phonemes of each word, and pocketsphinx finds them in the
sound (forced alignment with its English acoustic model, which the phonemes of other languages are
mapped to). A hand would place some phonemes elsewhere, by some 20 ms.

A folder per speaker, named after the voice of espeak-ng that reads the language: `en-us_allison`.
In it sounds and `texts.txt`, with a line for each: `file without suffix: what is said`.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from liveact.errors import InputError
from liveact.files import write_json
from liveact.media.sound import open_audio
from training.data.espeak import FloatArray, Phoneme, Utterance, transcribed

TEXTS_FILE = "texts.txt"
SUFFIXES = (".g722", ".wav", ".flac")
RATE_HZ = 16_000  # of the acoustic model
LONGEST_PHONE_S = 0.6  # longer ones are of a text that does not fit
_FRAMES_PER_S = 100  # of an alignment

# IPA -> the phones of the acoustic model; two characters are looked for first.
_PHONES: dict[str, str] = {
    **{"tʃ": "CH", "dʒ": "JH", "aɪ": "AY", "aʊ": "AW", "eɪ": "EY", "oʊ": "OW", "əʊ": "OW"},
    **{"ɔɪ": "OY", "p": "P", "b": "B", "β": "B", "t": "T", "d": "D", "k": "K", "q": "K"},
    **{"ɡ": "G", "g": "G", "ɣ": "G", "m": "M", "ɱ": "M", "n": "N", "ɲ": "N", "ŋ": "NG"},
    **{"f": "F", "v": "V", "θ": "TH", "ð": "DH", "s": "S", "z": "Z", "ʃ": "SH", "ɕ": "SH"},
    **{"ʒ": "ZH", "ʑ": "ZH", "ç": "HH", "x": "HH", "χ": "HH", "h": "HH", "ɦ": "HH", "ʁ": "R"},
    **{"r": "R", "ɹ": "R", "ɾ": "R", "l": "L", "ɫ": "L", "ʎ": "L", "w": "W", "ʍ": "W"},
    **{"ɥ": "W", "j": "Y", "i": "IY", "ɪ": "IH", "ɨ": "IH", "y": "UW", "e": "EH", "ɛ": "EH"},
    **{"æ": "AE", "a": "AA", "ɐ": "AH", "ɑ": "AA", "ʌ": "AH", "ə": "AH", "ɜ": "ER", "ɚ": "ER"},
    **{"ɤ": "AH", "ø": "ER", "œ": "ER", "o": "OW", "ɔ": "AO", "ɒ": "AA", "u": "UW", "ʊ": "UH"},
    **{"ɯ": "UW"},
}


@dataclass(frozen=True)
class Person:
    """What somebody said. language: a voice of espeak-ng."""

    name: str
    language: str
    said: tuple[Utterance, ...]


def pronounced(word: str, language: str) -> list[str]:
    """The IPA symbols of a word, those that the acoustic model knows; a diphthong is one."""
    ipa = transcribed(word, language)
    if language == "ru":
        ipa = ipa.replace("y", "ɨ")  # espeak-ng's name of the vowel in it
    symbols = []
    while ipa:
        found = ipa[:2] if ipa[:2] in _PHONES else ipa[:1]
        if found in _PHONES:
            symbols.append(found)
        ipa = ipa[len(found) :]
    return symbols


class Aligner:
    """Finds phonemes in 16 kHz sound. Not thread-safe.

    Raises InputError where there is no pocketsphinx.
    """

    def __init__(self) -> None:
        try:
            import pocketsphinx
        except ImportError:
            raise InputError("pocketsphinx: expected the package, found none") from None
        self._decoder: Any = pocketsphinx.Decoder(lm=None, loglevel="FATAL")

    def align(self, samples: FloatArray, text: str, language: str) -> tuple[Phoneme, ...] | None:
        """Samples [n] at 16 kHz of a text -> its phonemes, which cover all of it in order; None
        where the two do not fit."""
        pronunciations = [pronounced(word, language) for word in text.split()]
        words = [symbols for symbols in pronunciations if symbols]
        if not words or len(samples) < RATE_HZ // 10:
            return None
        raw = (samples.clip(-1, 1) * 32767).astype(np.int16).tobytes()
        self._decoder.set_align_text(" ".join(self._name(symbols) for symbols in words))
        try:
            self._run(raw)
            self._decoder.set_alignment()  # of phones in the words that were found
            self._run(raw)
        except RuntimeError:  # how the decoder says that it found no way through
            return None
        return _phonemes(self._decoder.get_alignment(), words, len(samples) / RATE_HZ)

    def _name(self, symbols: list[str]) -> str:
        """What the decoder calls a word: how it is pronounced."""
        phones = [_PHONES[symbol] for symbol in symbols]
        name = "-".join(phones)
        if self._decoder.lookup_word(name) is None:
            self._decoder.add_word(name, " ".join(phones), True)
        return name

    def _run(self, raw: bytes) -> None:
        self._decoder.start_utt()
        self._decoder.process_raw(raw, full_utt=True)
        self._decoder.end_utt()


def _phonemes(alignment: Any, words: list[list[str]], seconds: float) -> tuple[Phoneme, ...] | None:
    """Words with their phones, and silences -> phonemes without a gap; None if words are missing or
    a phone is longer than people speak one."""
    found: list[Phoneme] = []
    left = iter(words)
    for word in alignment:
        phones = list(word)
        symbols = [""] * len(phones) if word.name.startswith("<") else next(left, [])
        if len(symbols) != len(phones):
            return None
        for symbol, phone in zip(symbols, phones, strict=True):
            start_s = phone.start / _FRAMES_PER_S
            stop_s = start_s + phone.duration / _FRAMES_PER_S
            if symbol and stop_s - start_s > LONGEST_PHONE_S:
                return None
            found.append(Phoneme(symbol, start_s, stop_s))
    if next(left, None) is not None:
        return None
    found.append(Phoneme("", found[-1].stop_s, max(seconds, found[-1].stop_s)))
    return tuple(found)


def read_people(folder: Path, keep: Path) -> tuple[Person, ...]:
    """The speakers in a folder. keep: where their phonemes are written, and read the next time.

    Raises InputError where a speaker has no texts, or none that fits its sounds.
    """
    keep.mkdir(parents=True, exist_ok=True)
    people = [_person(home, keep) for home in sorted(folder.iterdir()) if home.is_dir()]
    if not people:
        raise InputError(f"{folder}: expected a folder per speaker, found none")
    return tuple(people)


def _person(home: Path, keep: Path) -> Person:
    language = home.name.partition("_")[0]
    texts = home / TEXTS_FILE
    if not texts.exists():
        raise InputError(f"{home}: expected {TEXTS_FILE}, found none")
    kept = keep / f"{home.name}.json"
    if not kept.exists():
        aligned = _align_all(home, texts.read_text("utf-8-sig"), language)
        write_json(kept, {n: [astuple(p) for p in phonemes] for n, phonemes in aligned.items()})
    said = [
        Utterance(_sound(home / name), RATE_HZ, tuple(Phoneme(*each) for each in phonemes))
        for name, phonemes in json.loads(kept.read_text()).items()
    ]
    if not said:
        raise InputError(f"{home}: expected sounds that fit their texts, found none")
    return Person(home.name, language, tuple(said))


def _align_all(home: Path, texts: str, language: str) -> dict[str, tuple[Phoneme, ...]]:
    """By the sound's file; those that do not fit their texts are left out."""
    aligner = Aligner()
    found = {}
    for line in texts.splitlines():
        name, _, text = line.partition(":")
        files = [home / f"{name.strip()}{suffix}" for suffix in SUFFIXES]
        file = next((file for file in files if file.exists()), None)
        if file is None or not text.strip() or "[" in text:  # a note, and not what is said
            continue
        phonemes = aligner.align(_sound(file), text, language)
        if phonemes is not None:
            found[file.relative_to(home).as_posix()] = phonemes
    return found


def _sound(file: Path) -> FloatArray:
    """Mono, at 16 kHz."""
    sound = open_audio(file)
    samples = np.concatenate(list(sound)).mean(1, dtype=np.float32)
    if sound.sample_rate_hz == RATE_HZ:
        return samples
    return soxr.resample(samples, sound.sample_rate_hz, RATE_HZ).astype(np.float32)
