"""The reference VAE: against the recordings and the engine, in batches, and differentiated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from liveact.checkpoint.random import random_vae
from liveact.checkpoint.tensors import PthTensors, load_pth
from liveact.vae.vae import Vae
from reference import VAE, VAESizes, VAEStream
from tests.support.compare import relative_error
from tests.support.gradients import slopes

pytestmark = pytest.mark.usefixtures("one_thread")

Load = Callable[[str], dict[str, Tensor]]
# float32 rounds by 2^-24 = 6e-8 per operation; 30 convolutions after one another, each a sum of up
# to 864 products in whatever order, multiply that by less than 150. The recordings' README has the
# same bound.
TOLERANCE = 1e-5
SMALL = VAESizes.released(4, (1, 1, 2, 2), 1)


@pytest.fixture(scope="module")
def weights(golden: Path) -> dict[str, Tensor]:
    return dict(load_pth(golden / "vae" / "Wan2.1_VAE.pth"))


@pytest.fixture(scope="module")
def vae(weights: dict[str, Tensor]) -> VAE:
    return VAE.from_tensors(weights).requires_grad_(False)


@pytest.fixture(scope="module")
def inputs(load_golden: Load) -> dict[str, Tensor]:
    return load_golden("vae/inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(load_golden: Load) -> dict[str, Tensor]:
    return load_golden("vae/outputs.safetensors")


@pytest.fixture
def small() -> VAE:
    """Freshly made, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE(SMALL).double()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------ recordings


