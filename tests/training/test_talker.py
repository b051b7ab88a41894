"""The model that comes along: small, and a mouth that follows the speech."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

import liveact
from benchmarks.quality_rows import long_case
from liveact.commands import demo
from liveact.dit.weights import open_weights
from liveact.errors import InputError
from tests.support.cli import Run
from tests.support.paths import REPOSITORY
from training.data.identity import identity
from training.films import TEXTS, VOICES, film, spoken
from training.measure import mouth_openings, synchronisation

TALKER = REPOSITORY / "examples" / "talker"


def test_the_bundle_is_small() -> None:
    assert demo.bundle_directory() == REPOSITORY / "examples"
    assert sum(f.stat().st_size for f in TALKER.rglob("*") if f.is_file()) <= 25e6


def test_an_installation_without_a_model_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(liveact, "__file__", str(tmp_path / "a" / "liveact" / "__init__.py"))
    with pytest.raises(InputError, match=r"demo: expected a model in .*bundle, found none"):
        demo.bundle_directory()


@pytest.mark.slow
def test_the_demo_makes_a_film_of_its_speech(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "talk.mp4"
    code, _, errors = run("demo", "--out", out)
    assert (code, errors) == (0, "")
    with av.open(str(out)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        frames = sum(1 for _ in container.decode(video))
        assert (video.width, video.height) == (128, 128)
        assert frames / 20 == pytest.approx(
            float((sound.duration or 0) * (sound.time_base or 0)), abs=0.1
        )


@pytest.mark.slow
def test_the_mouth_follows_a_voice_that_nobody_trained_on() -> None:
    with liveact.Engine.load(TALKER, device="cpu") as engine:
        made = film(engine, 13, spoken(VOICES[0], TEXTS[0]))
    found = synchronisation(mouth_openings(identity(13), made.pictures), made.motion)
    assert found.correlation > 0.5 and abs(found.lag) <= 1


def test_the_memory_cannot_grow() -> None:
    """It is compressed once a block, a part of it from itself, for hours."""
    config, tensors = open_weights(TALKER)
    names = [name for name in tensors if "memory_proj" in name]
    assert len(names) == 2 * config.num_layers
    for name in names:
        assert tensors[name].double().abs().sum(dim=-1).max() <= 1


@pytest.mark.slow
def test_the_mouth_still_follows_after_a_while() -> None:
    """The end of 16 s: ten blocks, where the trainer's clips have five."""
    person, said = long_case(0)
    with liveact.Engine.load(TALKER, device="cpu") as engine:
        made = film(engine, person, said)
    openings = mouth_openings(identity(person), made.pictures)
    late = slice(len(openings) * 3 // 5, None)
    found = synchronisation(openings[late], made.motion[late])
    assert found.correlation > 0.7 and abs(found.lag) <= 1
