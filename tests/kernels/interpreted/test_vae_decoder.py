"""The VAE's kernels against torch; the whole bf16 decoder made of them against the recordings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.kernel_cases import KernelCase, cases, make_values
from liveact.vae.ops import KernelOps, Pending, TorchOps
from liveact.vae.queue import RecordedCall
from liveact.vae.vae import Vae
from reference import to_uint8
from tests.support import paths
from tests.support.kernels.interpreter import launch

GOLDEN = paths.GOLDEN / "vae"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no recordings beside the checkout")


def operands(case: KernelCase) -> tuple[Pending, Tensor | None, str]:
    """A Pending with bias (and skip), gamma or None, and the variant."""
    t, h, w, cols = (case.sizes[key] for key in ("n", "h", "w", "cols"))
    variant = case.options["variant"]
    shape: tuple[int, ...] = (t, h, w, cols)
    order = "plain"
    if "frames" in variant:
        shape, order = (t // 2, h, w, 2 * cols), "frames"
    elif "phases" in variant:
        shape, order = (t, h // 2 + 1, w // 2 + 1, 4 * cols), "phases"
    value = make_values(case.values, *shape).bfloat16()
    biases = 2 * cols if order == "frames" else cols
    bias = make_values("zero" if case.values == "zero" else "random", biases, seed=1)
    skip = make_values(case.values, t, h, w, cols, seed=2).bfloat16() if "skip" in variant else None
    gamma = make_values("random", cols, seed=3) if "norm" in variant else None
    return Pending(value, bias, skip, order), gamma, variant


def bias_of(x: Pending) -> Tensor:
    """As it is added to [t, H, W, C]: frames by turns have one half and the other."""
    bias = x.bias.double()
    if x.order != "frames":
        return bias
    return bias.view(2, 1, 1, -1).repeat(x.shape[0] // 2, 1, 1, 1)


def reference(x: Pending, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x, what the next convolution reads), in float64."""
    total = x.arranged().double() + bias_of(x)
    total = total if x.skip is None else total + x.skip.double()
    if gamma is None:
        return total, total
    length = total.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    normed = total / length * total.shape[-1] ** 0.5 * gamma.double()
    return total, torch.nn.functional.silu(normed)


@pytest.mark.parametrize(
    "case", cases("conv_epilogue", "correctness", "corner"), ids=lambda c: c.name
)
def test_conv_epilogue(case: KernelCase) -> None:
    x, gamma, variant = operands(case)
    names = []

    def named(name: str, **arguments: Any) -> None:
        names.append(name)
        launch(name, **arguments)

    # Frames of a buffer: what is before and after must stay.
    t = x.shape[0]
    buffer = torch.full((t + 3, *x.shape[1:]), -7.0, dtype=torch.bfloat16)
    target = None if variant == "frames" else buffer[2 : 2 + t]
    keep = "keep" in variant or target is None
    kept = KernelOps(named).settle(x, target, gamma, keep)
    assert names == [f"conv_epilogue.{case.sizes['cols']}.{variant}"]
    total, out = reference(x, gamma)
    # A sum of three in fp32, each at most 2⁻²⁴ of the largest wrong; then one rounding to bf16. The
    # norm divides that by the length, so what cancels stays as wrong as its largest term was.
    terms = x.arranged().abs().double() + bias_of(x).abs() + (0 if x.skip is None else x.skip.abs())
    noise = terms * 2.0**-22
    if keep:
        assert kept is not None
        assert (kept.double() - total).abs().le(total.abs() * 2.0**-8 + noise + 1e-38).all()
    if target is not None:
        assert (buffer[:2] == -7).all() and (buffer[2 + t :] == -7).all()
        if case.values == "huge":  # 1e30² is infinite in fp32: the norm is 0, on the CPU alike
            assert gamma is None or (target == 0).all()
            return
        if gamma is not None:
            length = total.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
            noise = noise / length * total.shape[-1] ** 0.5 * gamma.abs() * 1.1
        assert (target.double() - out).abs().le(out.abs() * 2.0**-7 + noise + 1e-30).all()


@pytest.mark.parametrize(
    "case", cases("to_pictures", "correctness", "corner"), ids=lambda c: c.name
)
def test_to_pictures(case: KernelCase) -> None:
    shape = (*case.sizes.values(), 8)
    value = make_values(case.values, *shape).bfloat16()
    bias = torch.tensor([0.0, 0.25, -0.5])
    result = KernelOps(launch).pictures(Pending(value, bias))
    video = (value[..., :3].float() + bias).permute(3, 0, 1, 2)
    assert (result.numpy() == to_uint8(video).numpy()).all()


def test_pictures_round_half_to_even() -> None:
    """127.5 → 128, 100.5 → 100: where a value and its bias meet exactly between two codes."""
    value = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    bias = torch.tensor([0.0, -18 / 85, 1.0])
    result = KernelOps(launch).pictures(Pending(value, bias))
    assert result[0, 0].tolist() == [[128, 100, 255]] * 2


