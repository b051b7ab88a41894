"""What `liveact calibrate` runs the DiT on: encoded where something is given, random where not.

Random features look like real ones: they are of unit variance, those of the speech smooth in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from liveact import _core
from liveact.audio.front_end import AudioFrontEnd
from liveact.blocks import RELEASED_CLOCK, RELEASED_SLOTS, exact_fps, latent_size
from liveact.checkpoint.layout import VAE_FILE, WAV2VEC_DIRECTORY
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
from liveact.errors import InputError
from liveact.media.image import read_image
from liveact.media.sound import open_audio
from liveact.vae.condition import condition_on
from liveact.vae.vae import Vae

FPS = 20.0
_TEXT_TOKENS = 20
_IMAGE_TOKENS = 257


@dataclass(frozen=True)
class Conditioning:
    """What the DiT of a session is given.

    Attributes:
        text: [tokens, text_dim].
        image: [tokens, image_dim].
        y: [in_dim − out_dim, frames, h, w].
        audio: one [25 or 36, audio_dim] for each block.
        origin: what of it was encoded and what is random.
    """

    text: Tensor
    image: Tensor
    y: Tensor
    audio: list[Tensor]
    origin: str


def conditioning(
    checkpoint: Path,
    config: _core.ModelConfig,
    size: tuple[int, int],
    blocks: int,
    seed: int,
    *,
    prompt: str | None = None,
    image: Path | None = None,
    audio: Path | None = None,
    wav2vec: Path | None = None,
) -> Conditioning:
    """Encodes what is given (on the CPU: it is done once), and draws the rest.

    size: width and height of the picture. Raises InputError for bad files, or audio too short.
    """
    generator = torch.Generator().manual_seed(seed)
    if prompt is not None:
        text = TextEncoder.load(checkpoint).encode(prompt, config.text_len)
    else:
        tokens = min(_TEXT_TOKENS, config.text_len)
        text = torch.randn(tokens, config.text_dim, generator=generator)
    if image is not None:
        picture = read_image(image, size)
        features = ImageEncoder.load(checkpoint).encode(picture[None])[0]
        y = condition_on(Vae.load(checkpoint / VAE_FILE), picture)
    else:
        features = torch.randn(_IMAGE_TOKENS, config.image_dim, generator=generator)
        y = _random_y(config, size, generator)
    if audio is not None:
        rows = _encode_audio(audio, wav2vec or checkpoint / WAV2VEC_DIRECTORY, blocks)
    else:
        rows = _random_audio(config, blocks, generator)
    given = {"prompt": prompt, "image": image, "audio": audio}
    encoded = [name for name, value in given.items() if value is not None]
    random = [name for name, value in given.items() if value is None]
    parts = [(encoded, "encoded"), (random, "random")]
    origin = "; ".join(f"{', '.join(names)}: {how}" for names, how in parts if names)
    return Conditioning(text, features, y, rows, origin)


def _random_y(
    config: _core.ModelConfig, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """What an image gives: the mask of the first latent frame; a picture, then one grey for all."""
    channels = config.in_dim - config.out_dim
    frames = RELEASED_SLOTS.total
    height, width = latent_size(size)
    mask_channels = min(4, channels - 1)
    y = torch.zeros(channels, frames, height, width)
    y[:mask_channels, 0] = 1.0
    grey = torch.randn(channels - mask_channels, 1, 1, 1, generator=generator)
    y[mask_channels:] = grey
    y[mask_channels:, 0] = torch.randn(channels - mask_channels, height, width, generator=generator)
    return y


def _random_audio(
    config: _core.ModelConfig, blocks: int, generator: torch.Generator
) -> list[Tensor]:
    """Five new values a second, as syllables are, with the features between them interpolated."""
    ranges = [RELEASED_CLOCK.features(block) for block in range(blocks)]
    first = ranges[0].start
    count = ranges[-1].stop - first
    points = torch.randn(1, config.audio_dim, count // 5 + 2, generator=generator)
    smooth = F.interpolate(points, size=count, mode="linear", align_corners=True)[0].T
    features = smooth / smooth.std()
    return [features[r.start - first : r.stop - first] for r in ranges]


def _encode_audio(path: Path, wav2vec: Path, blocks: int) -> list[Tensor]:
    file = open_audio(path)
    front_end = AudioFrontEnd(AudioEncoder.load(wav2vec), exact_fps(FPS))
    # Two video frames that the last window looks ahead, and as many for the delay of the chain.
    needed_s = (RELEASED_CLOCK.block_video_frames * blocks + 8) / FPS
    pushed = 0
    for piece in file:
        front_end.push(piece, file.sample_rate_hz)
        pushed += len(piece)
        if pushed >= needed_s * file.sample_rate_hz:
            break
    front_end.end()
    found = front_end.num_blocks() or 0
    if found < blocks:
        raise InputError(f"{path}: expected audio for {blocks} blocks, found {found}")
    return [front_end.block_features(block).flatten(1) for block in range(blocks)]