def test_encodes_as_recorded(
    vae: VAE, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    padded = torch.cat([inputs["image"], torch.zeros(1, 3, 52, 32, 48)], dim=2)
    for name, video in (("encode_padded_image", padded), ("encode_video", inputs["video"])):
        error = relative_error(vae.encode(video), outputs[name])
        print(f"{name}: {error:.1e}")
        assert error < TOLERANCE, name


def test_decodes_as_recorded(
    vae: VAE, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    error = relative_error(vae.decode(inputs["latent"]), outputs["decode_stream"])
    print(f"decode_stream: {error:.1e}")
    assert error < TOLERANCE


def test_decodes_windows_as_recorded(
    weights: dict[str, Tensor], inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    """The released way, whose pictures are clamped."""
    stream = VAEStream({name: tensor.float() for name, tensor in weights.items()})
    for block, latents in enumerate(inputs["latent"][0].split([6, 8, 8], dim=1)):
        expected = outputs[f"decode_windowed_{block}"][0].clamp(-1, 1)
        error = relative_error(stream.decode_block(latents), expected)
        print(f"decode_windowed_{block}: {error:.1e}")
        assert error < TOLERANCE


def test_a_window_is_a_whole_video_of_its_own(weights: dict[str, Tensor], vae: VAE) -> None:
    """The two forms, and blocks shorter than what is decoded again."""
    stream = VAEStream({name: tensor.float() for name, tensor in weights.items()})
    latent = randn(16, 5, 2, 3, dtype=torch.float32)
    for first, end, known in ((0, 1, 0), (1, 3, 1), (3, 5, 3)):
        expected = vae.decode(latent[None, :, first - known : end])[0]
        expected = expected[:, 4 * known - 3 if known else 0 :].clamp(-1, 1)
        assert relative_error(stream.decode_block(latent[:, first:end]), expected) < TOLERANCE


# ------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_agrees_with_the_streaming_engine(frames: int) -> None:
    """At a size with odd latents, of other weights than the recorded, from the first frame on."""
    tensors = {name: tensor.float() for name, tensor in random_vae(8, 3).items()}
    engine = Vae.from_tensors(PthTensors(tensors, Path("random")), "cpu")
    vae = VAE.from_tensors(tensors).requires_grad_(False)
    latent = randn(16, frames, 3, 5, dtype=torch.float32)
    streamed = torch.cat(list(engine.open_stream().decode_video(latent)), dim=1)
    video = vae.decode(latent.unsqueeze(0))
    assert relative_error(video[0], streamed) < TOLERANCE
    assert relative_error(vae.encode(video), engine.encode(video)) < TOLERANCE


# ------------------------------------------------------------------------------ sizes and names


def test_a_trained_model_is_saved_in_the_released_layout(
    vae: VAE, weights: dict[str, Tensor]
) -> None:
    assert vae.sizes == VAESizes.released(8)
    assert all(parameter.requires_grad for parameter in VAE.from_tensors(weights).parameters())
    for state in (vae.state_dict(), VAE(VAESizes.released(8)).state_dict()):
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in weights.items()}
    assert all(torch.equal(vae.state_dict()[n], t.float()) for n, t in weights.items())


@pytest.mark.parametrize(
    "sizes",
    [SMALL, VAESizes(4, ("space", 6, "time", "time"), 8, ("time", 6, "time", 4, 4, "space"))],
    ids=["one block per level", "none at full resolution"],
)
def test_the_engine_loads_what_was_made_here(sizes: VAESizes) -> None:
    """Block counts and widths of a trainer's choosing."""
    made = VAE(sizes)
    tensors = {name: tensor.detach() for name, tensor in made.state_dict().items()}
    assert VAESizes.of(tensors) == sizes
    engine = Vae.from_tensors(PthTensors(tensors, Path("trained")), "cpu")
    video = randn(1, 3, 5, 8, 16, dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(made.encode(video), engine.encode(video)) < TOLERANCE


def test_the_released_sizes() -> None:
    with torch.device("meta"):
        released = VAE(VAESizes.released())
    assert sum(parameter.numel() for parameter in released.parameters()) == 126_892_531


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VAESizes.released(8, (1, 2)), "multipliers: expected 4 levels, found 2"),
        (
            lambda: VAESizes(8, (8, "space", "time", "time"), 8, (8, "space", "space", "time")),
            "VAE decoder: expected a stride of 8 in space and 4 in time, found 8 and 2",
        ),
    ],
)
def test_sizes_that_cannot_be(make: Callable[[], VAESizes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------ batches

# A batch sums in another order where torch cuts it otherwise: 2^-53 per operation, times at most a
# few thousand (see TOLERANCE, where it is 150).
FLOAT64_CHAIN = 1e-12


def test_a_batch_is_its_members_one_by_one(small: VAE) -> None:
    video, latent = randn(3, 3, 9, 16, 8), randn(3, 16, 3, 2, 1)
    with torch.no_grad():
        moments, decoded = small.posterior(video), small.decode(latent)
        assert decoded.shape == video.shape and moments[1].shape == latent.shape
        for i in range(3):
            alone = small.posterior(video[i : i + 1])
            for batched, expected in zip(moments, alone, strict=True):
                assert relative_error(batched[i : i + 1], expected) <= FLOAT64_CHAIN
            expected = small.decode(latent[i : i + 1])
            assert relative_error(decoded[i : i + 1], expected) <= FLOAT64_CHAIN


def test_frames_depend_on_the_past_alone(small: VAE) -> None:
    video, latent = randn(1, 3, 9, 8, 8), randn(1, 16, 3, 1, 1)
    with torch.no_grad():
        encoded, decoded = small.encode(video), small.decode(latent)
        for k in range(3):
            part = small.encode(video[:, :, : 1 + 4 * k])
            assert part.shape[2] == 1 + k
            assert relative_error(part, encoded[:, :, : 1 + k]) <= FLOAT64_CHAIN
            part = small.decode(latent[:, :, : 1 + k])
            assert relative_error(part, decoded[:, :, : 1 + 4 * k]) <= FLOAT64_CHAIN


def test_the_posterior_is_not_normalised(small: VAE) -> None:
    video = randn(2, 3, 5, 8, 8)
    with torch.no_grad():
        mean, log_variance = small.posterior(video)
        latent = small.encode(video)
    assert mean.shape == log_variance.shape == latent.shape == (2, 16, 2, 1, 1)
    torch.testing.assert_close(small.denormalise(latent), mean)
    torch.testing.assert_close(small.normalise(mean), latent)
    assert not torch.allclose(mean, log_variance)


# ------------------------------------------------------------------------------ gradients

# Central differences with h = 1e-6 are off by h^2 = 1e-12 times the third derivative over the
# first, and by 2^-53 / h = 1e-10 times the size of the loss over its slope: with a factor of a
# thousand for either, 1e-7, and ten times that. A gradient that lacks a path is wrong by percents.
STEP, DIFFERENCE = 1e-6, 1e-6


def loss(vae: VAE, video: Tensor) -> Tensor:
    """Reconstruction and a KL term, as in training."""
    mean, log_variance = vae.posterior(video)
    sampled = mean + (log_variance / 2).exp() * randn(*mean.shape, seed=7)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
    return (vae.decode(vae.normalise(sampled)) - video).square().mean() + divergence


def test_gradients_are_slopes(small: VAE) -> None:
    video = randn(2, 3, 9, 8, 16).requires_grad_()
    loss(small, video).backward()
    probed = {name: parameter for name, parameter in small.named_parameters()}
    missing = [n for n, p in probed.items() if p.grad is None or p.grad.norm() == 0]
    assert not missing
    chosen = [name for name in probed if "time_conv" in name or "to_qkv" in name]
    chosen += ["encoder.conv1.weight", "conv1.weight", "decoder.head.0.gamma"]
    for name in [*chosen, "video"]:
        tensor = video if name == "video" else probed[name]
        slope, measured = slopes(lambda: loss(small, video), tensor, STEP)
        print(f"{name}: {slope:.6g}, by differences off by {abs(measured / slope - 1):.1e}")
        assert measured == pytest.approx(slope, rel=DIFFERENCE), name


def test_an_optimiser_trains_a_fresh_one(small: VAE) -> None:
    assert all(parameter.requires_grad for parameter in small.parameters())
    video = randn(2, 3, 5, 8, 8).clamp(-1, 1)
    optimiser = torch.optim.AdamW(small.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        value = loss(small, video)
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses == sorted(losses, reverse=True) and losses[3] < losses[0]


# ------------------------------------------------------------------------------ boundaries


@pytest.mark.parametrize("shape", [(1, 3, 2, 16, 16), (1, 3, 1, 16, 20), (3, 1, 16, 16)])
def test_wrong_video_is_refused(small: VAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"video: expected \[B, 3, 1 \+ 4 \* k, H, W\] .* found"):
        small.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 2, 2, 2), (1, 8, 2, 2, 2), (1, 16, 0, 2, 2)])
def test_wrong_latents_are_refused(small: VAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latent: expected \[B, 16, n, h, w\], found"):
        small.decode(torch.zeros(shape))