def test_nan_is_not_normalised_away() -> None:
    """One NaN makes its pixel NaN, as on the CPU, and no other."""
    x = Pending(torch.ones(1, 2, 2, 8, dtype=torch.bfloat16), torch.zeros(8))
    x.value[0, 1, 0, 3] = torch.nan
    found = torch.zeros_like(x.value)
    KernelOps(launch).settle(x, found, torch.ones(8))
    expected = torch.zeros_like(found)
    TorchOps(torch.float32).settle(x, expected, torch.ones(8))
    assert found[0, 1, 0].isnan().all() and found.isnan().sum() == 8
    assert torch.equal(found.isnan(), expected.isnan())


class Recorder:
    """Launches, and remembers the names and where the results went."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int | None]] = []

    def __call__(self, name: str, **arguments: Any) -> None:
        out = arguments["out"]
        self.calls.append((name, None if out is None else out.data_ptr()))
        launch(name, **arguments)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def vae(recorder: Recorder) -> Vae:
    return Vae.load(GOLDEN / "Wan2.1_VAE.pth", launch=recorder)


@needs_golden
@pytest.mark.parametrize("frames_per_call", [1, 3])
def test_decodes_as_recorded(vae: Vae, frames_per_call: int) -> None:
    """At most twice the error of the same layers in bf16 by torch."""
    latent = load_file(GOLDEN / "inputs.safetensors")["latent"][0][:, :6]
    expected = load_file(GOLDEN / "outputs.safetensors")["decode_stream"][0, :, :21]

    def error(decoded: Vae) -> float:
        pieces = decoded.open_stream(frames_per_call).decode_video(latent)
        video = torch.cat(list(pieces), dim=1)
        assert video.dtype == torch.float32
        return float((video - expected).norm() / expected.norm())

    plain = Vae.load(GOLDEN / "Wan2.1_VAE.pth")
    plain.decoder_ops = TorchOps(torch.bfloat16)
    bound = error(plain)
    assert bound > 1e-3, "expected the error of bf16"
    assert 1e-3 < error(vae) < 2 * bound


@needs_golden
def test_every_layer_is_one_launch(vae: Vae, recorder: Recorder) -> None:
    """In steady state one kernel per convolution and nothing else, the same ones into the same
    buffers call after call: what a graph needs."""
    latent = load_file(GOLDEN / "inputs.safetensors")["latent"][0]
    decoder = vae.open_stream()
    for pictures in decoder.decode(latent[:, :2]):
        assert pictures.shape[1:] == (32, 48, 3)
    recorder.calls.clear()
    list(decoder.decode(latent[:, 2:3]))
    first = list(recorder.calls)
    recorder.calls.clear()
    list(decoder.decode(latent[:, 3:4]))
    assert [name for name, _ in first] == [name for name, _ in recorder.calls]
    buffers = {b[c.past_frames :].data_ptr() for c, b in decoder._state._buffers.items()}

    def into_buffers(calls: list[tuple[str, int | None]]) -> list[int]:
        return [at for _, at in calls if at in buffers]

    assert into_buffers(first) == into_buffers(recorder.calls)
    # conv_in alone is written by torch (the latents).
    assert len(into_buffers(first)) == len(buffers) - 1
    # And the three up-samplings and the attention read results of their own; then the pictures.
    names = [name.rpartition(".")[2] for name, _ in first]
    assert len(first) == len(buffers) - 1 + 3 + 1 + 1
    assert names.count("frames") == 2 and names.count("norm_keep") == 3 - 2
    assert first[-1][0] == "to_pictures.bf16"


@needs_golden
def test_a_recorded_call(vae: Vae, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Op by op, then recorded, then replayed; the input where the graph reads it."""
    latent = load_file(GOLDEN / "inputs.safetensors")["latent"][0]
    decoder, plain = vae.open_stream(), vae.open_stream()
    records = []

    def record(call: Any, latents: Tensor) -> Any:
        records.append(latents.data_ptr())
        pictures = torch.zeros(4, 32, 48, 3, dtype=torch.uint8)
        return pictures, lambda: pictures.copy_(call(latents))

    monkeypatch.setattr(RecordedCall, "record", staticmethod(record))
    decoder._enter(latent)  # allocates
    call = decoder._pictures

    buffer = torch.empty(16, 1, 4, 6)
    recorded = RecordedCall(buffer)
    for i, expected in enumerate(plain.decode(latent[:, :5])):
        part = latent[:, i : i + 1]
        found = call(part) if i == 0 else recorded(part, call)
        assert (found.numpy() == expected).all(), i
        assert len(records) == (i >= 2)
    assert records == [buffer.data_ptr()]
