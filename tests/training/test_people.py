"""Recordings with their texts: phonemes found in the sound, and clips made of them."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from liveact.errors import InputError
from training.data.clips import make_clips
from training.data.espeak import Utterance, Voice, synthesise
from training.data.motion import COLUMNS
from training.data.people import RATE_HZ, TEXTS_FILE, Person, pronounced, read_people
from training.data.visemes import LIPS_TOGETHER

pytestmark = pytest.mark.slow

SAID = {
    "plums": "My brother and I pick plums and pears",
    "bus": "Maybe the bumpy bus will be back by March",
}
VOICE = Voice("en-us+f2", rate=140)
LATE_S = 0.05  # a frame; alignment has steps of 10 ms and an acoustic model of people


def write_wav(path: Path, said: Utterance) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(said.sample_rate_hz)
        file.writeframes((said.samples * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A speaker with two sentences, a note, a text without a sound and one of something else."""
    home = tmp_path_factory.mktemp("recordings") / "en-us_machine"
    home.mkdir()
    for name, text in SAID.items():
        write_wav(home / f"{name}.wav", synthesise(text, VOICE))
    write_wav(home / "short.wav", synthesise("No", VOICE))
    texts = [f"{name}: {text}." for name, text in SAID.items()]
    texts += ["bus: [a bus goes by]", "missing: Nothing.", f"short: {' '.join(SAID.values())}."]
    (home / TEXTS_FILE).write_text("\ufeff" + "\n".join(texts) + "\n", encoding="utf-8")
    return home.parent


@pytest.fixture(scope="module")
def person(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Person:
    (found,) = read_people(folder, tmp_path_factory.mktemp("aligned"))
    return found


def lips(said: Utterance) -> list[float]:
    """The middles of all p, b and m."""
    return [
        (p.start_s + p.stop_s) / 2
        for p in said.phonemes
        if p.symbol and p.symbol[0] in LIPS_TOGETHER
    ]


def test_words_of_several_languages() -> None:
    assert pronounced("choice", "en-us") == ["tʃ", "ɔɪ", "s"]
    assert pronounced("extendida", "es-419")[-4:] == ["d", "i", "ð", "a"]
    assert pronounced("вызовов", "ru")[:2] == ["v", "ɨ"]
    assert pronounced("...", "en-us") == []


def test_closed_lips_are_where_the_synthesiser_put_them(person: Person) -> None:
    assert (person.name, person.language) == ("en-us_machine", "en-us")
    assert len(person.said) == len(SAID)  # neither the note nor what does not fit
    for found, text in zip(person.said, SAID.values(), strict=True):
        true = synthesise(text, VOICE)
        assert found.sample_rate_hz == RATE_HZ
        assert found.seconds == pytest.approx(true.seconds, abs=0.01)
        apart = np.abs(np.subtract.outer(lips(true), lips(found))).min(1)
        assert len(apart) >= 5 and np.median(apart) < LATE_S, apart
        stops = [p.stop_s for p in found.phonemes]
        assert [p.start_s for p in found.phonemes] == pytest.approx([0.0, *stops[:-1]])
        assert stops[-1] == pytest.approx(found.seconds)


def test_what_was_found_is_read_the_next_time(folder: Path, tmp_path: Path) -> None:
    read_people(folder, tmp_path)
    kept = tmp_path / "en-us_machine.json"
    kept.write_text('{"plums.wav": [["p", 0.0, 0.5]]}')
    (again,) = read_people(folder, tmp_path)
    assert [p.symbol for u in again.said for p in u.phonemes] == ["p"]


def test_clips_of_a_recorded_person(person: Person) -> None:
    clips = make_clips(7, 2, 40, people=2, recorded=(person,))
    other = make_clips(7, 2, 40, people=2)
    assert not np.array_equal(clips.speech, other.speech)
    opening = clips.motion[:, :, COLUMNS.index("opening")]
    assert opening.max() > 0.3
    assert len(clips.with_more(other)) == 4


def test_folders_that_are_no_recordings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder per speaker, found none"):
        read_people(tmp_path, tmp_path.with_suffix(".kept"))
    home = tmp_path / "speakers" / "en-us_nobody"
    home.mkdir(parents=True)
    with pytest.raises(InputError, match=r"expected texts\.txt, found none"):
        read_people(home.parent, tmp_path / "kept")
    (home / TEXTS_FILE).write_text("one: One.\n")
    with pytest.raises(InputError, match="expected sounds that fit their texts, found none"):
        read_people(home.parent, tmp_path / "kept")
    wrong = tmp_path / "more" / "xx-none_nobody"
    wrong.mkdir(parents=True)
    write_wav(wrong / "one.wav", synthesise("One two three", VOICE))
    (wrong / TEXTS_FILE).write_text("one: One two three.\n")
    with pytest.raises(ValueError, match="expected one of espeak-ng, found 'xx-none'"):
        read_people(wrong.parent, tmp_path / "kept")
