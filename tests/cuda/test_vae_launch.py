"""How the VAE launches its kernels on a GPU: the launcher against a driver that records calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from liveact import _core
from liveact.checkpoint.random import random_vae
from liveact.checkpoint.tensors import PthTensors
from liveact.device import kernels
from liveact.errors import DeviceError
from liveact.vae.vae import Vae
from tests.support.cuda.fake import FakeCuda
from tests.support.kernels.manifest import read_manifest

STREAM = 0x4711


@pytest.fixture
def launch(fake: FakeCuda, compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    images = fake.images(read_manifest("sm_90a", compiled_kernels))
    device = _core.open_cuda(0, images, fake.path, fake.path)
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    fake.clear()
    return kernels.launcher(device, torch.device("cuda:0"))


def arguments(**changed: Any) -> dict[str, Any]:
    x = torch.zeros(2, 3, 5, 8, dtype=torch.bfloat16)
    vector = torch.zeros(8)
    given = {"value": x, "bias": vector, "skip": None, "gamma": vector, "kept": None, "out": x}
    return given | {"rows": 30, "height": 3, "width": 5} | changed


def test_launches_as_the_spec_says(launch: Any, fake: FakeCuda) -> None:
    given = arguments()
    launch("conv_epilogue.8.norm", **dict(reversed(given.items())))  # by name, in any order
    (line,) = [line for line in fake.log() if line.startswith("cuLaunchKernel ")]
    (_, name, *grid), values = line.split()[:5], line.split("|")[1]
    assert name == "conv_epilogue.8.norm" and grid == ["1", "1", "1"]
    expected = [
        hex(value.data_ptr()) if isinstance(value, torch.Tensor) else str(value or 0)
        for value in given.values()
    ]
    assert values.split() == expected


def test_launches_where_torch_works(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(_core, "launch", lambda *given: seen.append(given))
    launch("conv_epilogue.8.norm", rows=3, skip=None)
    assert seen[0][1:] == ("conv_epilogue.8.norm", STREAM, {"rows": 3, "skip": 0})


def test_a_decode_is_the_same_launches_frame_after_frame(launch: Any, fake: FakeCuda) -> None:
    """Two latent frames of the narrow decoder; what they compute is for the interpreter's tests."""
    vae = Vae.from_tensors(PthTensors(random_vae(8, 0), Path("random")), "cpu", launch)
    latents = torch.randn(16, 3, 2, 4)
    decoder = vae.open_stream()
    per_frame = []
    for _ in decoder.decode(latents):
        per_frame.append([line for line in fake.log() if line.startswith("cuLaunchKernel ")])
        fake.clear()
    assert (
        per_frame[1] and len(per_frame[1]) == len(per_frame[2]) == len(per_frame[0]) + 2
    )  # temporal convolutions
    names = [[line.split()[1] for line in lines] for lines in per_frame]
    assert names[1] == names[2] and names[1][-1] == "to_pictures.bf16"
    assert {name.split(".")[0] for name in names[1]} == {"conv_epilogue", "to_pictures"}


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("conv_epilogue.7.norm", {}, "expected conv_epilogue.7.norm to have been compiled"),
        ("conv_epilogue.8.norm", {"more": 1}, "expected 9 arguments, found 10"),
        ("conv_epilogue.8.norm", {"rows": 2**31}, "32 bits|2147483648"),
        ("conv_epilogue.8.norm", {"value": torch.zeros(9)[1:]}, "value.*16"),
    ],
)
def test_wrong_launches_are_refused(
    launch: Any, fake: FakeCuda, name: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        launch(name, **arguments(**changed))
    with pytest.raises(DeviceError, match="expected the argument out, found none"):
        given = arguments(other=1)
        del given["out"]
        launch("conv_epilogue.8.norm", **given)
    assert not [line for line in fake.log() if line.startswith("cuLaunchKernel ")]


def test_a_cpu_device_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    launch = kernels.launcher(_core.open_cpu(), torch.device("cpu"))
    with pytest.raises(DeviceError, match="expected a CUDA device, found cpu"):
        launch("to_pictures.bf16")
