"""libespeak-ng through ctypes: text to speech with the time of every phoneme.

The PyPI package `espeakng-loader` bundles the library and its data, so nothing has to be installed
on the machine. The library has one global state: a process synthesises one text at a time.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import espeakng_loader
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

# Of speak_lib.h, version 12.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS_IPA = 0x0001 | 0x0002
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_PHONEMES_IPA = 2
_POSITION_CHARACTER = 1
_EVENT_LIST_TERMINATED = 0
_EVENT_PHONEME = 7
_PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("string", ctypes.c_char * 8),  # the member of the union that a phoneme event has
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class Voice:
    """How a text is spoken.

    language: a voice of espeak-ng with an optional variant, for example "en-us+f3". rate: words per
    minute, 80 to 450. pitch, pitch_range: 0 to 99.
    """

    language: str = "en-us"
    rate: int = 170
    pitch: int = 50
    pitch_range: int = 50


@dataclass(frozen=True)
class Phoneme:
    """One sound: its IPA symbol (empty for a pause) and when it starts and stops, in seconds."""

    symbol: str
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class Utterance:
    """samples [n] float32 in [-1, 1] at `sample_rate_hz`; phonemes cover all of it in order."""

    samples: FloatArray
    sample_rate_hz: int
    phonemes: tuple[Phoneme, ...]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.sample_rate_hz


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The library, initialised, and its sample rate."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    options = _INITIALIZE_PHONEME_EVENTS_IPA | _INITIALIZE_DONT_EXIT
    rate_hz = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, options)
    if rate_hz <= 0:
        raise OSError(f"espeak-ng: expected its data in {data.decode()}, found error {rate_hz}")
    return library, rate_hz


def synthesise(text: str, voice: Voice) -> Utterance:
    """Speaks a text.

    Raises:
        ValueError: the voice does not exist, or nothing was spoken.
    """
    library, rate_hz = _library()
    pieces: list[FloatArray] = []
    events: list[tuple[int, str]] = []  # first sample, symbol

    def collect(samples: object, count: int, event: object) -> int:
        if samples:
            piece = np.ctypeslib.as_array(samples, (count,)) if count else np.zeros(0, np.int16)
            pieces.append(piece.astype(np.float32) / np.float32(32768))
        index = 0
        while event[index].type != _EVENT_LIST_TERMINATED:  # type: ignore[index]
            if event[index].type == _EVENT_PHONEME:  # type: ignore[index]
                entry = event[index]  # type: ignore[index]
                events.append((entry.sample, entry.string.decode("utf-8", "ignore")))
            index += 1
        return 0

    callback = _Callback(collect)
    _choose(library, voice.language)
    for name, value in (
        ("rate", voice.rate),
        ("pitch", voice.pitch),
        ("range", voice.pitch_range),
    ):
        library.espeak_SetParameter(_PARAMETERS[name], value, 0)
    library.espeak_SetSynthCallback(callback)
    encoded = text.encode()
    library.espeak_Synth(
        encoded, len(encoded) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
    )
    library.espeak_Synchronize()
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not len(samples) or not any(_bare(symbol) for _, symbol in events):
        raise ValueError(f"text: expected something to speak, found {text!r:.60}")
    return Utterance(samples, rate_hz, _phonemes(events, len(samples), rate_hz))


def transcribed(word: str, language: str) -> str:
    """How a word is spoken, in IPA with stress marks; empty for what is not spoken. Raises
    ValueError for a voice that does not exist."""
    library, _ = _library()
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    _choose(library, language)
    text = ctypes.c_char_p(word.encode())
    ipa = library.espeak_TextToPhonemes(ctypes.byref(text), _CHARS_UTF8, _PHONEMES_IPA)
    return (ipa or b"").decode()


def _choose(library: ctypes.CDLL, language: str) -> None:
    if library.espeak_SetVoiceByName(language.encode()):
        raise ValueError(f"voice: expected one of espeak-ng, found {language!r}")


def _phonemes(events: list[tuple[int, str]], end: int, rate_hz: int) -> tuple[Phoneme, ...]:
    """Events with the sample they begin at -> phonemes that last until the next one begins."""
    events = sorted(events, key=lambda event: event[0])
    starts = [0, *(min(max(start, 0), end) for start, _ in events), end]
    symbols = ["", *(_bare(symbol) for _, symbol in events)]
    return tuple(
        Phoneme(symbol, start / rate_hz, stop / rate_hz)
        for symbol, start, stop in zip(symbols, starts[:-1], starts[1:], strict=True)
        if stop > start
    )


def _bare(symbol: str) -> str:
    """Without the marks of stress, length and pauses."""
    return "".join(c for c in symbol if c not in "ˈˌː_:|ˑ.͡-‿'")
