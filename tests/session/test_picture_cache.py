"""What an engine keeps of pictures, and what a closed session keeps of the VAE: nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from liveact.engine import CACHED_PICTURES, Engine
from tests.support.session import open_session


@pytest.fixture
def encodes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The videos that the VAE was given to encode."""
    seen: list[torch.Tensor] = []
    encode = engine.vae.encode

    def counted(video: torch.Tensor) -> torch.Tensor:
        seen.append(video)
        return encode(video)

    monkeypatch.setattr(engine.vae, "encode", counted)
    engine._pictures.clear()
    return seen


def test_a_picture_is_encoded_once_per_content_and_size(engine, encodes):
    """By what it shows and not by which array it is in."""
    array = np.zeros((32, 32, 3), np.uint8)

    def opened(**options: Any) -> int:
        open_session(engine, image=array, **options).close()
        return len(encodes)

    assert opened() == 1 and opened() == 1
    assert encodes[0].shape == (1, 3, 53, 32, 32)
    assert (encodes[0][:, :, 0] == -1).all() and (encodes[0][:, :, 1:] == 0).all()
    array[0, 0] = 255
    assert opened() == 2
    array[0, 0] = 0
    assert opened() == 2
    assert opened(size=(32, 48)) == 3
    same = torch.zeros(3, 32, 64)
    engine.encode_picture(same)
    engine.encode_picture(same.reshape(3, 64, 32))  # the same bytes
    assert len(encodes) == 5


def test_the_condition_is_the_mask_and_the_encoded_picture(engine, encodes):
    picture = torch.rand(3, 32, 48) * 2 - 1
    features, y = engine.encode_picture(picture)
    assert features.shape == (engine._open().image_encoder.tokens, engine.dit.config.image_dim)
    assert y.shape == (20, 14, 4, 6)
    assert (y[:4, 0] == 1).all() and (y[:4, 1:] == 0).all()
    assert torch.equal(encodes[0][0, :, 0], picture)
    assert torch.equal(y[4:], engine.vae.encode(encodes[0])[0])


@pytest.mark.slow
def test_the_last_pictures_are_kept(engine, encodes):
    pictures = [torch.full((3, 32, 32), i / 16) for i in range(CACHED_PICTURES + 1)]
    first = engine.encode_picture(pictures[0])
    for picture in pictures[:-1]:
        engine.encode_picture(picture)
    engine.encode_picture(pictures[0])  # now the latest
    assert len(encodes) == CACHED_PICTURES
    engine.encode_picture(pictures[-1])  # takes the place of 1
    assert len(engine._pictures) == CACHED_PICTURES
    assert engine.encode_picture(pictures[0]) is first
    assert len(encodes) == CACHED_PICTURES + 1
    engine.encode_picture(pictures[1])
    assert len(encodes) == CACHED_PICTURES + 2


@pytest.mark.parametrize("vae_decode", ["streaming", "windowed"])
def test_a_closed_session_holds_no_memory_of_the_decoder(engine, vae_decode):
    session = open_session(engine, vae_decode=vae_decode)
    decoder = session._workers._pipeline.decoder
    next(iter(decoder.decode(torch.zeros(16, 1, 4, 4))))
    assert decoder.size_bytes == engine.vae.stream_bytes((4, 4))
    session.close()
    assert decoder.size_bytes == 0
