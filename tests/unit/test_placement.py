"""Which devices are used: names, what is chosen of two GPUs, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from liveact import _core
from liveact.commands.doctor import doctor
from liveact.device import devices, placement
from liveact.device.devices import open_devices, parse_devices
from liveact.device.placement import Times, choose, expected_times
from liveact.errors import DeviceError, InputError

GPUS = ["cuda:0", "cuda:1"]


def test_names_of_devices() -> None:
    assert parse_devices("cpu") == ("cpu",)
    assert parse_devices("cuda") == ("cuda:0",)
    assert parse_devices("cuda:3, cuda:1") == ("cuda:3", "cuda:1")
    assert parse_devices("cpu,cpu") == ("cpu", "cpu")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuda:0,cpu", "two devices: expected cuda:N,cuda:M (or cpu,cpu), found 'cuda:0,cpu'"),
        ("cuda:0,cuda:1,cuda:2", "two devices: expected cuda:N,cuda:M (or cpu,cpu), found 'cuda"),
        ("cuda,cuda:0", "of different GPUs, found cuda:0 twice"),
        ("cuda:0,", "device: expected cpu or cuda:N, found ''"),
        ("cuda:0,tpu", "device: expected cpu or cuda:N, found 'tpu'"),
    ],
)
def test_names_that_are_none(name: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        parse_devices(name)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_two_gpus_share_where_that_is_faster() -> None:
    times = expected_times(_core.ModelConfig())
    assert times.shared < times.apart < times.one
    assert 940 <= times.apart <= 1100, "the block that docs/kernels.md expects"
    chosen = choose(GPUS, "")
    assert chosen.dit == ("cuda:0", "cuda:1") and chosen.vae == "cuda:1"
    assert f"both denoise {times.shared:.0f}" in chosen.reason


def test_without_a_link_the_second_one_decodes() -> None:
    chosen = choose(GPUS, "NVLink between them, found a link without native atomics")
    assert chosen.dit == ("cuda:0",) and chosen.vae == "cuda:1"
    assert "found a link without native atomics" in chosen.reason


def test_one_gpu_does_everything() -> None:
    assert choose(GPUS[:1], "") == placement.Placement(("cuda:0",), None, "one GPU")


def test_a_decode_that_takes_longer_than_half_a_block_stays_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever denoises half and decodes as well would then be the slowest."""
    times = Times(one=1000.0, apart=600.0, shared=700.0)
    monkeypatch.setattr(placement, "expected_times", lambda config: times)
    chosen = choose(GPUS, "")
    assert chosen.dit == ("cuda:0",) and chosen.vae == "cuda:1"


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with GPUs as far as their choice goes: opening gives CPUs."""

    def pretend(count: int, obstacle: str = "", torch_obstacle: str | None = None) -> None:
        def cuda_obstacle(name: str = "cuda:0") -> str | None:
            return None if int(name[5:]) < count else f"{name} is not there"

        monkeypatch.setattr(devices, "cuda_obstacle", cuda_obstacle)
        monkeypatch.setattr(devices, "torch_cuda_obstacle", lambda name: torch_obstacle)
        monkeypatch.setattr(devices, "_open", lambda name: _core.open_cpu())
        monkeypatch.setattr(_core, "cuda_device_count", lambda: count)
        monkeypatch.setattr(_core, "cuda_peer_obstacle", lambda first, second: obstacle)

    return pretend


def test_what_is_opened_on_a_machine_with_two_gpus(machine: Machine) -> None:
    machine(2)
    found = open_devices(None, None, None)
    assert (found.name, found.encoder_name, found.vae_name) == ("cuda:0,cuda:1", "cuda:0", "cuda:1")
    assert found.vae_core is found.cores[1]
    assert "both denoise" in found.reason and "\n" not in found.reason


@pytest.mark.parametrize(
    ("device", "vae_device", "expected"),
    [
        ("cuda:0", None, ("cuda:0", "cuda:0", "cuda:0")),
        ("cuda:0", "cuda:1", ("cuda:0", "cuda:0", "cuda:1")),
        ("cuda:1", "cpu", ("cuda:1", "cuda:1", "cpu")),
        ("cuda:1,cuda:0", None, ("cuda:1,cuda:0", "cuda:1", "cuda:0")),
        ("cuda:0,cuda:1", "cuda:0", ("cuda:0,cuda:1", "cuda:0", "cuda:0")),
    ],
)
def test_each_choice_can_be_forced(
    machine: Machine, device: str, vae_device: str | None, expected: tuple[str, str, str]
) -> None:
    machine(2)
    found = open_devices(device, vae_device, None)
    assert (found.name, found.encoder_name, found.vae_name) == expected


def test_without_torch_on_cuda_the_vae_stays_on_the_cpu(machine: Machine) -> None:
    machine(2, torch_obstacle="torch finds no CUDA device")
    found = open_devices(None, None, None)
    assert (found.name, found.encoder_name, found.vae_name) == ("cuda:0,cuda:1", "cpu", "cpu")


def test_two_that_cannot_share_are_refused(machine: Machine) -> None:
    machine(2, obstacle="NVLink between them, found a link without native atomics")
    with pytest.raises(DeviceError, match=r"^cuda:0 and cuda:1: expected NVLink between them"):
        open_devices("cuda:0,cuda:1", None, None)
    chosen = open_devices(None, None, None)  # not asked for: the second one decodes
    assert (chosen.name, chosen.vae_name) == ("cuda:0", "cuda:1")
    machine(1)
    with pytest.raises(DeviceError, match="expected a usable cuda:1, found that cuda:1 is not"):
        open_devices("cuda:0,cuda:1", None, None)


def test_doctor_says_which_and_why(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from liveact.commands import doctor as command

    def said() -> str:
        table = doctor()
        rows = dict(zip(table.columns[0]._cells, table.columns[1]._cells, strict=True))
        return str(rows["placement"])

    assert said() == "all on the CPU"
    machine(2)
    monkeypatch.setattr(command, "placement", devices.placement)
    assert said().startswith(
        "DiT on cuda:0,cuda:1, VAE on cuda:1: both denoise; expected ms a block"
    )
    machine(1)
    assert said() == "DiT on cuda:0: one GPU"


def test_an_engine_on_two_cpus_has_both(machine: Machine) -> None:
    found = open_devices("cpu,cpu", None, None)
    assert found.name == "cpu,cpu" and len(found.cores) == 2 and found.vae_name == "cpu"
    assert found.precision == "fp32"
    assert replace(found).core is found.cores[0]
