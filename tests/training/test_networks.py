"""The networks that are trained are those that run, and their initialisations do what they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from liveact import _core
from liveact.audio.front_end import AudioFrontEnd
from liveact.checkpoint.layout import VAE_FILE, WAV2VEC_DIRECTORY, WAV2VEC_WEIGHTS_FILES
from liveact.dit.dit import Dit
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.speech import AudioEncoder
from liveact.vae.condition import condition_on
from liveact.vae.vae import Vae
from reference import DiT, plan_block
from training.checkpoint import AUDIO_DIM, DIT_CONFIG, IMAGE_DIM, write_dit, write_encoders
from training.data.clips import Clips, make_clip, make_clips
from training.data.expressions import PROMPTS
from training.dit.examples import (
    encode_clips,
    encode_person,
    load_vae,
    streamed_features,
    windows_of,
)
from training.dit.train import SIGMAS, Batch, denoise, fresh_dit
from training.speech.model import SpeechEncoder
from training.vae.model import SMALL, fold_normalisation, inflated, raw_decode, raw_moments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh networks in the released layout."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("fresh")
    write_encoders(directory, inflated(SMALL, 0).state_dict(), SpeechEncoder().state_dict())
    dit = fresh_dit(0)
    with torch.no_grad():
        for parameter in dit.parameters():  # what starts at zero would hide most of the network
            parameter.add_(0.03 * torch.randn_like(parameter))
    write_dit(directory, dit.state_dict())
    return directory


# ------------------------------------------------------------------------------ autoencoder


@torch.no_grad()
def test_an_inflated_autoencoder_sees_every_fourth_frame_as_a_picture() -> None:
    vae = inflated(SMALL, 3)
    video = torch.rand(1, 3, 13, 32, 32) * 2 - 1
    latents = raw_moments(vae, video)
    for t in range(4):
        alone = raw_moments(vae, video[:, :, 4 * t : 4 * t + 1])
        torch.testing.assert_close(latents[:, :, t], alone[:, :, 0], atol=1e-4, rtol=1e-4)
    made = raw_decode(vae, latents)
    for frame in range(13):
        alone = raw_decode(vae, latents[:, :, (frame + 3) // 4 : (frame + 3) // 4 + 1])
        torch.testing.assert_close(made[:, :, frame], alone[:, :, 0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_inflated_autoencoder_keeps_the_variance() -> None:
    vae = inflated(SMALL, 1)
    latents = raw_moments(vae, torch.rand(1, 3, 1, 64, 64) * 2 - 1)
    assert 0.2 < float(latents.std()) < 5
    assert 0.1 < float(raw_decode(vae, latents).std()) < 5


@torch.no_grad()
def test_folding_normalises_and_changes_no_picture() -> None:
    vae = inflated(SMALL, 2)
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    raw = raw_moments(vae, video)
    before = raw_decode(vae, raw)
    mean, std = raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4))
    fold_normalisation(vae, mean, std)
    latents = vae.encode(video)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(latents), before, atol=1e-4, rtol=1e-4)


def test_the_engine_reads_the_autoencoder(checkpoint: Path) -> None:
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    engine, ours = Vae.load(checkpoint / VAE_FILE), load_vae(checkpoint)
    latents = engine.encode(video)
    torch.testing.assert_close(ours.encode(video), latents, atol=1e-4, rtol=1e-4)
    picture = video[0, :, 0]
    y = condition_on(engine, picture)
    torch.testing.assert_close(encode_person(ours, picture), y, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------ speech


def test_the_engine_hears_what_the_trained_encoder_hears(checkpoint: Path) -> None:
    ours = SpeechEncoder()
    ours.load_state_dict(
        {k: v.float() for k, v in load_file(checkpoint / "wav2vec/model.safetensors").items()}
    )
    samples = torch.randn(2, 640 * 30)
    engine = AudioEncoder.load(checkpoint / WAV2VEC_DIRECTORY)
    for row, features in zip(samples, ours(samples, 30), strict=True):
        torch.testing.assert_close(engine.encode(row, 30), features, atol=2e-5, rtol=0)


def test_features_are_cut_as_a_live_session_cuts_them(checkpoint: Path) -> None:
    encoder = AudioEncoder.load(checkpoint / WAV2VEC_DIRECTORY)
    speech = torch.randn(640 * 160)
    front_end = AudioFrontEnd(encoder, 25)  # no tempo change: it is given what it would make
    front_end.push(speech.numpy().astype(np.float32) / 3, 16_000)  # it has a gain of 3
    front_end.end()
    for block, rows in enumerate(streamed_features(encoder, speech, 4)):
        torch.testing.assert_close(front_end.block_features(block), rows, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_what_was_encoded_is_not_encoded_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = make_clips(0, 3, 30, people=2)
    one = encode_clips(clips, [0, 1], checkpoint, 1, tmp_path)
    assert one.latents.shape == (2, 16, 6, 16, 16) and one.audio[0].shape == (2, 25, 3, 64)
    assert one.prompt.shape == (2, 1) and len(one.text) == len(PROMPTS)
    drawn: list[int] = []
    monkeypatch.setattr(Clips, "__getitem__", lambda _, i: drawn.append(i) or make_clip(i, 30, 2))
    more = encode_clips(clips, [0, 1, 2], checkpoint, 1, tmp_path)
    assert drawn == [2]
    assert torch.equal(more.latents[:2], one.latents) and torch.equal(
        more.audio[0][:2], one.audio[0]
    )
    shorter = make_clips(0, 3, 29, people=2)
    encode_clips(shorter, [0], checkpoint, 1, tmp_path)  # other clips
    assert drawn == [2, 0]
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    weights = other / WAV2VEC_DIRECTORY / WAV2VEC_WEIGHTS_FILES[0]
    save_file({name: 1.01 * t for name, t in load_file(weights).items()}, weights)
    heard = encode_clips(clips, [0, 1], other, 1, tmp_path)  # another speech encoder
    assert drawn == [2, 0] and torch.equal(heard.latents, one.latents)
    assert not torch.equal(heard.audio[0], one.audio[0])


# ------------------------------------------------------------------------------ DiT


def test_training_computes_the_velocities_of_the_runtime(checkpoint: Path) -> None:
    """Five blocks at three steps, so that slots are compressed twice and more; the prompt of the
    last two is another."""
    blocks, side = 5, 4
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = load_file(checkpoint / "diffusion_pytorch_model.safetensors")
    dit = DiT.from_tensors(DIT_CONFIG, weights)
    y, image = normal(1, 20, 14, side, side), normal(1, 65, IMAGE_DIM)
    text = [normal(1, 9, 64)] * 3 + [normal(1, 6, 64)] * 2
    frames = [plan_block(b).frames for b in range(blocks)]
    rows = [normal(1, 25 if b == 0 else 36, AUDIO_DIM) for b in range(blocks)]
    windows = [windows_of(r.unflatten(-1, (3, -1)), b) for b, r in enumerate(rows)]
    noise = [normal(3, 16, n, side, side) for n in frames]

    stream = Dit.load(checkpoint, _core.open_cpu()).open_stream((side, side), image_tokens=65)
    stream.set_image(image[0], y[0])
    expected: list[list[torch.Tensor]] = []
    for block in range(blocks):
        stream.set_prompt(text[block][0])
        velocities = np.zeros((3, 16, frames[block], side, side), np.float32)
        stream.denoise(noise[block][0], noise[block][1:], rows[block][0], velocities=velocities)
        expected.append(list(torch.from_numpy(velocities)))

    batch = Batch(y, image, text, [torch.zeros(1, 16, n, side, side) for n in frames], windows)
    noisy = [n[:1] for n in noise]
    with torch.no_grad():
        for step in range(3):
            cleaned = denoise(dit, batch, step, noisy)
            for block in range(blocks):
                velocity = (noisy[block] - cleaned[block]) / SIGMAS[step]
                error = (velocity[0] - expected[block][step]).norm()
                assert float(error / expected[block][step].norm()) < 1e-5, (step, block)
            sigma = SIGMAS[step + 1]
            if step < 2:
                noisy = [
                    (1 - sigma) * x0 + sigma * n[step + 1 : step + 2]
                    for x0, n in zip(cleaned, noise, strict=True)
                ]


def test_the_portrait_encoder_tells_identities_apart(checkpoint: Path) -> None:
    from training.data.identity import identity
    from training.data.motion import COLUMNS
    from training.data.portrait import draw

    encoder = ImageEncoder.load(checkpoint)
    rest = torch.zeros(1, len(COLUMNS))
    seen = [encoder.encode(draw(identity(s), rest, 64) * 2 - 1).flatten() for s in range(6)]
    again = encoder.encode(draw(identity(0), rest, 96) * 2 - 1).flatten()
    distances = [float((s - seen[0]).norm() / seen[0].norm()) for s in seen]
    assert float((again - seen[0]).norm() / seen[0].norm()) < 0.5 * min(distances[1:])
