"""The VAE against the recordings, and that a stream decodes the same however it is cut."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from liveact.checkpoint.tensors import PthTensors, load_pth
from liveact.errors import InputError
from liveact.vae.ops import Pending, TorchOps
from liveact.vae.state import EncoderState
from liveact.vae.vae import Vae, VaeStream
from liveact.vae.windowed import WindowedVaeStream
from reference import to_uint8
from tests.support.compare import relative_error

# fp32 results agree with the recordings to about this (golden/README.md).
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Convolutions this small get slower with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae(golden) -> Vae:
    return Vae.load(golden / "vae" / "Wan2.1_VAE.pth")


@pytest.fixture(scope="module")
def inputs(load_golden) -> dict[str, torch.Tensor]:
    return load_golden("vae/inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(load_golden) -> dict[str, torch.Tensor]:
    return load_golden("vae/outputs.safetensors")


@pytest.fixture(scope="module")
def latent(inputs) -> torch.Tensor:
    return inputs["latent"][0]  # [16, 22, 4, 6]


def joined(pieces) -> torch.Tensor:
    return torch.cat(list(pieces), dim=1)  # [3, t, H, W]


# ---------------------------------------------------------------------------------- parity


def test_encodes_as_recorded(vae, inputs, outputs):
    padded = torch.cat([inputs["image"], torch.zeros(1, 3, 52, 32, 48)], dim=2)
    assert relative_error(vae.encode(padded), outputs["encode_padded_image"]) < TOLERANCE
    assert relative_error(vae.encode(inputs["video"]), outputs["encode_video"]) < TOLERANCE


def test_decodes_a_stream_as_recorded(vae, latent, outputs):
    video = joined(vae.open_stream().decode_video(latent))
    assert relative_error(video, outputs["decode_stream"][0]) < TOLERANCE


def test_decodes_windows_as_recorded(vae, latent, outputs):
    decoder = WindowedVaeStream(vae)
    for block, latents in enumerate(latent.split([6, 8, 8], dim=1)):
        video = joined(decoder.decode_video(latents))
        assert relative_error(video, outputs[f"decode_windowed_{block}"][0]) < TOLERANCE


# ------------------------------------------------------------------------------- streaming


@pytest.mark.slow
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_any_split_decodes_the_same(vae, latent, outputs, cuts):
    latents = latent[:, : sum(cuts)]
    decoder = vae.open_stream()
    pieces = [list(decoder.decode_video(block)) for block in latents.split(cuts, dim=1)]
    assert [len(block) for block in pieces] == cuts
    whole = list(vae.open_stream().decode_video(latents))
    flat = [piece for block in pieces for piece in block]
    assert [piece.shape[1] for piece in flat] == [1, *[4] * (sum(cuts) - 1)]
    assert all(torch.equal(a, b) for a, b in zip(flat, whole, strict=True))


def test_streams_do_not_mix(vae, latent):
    a, b = vae.open_stream(), vae.open_stream()
    flipped = latent.flip(1)
    mixed = zip(a.decode_video(latent[:, :3]), b.decode_video(flipped[:, :3]), strict=True)
    first, second = (list(pieces) for pieces in zip(*mixed, strict=True))
    assert torch.equal(joined(first), joined(vae.open_stream().decode_video(latent[:, :3])))
    assert torch.equal(joined(second), joined(vae.open_stream().decode_video(flipped[:, :3])))


def test_pieces_come_one_by_one(vae, latent):
    """Taking two of three pieces moves the state two frames on, not three."""
    decoder = vae.open_stream()
    pieces = decoder.decode_video(latent[:, :3])
    taken = [next(pieces), next(pieces)]
    taken += decoder.decode_video(latent[:, 2:3])
    assert torch.equal(joined(taken), joined(vae.open_stream().decode_video(latent[:, :3])))


@pytest.mark.parametrize("decoder_type", [VaeStream, WindowedVaeStream])
def test_reset_starts_a_new_video(vae, latent, decoder_type):
    decoder = decoder_type(vae)
    first = joined(decoder.decode_video(latent[:, :2]))
    again = joined(decoder.decode_video(latent[:, :2]))
    assert again.shape[1] == 8 and first.shape[1] == 5
    decoder.reset()
    assert torch.equal(joined(decoder.decode_video(latent[:, :2])), first)
    decoder.reset()
    assert joined(decoder.decode_video(latent[:, :1, :2, :2])).shape == (3, 1, 16, 16)


def test_memory_does_not_grow(vae, latent):
    decoder = vae.open_stream()
    before = None
    for _ in decoder.decode_video(latent[:, :6]):
        assert decoder.size_bytes == vae.stream_bytes((4, 6))
        before = before or {b.data_ptr() for b in decoder._state._buffers.values()}
        assert {b.data_ptr() for b in decoder._state._buffers.values()} == before
    decoder.reset()
    list(decoder.decode_video(latent[:, :2]))
    assert {b.data_ptr() for b in decoder._state._buffers.values()} == before


@pytest.mark.parametrize("frames_per_call", [2, 3, 8])
def test_frames_per_call_change_nothing(vae, latent, outputs, frames_per_call):
    decoder = vae.open_stream(frames_per_call)
    pieces = [list(decoder.decode_video(block)) for block in latent.split([6, 8, 8], dim=1)]
    later = [min(frames_per_call, left) for left in range(8, 0, -frames_per_call)]
    assert [[piece.shape[1] for piece in block] for block in pieces[1:]] == 2 * [
        [4 * t for t in later]
    ]
    assert pieces[0][0].shape[1] == 1
    video = joined(piece for block in pieces for piece in block)
    assert relative_error(video, outputs["decode_stream"][0]) < TOLERANCE
    assert decoder.size_bytes == vae.stream_bytes((4, 6), frames_per_call)


@pytest.mark.parametrize("frames_per_call", [0, 9, -1])
def test_wrong_frames_per_call_are_refused(vae, frames_per_call):
    with pytest.raises(InputError, match=f"expected 1 to 8, found {frames_per_call}"):
        vae.open_stream(frames_per_call)


def test_pictures_are_the_video(vae, latent):
    video = list(vae.open_stream().decode_video(latent[:, :3]))
    pictures = list(vae.open_stream().decode(latent[:, :3]))
    assert all(np.array_equal(p, to_uint8(v).numpy()) for p, v in zip(pictures, video, strict=True))
    windowed = WindowedVaeStream(vae)
    for block in latent[:, :5].split([2, 3], dim=1):
        pictures = list(windowed.decode(block))
        assert len(pictures) == block.shape[1]
    assert [len(p) for p in pictures] == [4, 4, 4]


def test_doubling_is_folded_into_the_convolution():
    """The four phases against the doubled picture, at sizes with every kind of border."""
    generator = torch.Generator().manual_seed(3)
    conv = nn.Conv2d(6, 3, 3, padding=1)
    for shape in ((1, 1, 1, 6), (2, 3, 5, 6), (1, 8, 2, 6)):
        frames = torch.randn(shape, generator=generator)
        with torch.no_grad():
            x = TorchOps(torch.float32).upsample(conv, frames)
            doubled = F.interpolate(frames.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
            expected = conv(doubled).permute(0, 2, 3, 1)
        assert x.shape == expected.shape
        torch.testing.assert_close(x.arranged(), expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------- encoding


def test_what_repeats_is_encoded_once(vae, inputs, monkeypatch):
    """The same latents bit for bit as with every stage run, and half of the work."""
    padded = torch.cat([inputs["image"], torch.zeros(1, 3, 52, 32, 48)], dim=2)
    states = []
    once = EncoderState.once

    def remember(self, stage, x, run):
        states.append(self)
        return once(self, stage, x, run)

    monkeypatch.setattr(EncoderState, "once", remember)
    reused = vae.encode(padded)
    # 14 calls of 4 stages. Full resolution is steady from call 4 on, half from call 6: those after
    # are not run.
    assert states[-1].reused >= (14 - 5) + (14 - 7)
    monkeypatch.setattr(EncoderState, "once", lambda self, stage, x, run: run(x))
    assert torch.equal(vae.encode(padded), reused)


def test_encoding_is_causal(vae, inputs):
    video = inputs["video"]
    whole = vae.encode(video)
    assert torch.allclose(vae.encode(video[:, :, :5]), whole[:, :, :2], rtol=0, atol=1e-6)
    assert vae.encode(video[:, :, :1]).shape == (1, 16, 1, 4, 6)


# --------------------------------------------------------------------------------- loading


def widened(state: dict[str, torch.Tensor], factor: int) -> PthTensors:
    """The tensors of a VAE `factor` times as wide, without data: pictures and latents stay."""
    fixed_in = {"encoder.conv1.weight", "decoder.conv1.weight"}
    fixed_out = ("encoder.head.2.", "decoder.head.2.")
    wide = {}
    for name, tensor in state.items():
        shape = list(tensor.shape)
        if not name.startswith(("conv1.", "conv2.", *fixed_out)):
            shape[0] *= factor
        if name.endswith(".weight") and name not in fixed_in and not name.startswith("conv"):
            shape[1] *= factor
        wide[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return PthTensors(wide, Path("wide.pth"))


def test_sizes_come_from_the_tensors(golden, vae):
    state = load_pth(golden / "vae" / "Wan2.1_VAE.pth")
    assert vae.parameter_count == sum(tensor.numel() for tensor in state.values())
    # The released width. 126 892 531 is the released model's count of parameters.
    wide = Vae.from_tensors(widened(state, 12), "meta")
    assert wide.parameter_count == 126_892_531


def without(*names: str):
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in names:
            del state[name]

    return change


def with_tensor(name: str, tensor: torch.Tensor):
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("conv2.bias"), "expected tensor 'conv2.bias' of shape [16], found none"),
        (
            without("decoder.upsamples.2.residual.2.weight"),
            "expected tensor 'decoder.upsamples.2.residual.2.weight' of shape "
            "[2..16384, _, _, _, _], found none of this name",
        ),
        (
            without(
                "encoder.downsamples.5.time_conv.weight", "encoder.downsamples.5.time_conv.bias"
            ),
            "expected under 'encoder.downsamples.' a stride of 8 in space and 4 in time, "
            "found 8 and 2",
        ),
        (
            with_tensor("encoder.middle.1.proj.weight", torch.zeros(32, 16, 1, 1)),
            "tensor 'encoder.middle.1.proj.weight': expected shape [32, 32, 1, 1], "
            "found [32, 16, 1, 1]",
        ),
        (
            with_tensor("encoder.conv1.weight", torch.zeros(8, 3, 3)),
            "expected tensor 'encoder.conv1.weight' of shape [2..16384, _, _, _, _], "
            "found shape [8, 3, 3]",
        ),
        (
            with_tensor("decoder.conv1.bias", torch.zeros(32, dtype=torch.int8)),
            "tensor 'decoder.conv1.bias': expected dtype",
        ),
        (
            with_tensor("decoder.middle.3.norm.gamma", torch.zeros(32, 1, 1)),
            "found tensor 'decoder.middle.3.norm.gamma'",
        ),
    ],
)
def test_incomplete_checkpoint_is_refused(golden, tmp_path, change, message):
    state = dict(load_pth(golden / "vae" / "Wan2.1_VAE.pth"))
    change(state)
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Vae.load(tmp_path / "vae.pth")
    assert str(tmp_path / "vae.pth") in str(caught.value)


# --------------------------------------------------------------------------------- corners


@pytest.mark.parametrize(
    "shape", [(1, 3, 2, 16, 16), (1, 3, 1, 16, 20), (3, 1, 16, 16), (1, 3, 0, 16, 16)]
)
def test_wrong_video_is_refused(vae, shape):
    with pytest.raises(InputError, match=re.escape(f"found {list(shape)}")):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("decoder_type", [VaeStream, WindowedVaeStream])
def test_wrong_latents_are_refused(vae, latent, decoder_type):
    decoder = decoder_type(vae)
    for wrong in (latent[:8], latent[:, :0], latent[None], latent[0, 0, 0]):
        with pytest.raises(InputError, match=re.escape(f"found {list(wrong.shape)}")):
            decoder.decode_video(wrong)
    list(decoder.decode_video(latent[:, :1]))
    with pytest.raises(InputError, match=re.escape("(4, 6) as before, found (2, 6)")):
        decoder.decode_video(latent[:, :1, :2])


def shown(frames: torch.Tensor) -> np.ndarray:
    """frames [3, t, H, W] as the decoder makes pictures of what its last convolution leaves."""
    return (
        TorchOps(torch.float32).pictures(Pending(frames.permute(1, 2, 3, 0).contiguous())).numpy()
    )


def test_pictures_round_half_to_even_and_clamp():
    # Exactly representable in fp32, so that halves are halves.
    values = torch.tensor([-7.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0])
    scaled = np.clip(values.numpy(), -1, 1) * 127.5 + 127.5  # 63.75, 127.5, 191.25 inside
    frames = values.expand(3, 2, 1, 7).clone()
    frames[1] = 1.0
    pictures = shown(frames)
    assert np.array_equal(pictures, to_uint8(frames).numpy())
    assert pictures.shape == (2, 1, 7, 3) and pictures.dtype == np.uint8
    assert pictures.flags.c_contiguous
    assert pictures[0, 0, :, 0].tolist() == np.rint(scaled).astype(int).tolist()
    assert pictures[0, 0, 3, 0] == 128  # 127.5 → even
    assert (pictures[..., 1] == 255).all()
    half = torch.full((3, 1, 1, 1), -18 / 85)
    assert ((half + 1) * 127.5 == 100.5).all()  # in fp32 too
    assert shown(half)[0, 0, 0, 0] == to_uint8(half)[0, 0, 0, 0] == 100  # even
    with pytest.raises(ValueError, match=r"found \[1, 2, 1, 7\]"):
        to_uint8(frames[:1])
