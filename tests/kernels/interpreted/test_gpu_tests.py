"""Tests that wait for a GPU, with Triton's interpreter or the CPU backend in its place: what they
compare, and how closely, is right before there is one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kernel_cases import KernelCase, cases
from liveact import _core
from liveact.vae.vae import Vae
from tests.gpu import test_gpu_products, test_gpu_vae
from tests.support import paths
from tests.support.kernels.interpreter import launch

GROUPS = ("correctness", "corner")
needs_golden = pytest.mark.skipif(
    not paths.GOLDEN.is_dir(), reason="no recordings beside the checkout"
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_gpu_vae, "DEVICE", torch.device("cpu"))


@pytest.mark.parametrize("case", cases("conv_epilogue", *GROUPS), ids=lambda case: case.name)
def test_conv_epilogue(case: KernelCase) -> None:
    test_gpu_vae.test_conv_epilogue(launch, case)


@pytest.mark.parametrize("case", cases("to_pictures", *GROUPS), ids=lambda case: case.name)
def test_to_pictures(case: KernelCase) -> None:
    test_gpu_vae.test_to_pictures(launch, case)


@needs_golden
def test_decodes_as_recorded() -> None:
    path = paths.GOLDEN / "vae" / "Wan2.1_VAE.pth"
    latent = load_file(paths.GOLDEN / "vae" / "inputs.safetensors")["latent"][0]
    vae = Vae.load(path, "cpu", launch)
    test_gpu_vae.test_decodes_as_recorded(
        vae, path, latent, lambda name: load_file(paths.GOLDEN / name), 1
    )


# The CPU backend takes no bias in bf16.
@pytest.mark.parametrize("kind", ["fp8 without bias", "bf16 with a gate", "head"])
@pytest.mark.parametrize("m", [1, 41, 257])
def test_product(kind: str, m: int) -> None:
    for n, k in ((256, 256), (256, 512)):
        test_gpu_products.test_product(_core.open_cpu(), kind, m, n, k)
