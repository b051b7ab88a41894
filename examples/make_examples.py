"""Makes the two example inputs beside this file: portrait.png (drawn) and speech.wav (spoken).

Both are committed; run this only to change them: python -m examples.make_examples. The portrait is
a member of the family that the model in `talker` was trained on.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr

from training.data.espeak import Voice, synthesise
from training.stages import write_portrait

HERE = Path(__file__).resolve().parent
PERSON = 13
SIZE = 768  # pixels of the portrait
RATE_HZ = 44_100
SENTENCE = (
    "Hello! I am only a drawing. "
    "Give the engine a picture and a recording, and it makes me talk for as long as you like."
)
VOICE = Voice("en-us+f3", rate=172)


def speak() -> npt.NDArray[np.int16]:
    """The sentence as stereo [n, 2] at 44.1 kHz, slightly different left and right."""
    said = synthesise(SENTENCE, VOICE)
    voice = soxr.resample(said.samples, said.sample_rate_hz, RATE_HZ)
    pause = np.zeros(RATE_HZ // 4, np.float32)
    voice = np.concatenate([pause, voice / np.abs(voice).max() * 0.7, pause])
    # As two microphones 10 cm apart hear it: 0.3 ms later and a little weaker on the right.
    delay = round(0.0003 * RATE_HZ)
    right = np.concatenate([np.zeros(delay, np.float32), voice[:-delay]]) * 0.85
    stereo = np.stack([voice, right], axis=1) * 32_767
    return stereo.round().astype(np.int16)


def write_wav(path: Path, samples: npt.NDArray[np.int16]) -> None:
    """16 bits, [n, channels]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(samples.tobytes())


def main() -> None:
    """Writes both."""
    write_portrait(PERSON, HERE / "portrait.png", SIZE)
    samples = speak()
    write_wav(HERE / "speech.wav", samples)
    print(f"portrait.png: {SIZE}×{SIZE}; speech.wav: {len(samples) / RATE_HZ:.1f} s")


if __name__ == "__main__":
    main()
