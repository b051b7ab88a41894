"""What a stream of the VAE remembers: after errors, in other formats and sizes, saved, freed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from liveact.checkpoint.random import random_vae
from liveact.checkpoint.tensors import PthTensors
from liveact.errors import LiveActError
from liveact.vae import ops as vae_ops
from liveact.vae.layers import Encoder, FrameAttention
from liveact.vae.ops import TorchOps
from liveact.vae.state import CausalState, EncoderState
from liveact.vae.vae import Vae, VaeStream
from liveact.vae.windowed import WindowedVaeStream
from reference import VAEStream
from tests.support.compare import relative_error

TENSORS = {name: tensor.float() for name, tensor in random_vae(8, 0).items()}


@pytest.fixture
def vae() -> Vae:
    return Vae.from_tensors(PthTensors(TENSORS, Path("random")), "cpu")


def latents_of(frames: int, height: int = 2, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(16, frames, height, width, generator=generator)


def video(decoder: VaeStream | WindowedVaeStream, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(decoder.decode_video(latents)), dim=1)


# ------------------------------------------------------------------------- sizes and formats


@pytest.mark.parametrize("frames_per_call", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 2)])
def test_any_size_decodes_as_plain_pytorch(vae, size, frames_per_call):
    latents = latents_of(5, *size)
    expected = VAEStream(TENSORS).decode_block(latents)
    found = video(vae.open_stream(frames_per_call), latents).clamp(-1, 1)
    assert relative_error(found, expected) < 1e-5  # fp32, as in test_vae.py


def test_wide_convolutions_are_the_same(vae, monkeypatch):
    """Below 96 channels a CPU convolves frames side by side, above and on a GPU volumes."""
    latents = latents_of(3)
    expected = video(vae.open_stream(), latents)
    monkeypatch.setattr(vae_ops, "_WIDE_BELOW", 0)
    monkeypatch.setattr(vae_ops, "_WIDE_PIXELS", 0)
    assert relative_error(video(vae.open_stream(), latents), expected) < 1e-5


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0])
def test_the_norm_takes_dark_pixels_as_they_are(scale):
    x = scale * torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    gamma = torch.linspace(-1, 1, 8)
    expected = F.normalize(x, dim=-1) * 8**0.5 * gamma
    torch.testing.assert_close(TorchOps(torch.float32).norm(x, gamma), expected)


def test_latents_of_any_format_and_layout(vae):
    latents = latents_of(3).bfloat16().float()
    expected = video(vae.open_stream(), latents)
    pictures = np.concatenate(list(vae.open_stream().decode(latents)))
    for given in (
        latents.double(),
        latents.bfloat16(),
        latents.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        latents.clone().requires_grad_(),
    ):
        assert torch.equal(video(vae.open_stream(), given), expected)
        shown = np.concatenate(list(vae.open_stream().decode(given)))
        assert (shown == pictures).all()


def test_one_picture_encodes_as_the_first_of_many(vae):
    picture = torch.rand(1, 3, 5, 8, 24) * 2 - 1
    first = vae.encode(picture[:, :, :1])
    assert first.shape == (1, 16, 1, 1, 3)
    assert torch.equal(vae.encode(picture[:, :, :1].double()), first)
    torch.testing.assert_close(vae.encode(picture)[:, :, :1], first, rtol=0, atol=1e-6)


def test_what_comes_after_a_pause_is_encoded(vae, monkeypatch):
    """A picture, zeros until every stage repeats itself, and another picture."""
    movie = torch.zeros(1, 3, 61, 8, 8)
    movie[:, :, 0] = torch.rand(1, 3, 1, 1)
    movie[:, :, 57:] = torch.rand(1, 3, 1, 1, 1)
    found = vae.encode(movie)
    monkeypatch.setattr(EncoderState, "once", lambda self, stage, x, run: run(x))
    assert torch.equal(vae.encode(movie), found)


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("before", [0, 1, 2])
def test_after_a_failed_call_nothing_goes_on(vae, monkeypatch, before):
    """Some convolutions remember its frames and some do not: only a reset helps."""
    latents = latents_of(4)
    expected = video(vae.open_stream(), latents)
    decoder = vae.open_stream()
    if before:
        video(decoder, latents[:, :before])
    with monkeypatch.context() as patched:
        patched.setattr(FrameAttention, "forward", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            list(decoder.decode_video(latents[:, before:]))
    for use in (decoder.decode_video, decoder.decode):
        with pytest.raises(LiveActError, match="expected a reset after a failed call"):
            use(latents)
    decoder.reset()
    assert torch.equal(video(decoder, latents), expected)


def fail(*_: object) -> Any:
    raise RuntimeError("out of luck")


def test_a_reset_forgets_a_broken_stream(vae):
    """NaN stays in what is remembered until a reset."""
    decoder = vae.open_stream()
    expected = video(decoder, latents_of(3))
    decoder.reset()
    assert video(decoder, torch.full((16, 3, 2, 4), torch.nan)).isnan().all()
    decoder.reset()
    assert torch.equal(video(decoder, latents_of(3)), expected)


# ------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("decoder_type", [VaeStream, WindowedVaeStream])
def test_close_frees_the_memory(vae, decoder_type):
    decoder = decoder_type(vae)
    expected = video(decoder, latents_of(3))
    assert decoder.size_bytes == vae.stream_bytes((2, 4))
    assert decoder.size_bytes == 2 * vae.stream_bytes((2, 4), dtype=torch.bfloat16)
    decoder.close()
    assert decoder.size_bytes == 0 and not decoder._recorded
    assert torch.equal(video(decoder, latents_of(3)), expected)


def test_a_window_keeps_three_latent_frames(vae):
    """And not what they were cut out of."""
    decoder = WindowedVaeStream(vae)
    video(decoder, latents_of(8))
    assert decoder._context is not None
    assert torch.equal(decoder._context, latents_of(8)[:, 5:])
    assert decoder._context.untyped_storage().nbytes() == 4 * 16 * 3 * 2 * 4


def test_another_size_frees_before_it_allocates(vae, monkeypatch):
    held = []
    allocate = CausalState.allocate

    def watched(state: CausalState, *arguments: Any) -> None:
        held.append(len(state._buffers))
        allocate(state, *arguments)

    decoder = vae.open_stream()
    video(decoder, latents_of(2))
    monkeypatch.setattr(CausalState, "allocate", watched)
    decoder.reset()
    decoder._recorded[1] = fail  # a graph of the buffers that go
    other = latents_of(2, 3, 1)
    assert torch.equal(video(decoder, other), video(vae.open_stream(), other))
    assert held[0] == 0 and not decoder._recorded
    assert decoder.size_bytes == vae.stream_bytes((3, 1))


# ------------------------------------------------------------------------------ one at a time


class Turns(TorchDispatchMode):
    """Stands in for the queue of a GPU; whatever touches memory must have the turn."""

    LOOKS = ("aten.slice.Tensor", "aten.detach.default", "aten.alias.default")

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.handed_over = 0

    @contextmanager
    def turn(self, given: torch.Tensor | None = None) -> Iterator[None]:
        self.held += 1
        yield
        self.held -= 1

    def hand_over(self, result: torch.Tensor) -> torch.Tensor:
        assert not self.held
        self.handed_over += 1
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert self.held or str(func) in self.LOOKS, f"{func} outside of a turn"
        return func(*args, **(kwargs or {}))


def test_memory_is_touched_in_turns(vae):
    """What is enqueued while another thread records a graph would become part of it."""
    vae.queue = turns = Turns()
    latents = latents_of(3)
    decoder = vae.open_stream()
    with turns:
        for _ in decoder.decode_video(latents):
            assert not turns.held
        decoder.reset()
        decoder.close()
    assert turns.handed_over == 3


def test_exact_encoding_leaves_the_settings(vae, monkeypatch):
    """TF32 is off while a thread encodes, also where two do, and what else was set stays set."""
    settings = torch.backends.cudnn
    inside, go_on = threading.Semaphore(0), threading.Semaphore(0)
    seen = []

    def look(*_: object) -> torch.Tensor:
        seen.append((settings.allow_tf32, settings.deterministic))
        inside.release()
        assert go_on.acquire(timeout=30)
        seen.append((settings.allow_tf32, settings.deterministic))
        return torch.zeros(1, 1, 1, 32)

    monkeypatch.setattr(Encoder, "forward", look)
    monkeypatch.setattr(settings, "deterministic", True)
    monkeypatch.setattr(settings, "allow_tf32", True)
    threads = [
        threading.Thread(target=vae.encode, args=(torch.zeros(1, 3, 1, 8, 8),), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert inside.acquire(timeout=30)
    assert not inside.acquire(timeout=0.1)  # the other one waits
    go_on.release(2)
    for thread in threads:
        thread.join(30)
    assert seen == [(False, True)] * 4
    assert settings.allow_tf32 and settings.deterministic
