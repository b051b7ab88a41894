"""The quality of films: each measure on films whose quality is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import quality, quality_drift, quality_rows
from benchmarks.quality_drift import Windows, contrast, student_95, trend
from training.data.identity import identity
from training.data.motion import FPS, motion_of
from training.data.portrait import draw
from training.films import joined

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_seam_is_told() -> None:
    """Frames that differ by 0.01, and by 0.05 where a block starts."""
    steps = torch.full((63,), 0.01)
    steps[[20, 52]] = 0.05
    films = torch.cat([torch.zeros(1), steps.cumsum(0)]).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    assert quality_rows.jump(films, [21, 53, 85]) == pytest.approx(5, rel=1e-4)


def test_a_seam_is_not_what_lies_between_any_two_latents() -> None:
    """Frames that differ by 0.01, and by 0.02 where a latent frame starts: 1, 5, 9 and so on."""
    steps = torch.full((64,), 0.01)
    steps[::4] = 0.02
    films = torch.cat([torch.zeros(1), steps.cumsum(0)]).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    assert quality_rows.jump(films, [21, 53], among=4) == pytest.approx(1, rel=1e-4)
    assert quality_rows.jump(films, [21, 53]) > 1.5


def test_slopes_and_their_intervals() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(200, 60))
    inside = 0
    for row in noise:
        slope, interval = trend(list(row))
        inside += abs(slope) <= interval
    # 190 of 200 are expected; five deviations of the binomial are 15.
    assert 175 <= inside < 200
    slope, interval = trend(list(noise[0] + 0.5 * np.arange(60)))
    assert slope == pytest.approx(0.5, abs=0.03) and interval < 0.03
    assert trend([1.0, 2.0]) == (0.0, float("inf"))


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (10, 2.228), (118, 1.980)])
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert student_95(freedom) == pytest.approx(quantile, rel=0.01)


def test_contrast_is_what_is_left_of_a_pattern() -> None:
    pattern = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert contrast(0.25 * pattern + 0.3, pattern) == pytest.approx(0.25, rel=1e-4)


def test_people_and_voices_are_paired_in_all_ways() -> None:
    pairs = {(person, voice) for person, _, voice in quality_rows.cases(16)}
    assert len(pairs) == 16


def test_a_recording_comes_with_its_phonemes() -> None:
    said = quality_rows.recording()
    assert said.seconds == pytest.approx(10.39, abs=0.01)
    assert said.phonemes[-1].stop_s == pytest.approx(said.seconds, abs=0.01)
    level = {
        spoken: np.mean(
            [
                np.square(said.samples[int(16_000 * p.start_s) : int(16_000 * p.stop_s)]).mean()
                for p in said.phonemes
                if bool(p.symbol) == spoken
            ]
        )
        for spoken in (True, False)
    }
    assert level[False] < 0.05 * level[True]


@pytest.mark.slow
def test_a_drawn_film_does_not_drift_and_one_that_fades_does() -> None:
    said = joined(quality_drift.speech(130, 0))
    frames = int(said.seconds * FPS)
    motion = torch.from_numpy(motion_of(said.phonemes, frames).values)
    drawn, fading = Windows(13, motion), Windows(13, motion)
    for first in range(0, frames, 100):
        pictures = draw(identity(13), motion[first : first + 100])
        drawn.take(pictures)
        share = torch.arange(first, first + len(pictures)).view(-1, 1, 1, 1) / frames
        fading.take(pictures * (1 - 0.5 * share))
    found = {line["value"]: line for line in drawn.lines()}
    assert found["correlation"]["last_minute"] > 0.97 and found["shirt"]["windows"] == 4
    assert found["shirt"]["last_minute"] == pytest.approx(1, abs=1e-3)
    assert found["g_of_255"]["trend"] == "none"
    found = {line["value"]: line for line in fading.lines()}
    assert found["shirt"]["trend"] == found["g_of_255"]["trend"] == "TREND"


def test_rows_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["quality", "--rows", "sync,looks"])
    assert "expected some of autoencoder, sync, " in capsys.readouterr().err
    assert command.main(["quality", "--checkpoint", "/nowhere"]) == 2
    assert "expected a checkpoint, found no config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_are_measured_with_the_model_that_ships(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    names = "autoencoder,silence,recorded"
    given = ["--device", "cpu", "--rows", names, "--films", "1", "--json", str(out)]
    assert command.main(["quality", *given]) == 0
    rows = json.loads(out.read_text())["rows"]
    drawn = rows["autoencoder"][0]
    assert drawn["psnr_db"] > 29 and drawn["correlation"] > 0.8  # the first of docs/training.md's
    assert [line["sound"] for line in rows["silence"]] == ["zero", "room"]
    assert all(line["closed"] > 0.9 for line in rows["silence"])
    assert 0 < rows["recorded"][0]["correlation"] <= 1
    printed = " ".join(capsys.readouterr().out.split())  # a narrow terminal breaks the lines
    assert quality.ROWS["silence"] in printed
