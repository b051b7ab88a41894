"""The VAE on a GPU: `pytest -m gpu`. Skips, with the reason, where none is usable."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.kernel_cases import KernelCase, cases, make_values
from liveact import _core
from liveact.device import kernels
from liveact.device.devices import cublaslt_library, cuda_obstacle, torch_cuda_obstacle
from liveact.vae.ops import KernelOps, Pending, TorchOps
from liveact.vae.queue import Call, RecordedCall
from liveact.vae.vae import Vae, VaeStream
from reference import to_uint8
from tests.support.compare import relative_error

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")


@pytest.fixture(scope="module")
def launch() -> Any:
    if obstacle := cuda_obstacle() or torch_cuda_obstacle("cuda:0"):
        pytest.skip(f"no usable GPU: {obstacle}")
    images = kernels.load(_core.cuda_architecture(0))
    return kernels.launcher(_core.open_cuda(0, images, cublaslt=cublaslt_library()), DEVICE)


@pytest.fixture(scope="module")
def path(golden: Path) -> Path:
    return golden / "vae" / "Wan2.1_VAE.pth"


@pytest.fixture
def vae(path: Path, launch: Any) -> Vae:
    return Vae.load(path, DEVICE, launch)


@pytest.fixture(scope="module")
def latent(load_golden: Any) -> torch.Tensor:
    recorded: torch.Tensor = load_golden("vae/inputs.safetensors")["latent"][0]
    return recorded


@pytest.mark.parametrize("case", cases("conv_epilogue"), ids=lambda case: case.name)
def test_conv_epilogue(launch: Any, case: KernelCase) -> None:
    """Against torch in fp32, rounded once: one step of bf16 apart at most, but for what cancels."""
    t, h, w, cols = (case.sizes[key] for key in ("n", "h", "w", "cols"))
    variant, shape, order = case.options["variant"], (t, h, w, cols), "plain"
    if "frames" in variant:
        shape, order = (t // 2, h, w, 2 * cols), "frames"
    elif "phases" in variant:
        shape, order = (t, h // 2 + 1, w // 2 + 1, 4 * cols), "phases"
    value = make_values(case.values, *shape).to(DEVICE).bfloat16()
    bias = make_values("random", 2 * cols if order == "frames" else cols, seed=1).to(DEVICE)
    skip = make_values(case.values, t, h, w, cols, seed=2).to(DEVICE).bfloat16()
    gamma = make_values("random", cols, seed=3).to(DEVICE)
    found, expected = torch.full((2, t, h, w, cols), 7.0, device=DEVICE, dtype=torch.bfloat16)
    x = Pending(value, bias, skip if "skip" in variant else None, order)
    wide = bias.repeat(1 if order != "phases" else 4)
    y = Pending(value.float() + wide, None, None if x.skip is None else skip.float(), order)
    norm = gamma if "norm" in variant else None
    keep = "keep" in variant
    target = None if variant == "frames" else found
    kept = KernelOps(launch).settle(x, target, norm, keep or target is None)
    kept_expected = TorchOps(torch.float32).settle(y, expected, norm, keep=True)
    if target is not None and case.values == "huge":  # the squares are infinite, and the norm is 0
        assert torch.equal(found, expected)
    elif target is not None:
        assert relative_error(found, expected) < 2.0**-8
    if kept is not None:
        assert kept_expected is not None
        assert relative_error(kept, kept_expected.bfloat16()) < 2.0**-8


@pytest.mark.parametrize("case", cases("to_pictures"), ids=lambda case: case.name)
def test_to_pictures(launch: Any, case: KernelCase) -> None:
    value = make_values(case.values, *case.sizes.values(), 8).to(DEVICE).bfloat16()
    bias = torch.tensor([0.0, 0.25, -0.5], device=DEVICE)
    found = KernelOps(launch).pictures(Pending(value, bias))
    expected = to_uint8((value[..., :3].float() + bias).permute(3, 0, 1, 2))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("frames_per_call", [1, 4])
def test_decodes_as_recorded(vae, path, latent, load_golden, frames_per_call: int) -> None:
    """At most twice the error of the same layers in bf16 by torch on the CPU."""
    expected = load_golden("vae/outputs.safetensors")["decode_stream"][0, :, :21]

    def error(decoder: VaeStream) -> float:
        video = torch.cat([piece.cpu() for piece in decoder.decode_video(latent[:, :6])], dim=1)
        return relative_error(video, expected)

    plain = Vae.load(path)
    plain.decoder_ops = TorchOps(torch.bfloat16)
    bound = 2 * error(plain.open_stream())
    assert bound > 1e-3, "expected the error of bf16"
    assert error(vae.open_stream(frames_per_call)) < bound


def test_encodes_as_recorded(vae, load_golden) -> None:
    """fp32 and not TF32, whose error would be 1e-3."""
    inputs = load_golden("vae/inputs.safetensors")
    outputs = load_golden("vae/outputs.safetensors")
    padded = torch.cat([inputs["image"], torch.zeros(1, 3, 52, 32, 48)], dim=2)
    assert relative_error(vae.encode(padded).cpu(), outputs["encode_padded_image"]) < 1e-5


def pictures(decoder: VaeStream, latent: torch.Tensor) -> npt.NDArray[np.uint8]:
    blocks = latent.split([6, 8, 8], dim=1)
    return np.concatenate([p for block in blocks for p in decoder.decode(block)])


def test_a_graph_gives_the_same_pictures(vae, latent, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = pictures(vae.open_stream(), latent)

    def unrecorded(self: RecordedCall, part: torch.Tensor, call: Call) -> torch.Tensor:
        self._latents.copy_(part)
        return call(self._latents)

    monkeypatch.setattr(RecordedCall, "__call__", unrecorded)
    assert (pictures(vae.open_stream(), latent) == recorded).all()


def test_streams_do_not_mix(vae, latent) -> None:
    """Two sessions decode at once, in threads of their own, as each does alone."""
    alone = [pictures(vae.open_stream(), x) for x in (latent, latent.flip(1))]
    found: dict[int, npt.NDArray[np.uint8]] = {}

    def decode(index: int, x: torch.Tensor) -> None:
        found[index] = pictures(vae.open_stream(), x)

    threads = [
        threading.Thread(target=decode, args=(i, x)) for i, x in enumerate((latent, latent.flip(1)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[i] == alone[i]).all() for i in range(2))


def test_memory_stays(vae, latent) -> None:
    decoder = vae.open_stream()
    for _ in range(4):
        list(decoder.decode(latent[:, :8]))
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(100):
        list(decoder.decode(latent[:, :8]))
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == before
