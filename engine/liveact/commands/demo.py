"""`liveact demo`: the small trained model that comes along, a portrait and speech to a film.

In an installed package the three lie in `liveact/bundle`, in a checkout in `examples`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import liveact
from liveact.commands import cli
from liveact.commands.generate import make_film
from liveact.errors import InputError

MODEL, PORTRAIT, SPEECH = "talker", "portrait.png", "speech.wav"
SIZE = "128x128"  # what the model was trained for


def run(options: argparse.Namespace) -> None:
    """Makes the film: what `liveact generate` would, with the bundled model."""
    bundle = bundle_directory()
    given = {
        "checkpoint": bundle / MODEL,
        "image": options.portrait or bundle / PORTRAIT,
        "audio": options.speech or bundle / SPEECH,
        "prompt": options.prompt,
        "size": SIZE,
        "out": options.out,
    }
    # With "=", so that a name may begin with a dash.
    film = cli.parser().parse_args(
        ["generate", *(f"--{name}={value}" for name, value in given.items())]
    )
    # The speech encoder was trained on what a live session hears, not on whole clips.
    make_film(film, "stream")


def bundle_directory() -> Path:
    """Where the model, its portrait and its speech are. Raises InputError."""
    package = Path(liveact.__file__).resolve().parent
    candidates = (package / "bundle", package.parent.parent / "examples")
    for directory in candidates:
        if (directory / MODEL).is_dir():
            return directory
    raise InputError(f"demo: expected a model in {candidates[0]}, found none in this installation")
