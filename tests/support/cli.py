"""The command line, called in this process; fixtures and checks that its tests share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from liveact.commands import cli
from tests.support.paths import PORTRAIT
from tests.support.pipeline import demo_checkpoint, speech, write_wav

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.0 s: one block at 20 fps."""
    return write_wav(tmp_path_factory.mktemp("audio") / "speech.wav", speech(1.0))


def generate(wav: Path, directory: Path, **changes: object) -> list[str]:
    """Arguments of `generate`; a change to None leaves an option out."""
    options: dict[str, object] = {
        "checkpoint": demo_checkpoint(),
        "image": PORTRAIT,
        "audio": wav,
        "prompt": "A person is speaking.",
        "size": "32x32",
        "out": directory / "video.mp4",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    # With "=", so that a value may begin with a dash.
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["generate", *given]


def refused(answer: tuple[int, str, str], *expected: str) -> None:
    """Exit code 2 and exactly one line, which has each of `expected` (regular expressions)."""
    code, _, errors = answer
    assert code == 2, (code, errors)
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("liveact: "), errors
    for pattern in expected:
        assert re.search(pattern, errors), f"{pattern!r} not in {errors!r}"
