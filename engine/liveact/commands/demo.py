"""`liveact demo`: the small trained model that comes along, a portrait and speech to a film.

In an installed package the three lie in `liveact/bundle`, in a checkout in `examples`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import liveact
from liveact.commands.generate import make_film
from liveact.errors import InputError

MODEL, PORTRAIT, SPEECH = "talker", "portrait.png", "speech.wav"
SIZE = "128x128"  # what the model was trained for


def run(options: argparse.Namespace) -> None:
    """Makes the film: what `liveact generate` would, with the bundled model."""
    bundle = bundle_directory()
    film = argparse.Namespace(
        checkpoint=bundle / MODEL,
        wav2vec=None,
        image=options.portrait or bundle / PORTRAIT,
        audio=options.speech or bundle / SPEECH,
        prompt=options.prompt,
        edit=[],
        size=SIZE,
        fps=20.0,
        seed=42,
        memory="sequential",
        audio_guidance=1.0,
        sampler="renoise",
        slots="2/2/2/8",
        device=None,
        vae_device=None,
        precision=None,
        vae_decode="streaming",
        trace=None,
        out=options.out,
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
