"""CMU Flite through its command line: voices made of recorded people, with phoneme times.

A network that only ever heard espeak-ng, whose sounds are calculated, is lost with people: these
voices are between the two. The program is the Debian package `flite`; it is asked for explicitly.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liveact.errors import InputError
from liveact.media.sound import open_audio
from training.data.espeak import Phoneme, Utterance

SPEAKERS = ("awb", "rms", "slt", "kal16")

# Names of the CMU dictionary, and of flite's reduced vowels, in IPA.
ARPABET = {
    **{"aa": "ɑ", "ae": "æ", "ah": "ʌ", "ao": "ɔ", "aw": "aʊ", "ax": "ə", "ay": "aɪ"},
    **{"b": "b", "ch": "ʃ", "d": "d", "dh": "ð", "eh": "ɛ", "er": "ɜ", "ey": "eɪ", "f": "f"},
    **{"g": "g", "hh": "h", "ih": "ɪ", "iy": "i", "jh": "ʒ", "k": "k", "l": "l", "m": "m"},
    **{"n": "n", "ng": "ŋ", "ow": "oʊ", "oy": "ɔɪ", "p": "p", "r": "r", "s": "s", "sh": "ʃ"},
    **{"t": "t", "th": "θ", "uh": "ʊ", "uw": "u", "v": "v", "w": "w", "y": "j", "z": "z"},
    **{"zh": "ʒ", "pau": ""},
}


@dataclass(frozen=True)
class Speaker:
    """name: one of `SPEAKERS`. stretch: of the durations. pitch_hz: the mean."""

    name: str
    stretch: float = 1.0
    pitch_hz: float = 120.0


def synthesise_flite(text: str, speaker: Speaker) -> Utterance:
    """Speaks an English text. Raises InputError where there is no flite or it fails."""
    program = shutil.which("flite")
    if program is None:
        raise InputError("flite: expected it on the PATH (Debian package flite), found none")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "said.wav"
        done = subprocess.run(
            [
                *(program, "-voice", speaker.name, "-psdur", "-t", text, "-o", str(out)),
                *("--setf", f"duration_stretch={speaker.stretch}"),
                *("--setf", f"int_f0_target_mean={speaker.pitch_hz}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not out.exists():
            raise InputError(f"flite: expected speech, found exit code {done.returncode}")
        sound = open_audio(out)
        samples = np.concatenate(list(sound))[:, 0]
    phonemes, start_s = [], 0.0
    for entry in done.stdout.split():  # "m:0.271": the phoneme and where it ends
        name, _, stop = entry.partition(":")
        phonemes.append(Phoneme(ARPABET[name], start_s, float(stop)))
        start_s = float(stop)
    return Utterance(samples, sound.sample_rate_hz, tuple(phonemes))
