"""All files of a checkpoint, opened and checked before anything of them is loaded.

A file that is missing, damaged or of another model is found here, by names, shapes and dtypes, in
the time that the headers take. Weights are mapped, not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from liveact import _core
from liveact.checkpoint.layout import VAE_FILE, WAV2VEC_DIRECTORY
from liveact.checkpoint.tensors import PthTensors, Tensors, TensorSource, load_pth
from liveact.dit.weights import open_weights
from liveact.encoders import portrait, prompt, speech
from liveact.encoders.portrait import ImageWeights, open_image
from liveact.encoders.prompt import TextWeights, open_text
from liveact.encoders.speech import AudioWeights, open_audio_encoder
from liveact.errors import InputError
from liveact.vae.vae import Vae


@dataclass(frozen=True)
class OpenedCheckpoint:
    """What `open_checkpoint` found; vae: without weights yet."""

    dit_config: _core.ModelConfig
    dit: Tensors
    vae: Vae
    vae_tensors: PthTensors
    text: TextWeights
    image: ImageWeights
    audio: AudioWeights

    def parameters(self) -> dict[str, int]:
        """Component → how many numbers it has that are used."""
        shapes: dict[str, Mapping[str, Sequence[int]]] = {
            "DiT": _core.expected_tensors(self.dit_config),
            "text encoder": prompt.shapes(self.text.sizes),
            "image encoder": portrait.shapes(self.image.sizes),
            "audio encoder": speech.shapes(self.audio.sizes),
        }
        counts = {what: sum(math.prod(s) for s in found.values()) for what, found in shapes.items()}
        return counts | {"VAE": self.vae.parameter_count}

    def files(self) -> dict[str, set[Path]]:
        """Component → the files that its weights are in."""
        sources: dict[str, TensorSource] = {
            "DiT": self.dit,
            "VAE": self.vae_tensors,
            "text encoder": self.text.tensors,
            "image encoder": self.image.tensors,
            "audio encoder": self.audio.tensors,
        }
        return {what: {found.file_of(n) for n in found} for what, found in sources.items()}


def open_checkpoint(directory: Path, wav2vec: str | Path | None = None) -> OpenedCheckpoint:
    """Opens everything that a session needs; loads nothing.

    wav2vec: the audio encoder's directory; None: the one in the checkpoint. Raises InputError at
    the first thing that is missing or wrong.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a checkpoint directory, found none")
    config, dit = open_weights(directory)
    vae_tensors = load_pth(directory / VAE_FILE)
    text = open_text(directory)
    if text.tokenizer is None:
        raise InputError(
            f"{text.tokenizer_directory}: expected the directory of the tokenizer, found nothing"
        )
    opened = OpenedCheckpoint(
        dit_config=config,
        dit=dit,
        vae=Vae.outline(vae_tensors),
        vae_tensors=vae_tensors,
        text=text,
        image=open_image(directory),
        audio=open_audio_encoder(wav2vec or directory / WAV2VEC_DIRECTORY),
    )
    _check_widths(opened)
    return opened


def _check_widths(opened: OpenedCheckpoint) -> None:
    """The networks of a checkpoint must fit together."""
    config, audio = opened.dit_config, opened.audio.sizes
    for what, found, expected in (
        ("text encoder width", opened.text.sizes.dim, config.text_dim),
        ("image encoder width", opened.image.sizes.dim, config.image_dim),
        ("audio encoder layers × width", audio.num_layers * audio.hidden, config.audio_dim),
    ):
        if found != expected:
            raise InputError(f"{what}: expected {expected} as in the DiT, found {found}")
