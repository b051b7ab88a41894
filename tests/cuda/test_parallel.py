"""One stream on two devices, without a GPU: two queues that wait for one another.

The stand-in runs the work of both queues in an order that is drawn, which is all that a device
promises. What could go wrong is looked for in what ran: accesses of both devices to the same memory
that nothing orders, a wait that nobody ends, addresses that a device cannot reach. Orders are
searched whole in test_barrier.py, failures in test_every_call.py.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from liveact import _core
from liveact.dit.dit import DitStream
from liveact.errors import DeviceError, SessionError
from tests.support.cuda.blocks import NUM_LAYERS, calls, denoise, open_device, open_stream
from tests.support.cuda.fake import FakeCuda

Images = list[_core.KernelImage]
Open = Callable[..., DitStream]
MEETINGS = 2 * NUM_LAYERS  # of an evaluation


@pytest.fixture
def open_pair(fake: FakeCuda, images: Images, weights: dict[str, torch.Tensor]) -> Iterator[Open]:
    """Opens streams on both devices."""
    fake.set_multiplies(False)
    devices = [open_device(fake, images, index) for index in (0, 1)]
    yield lambda **options: open_stream(devices, weights, **options)
    fake.interleave(0)
    fake.set_multiplies(True)


@dataclass
class Races:
    """Looks for accesses that nothing orders, by vector clocks.

    Attributes:
        found: a line for each pair of accesses.
    """

    found: list[str] = field(default_factory=list)
    _clocks: list[list[int]] = field(default_factory=lambda: [[0, 0], [0, 0]])
    _signals: list[list[list[int]]] = field(default_factory=lambda: [[], []])
    _waits: list[int] = field(default_factory=lambda: [0, 0])
    # (memory, device whose access) → (its clock, what it was); writes and reads
    _writes: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)
    _reads: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)

    def run(self, line: str) -> None:
        """One line of FakeCuda.trace."""
        device, name = int(line.split()[0]), line.split()[1]
        clock = self._clocks[device]
        clock[device] += 1
        if name == "barrier.signal":
            self._signals[device].append(list(clock))
        elif name == "barrier.wait":
            seen = self._signals[1 - device][self._waits[device]]  # IndexError: nobody signalled
            self._waits[device] += 1
            self._clocks[device] = [max(pair) for pair in zip(clock, seen, strict=True)]
        reads, writes = accesses(device, name)
        for memory in reads:
            self._check(device, name, memory, [self._writes])
            self._reads[memory, device] = (clock[device], name)
        for memory in writes:
            self._check(device, name, memory, [self._writes, self._reads])
            self._writes[memory, device] = (clock[device], name)

    def _check(self, device: int, name: str, memory: str, before: list[Any]) -> None:
        for accesses_before in before:
            at, what = accesses_before.get((memory, 1 - device), (0, ""))
            disjoint = name.split(".")[0] == what.split(".")[0] in ("split_qkv", "self_attention")
            if at > self._clocks[device][1 - device] and not disjoint:
                self.found.append(f"{name} of {device} and {what} of {1 - device}: {memory}")


def accesses(device: int, name: str) -> tuple[list[str], list[str]]:
    """What of the memory that both use is read and written by a kernel or product of a device.

    Both write the same of it at once in one case only: split_qkv other rows, self_attention other
    columns. What is not named may use whatever its own device has, `mixed` included.
    """
    op = name.split(".")[0]
    if op == "split_qkv":
        return [], ["heads 0", "heads 1"]
    if op == "self_attention":
        return [f"heads {device}"], ["mixed 0", "mixed 1"]
    if op == "update_memory":
        return [f"heads {device}"], []
    if op in ("barrier", "sampler_step", "guide", "all_finite", "unpatchify"):
        return [], []
    return [f"mixed {device}"], [f"mixed {device}"]


def races(lines: list[str]) -> list[str]:
    found = Races()
    for line in lines:
        found.run(line)
    return found.found


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "guidance"), [("fp8", 1.5), ("bf16", 1.0)])
def test_any_order_of_two_queues_is_right(
    fake: FakeCuda, open_pair: Open, precision: str, guidance: float
) -> None:
    """Eager blocks, captured ones and replays; evaluations of a later block: 3, or 5 guided."""
    for seed in (1, 2):
        stream = open_pair(precision=precision, guidance=guidance)
        fake.interleave(seed)
        fake.trace()
        for _ in range(4):
            assert denoise(stream).isfinite().all()
        lines = fake.trace()
        assert fake.waiting() == 0
        assert races(lines) == []
        assert fake.fault() == ""
        evaluations = 4 * (3 if guidance == 1.0 else 5)
        count = Counter(line.split()[0] + line.split()[1] for line in lines)
        assert {count[f"{d}barrier.{half}"] for d in (0, 1) for half in ("signal", "wait")} == {
            evaluations * MEETINGS
        }
        orders = {tuple(line[0] for line in lines[i : i + 2]) for i in range(len(lines) - 1)}
        assert len(orders) == 4, "expected the queues to take turns"
        fake.interleave(0)


@pytest.mark.parametrize("half", ["signal", "wait"])
@pytest.mark.parametrize("left_out", [0, 1])
def test_a_barrier_that_is_left_out_is_found(
    fake: FakeCuda, open_pair: Open, half: str, left_out: int
) -> None:
    """The first, or the second of each layer: the search above can fail."""
    stream = open_pair()
    fake.interleave(1)
    fake.trace()
    for _ in range(4):
        denoise(stream)
    kept, seen = [], Counter[str]()
    for line in fake.trace():
        device, name = line.split()[:2]
        if name in ("barrier.signal", "barrier.wait"):
            seen[device + name] += 1
            if (seen[device + name] + left_out) % 2:
                continue
        kept.append(line)
    assert races(kept)


def test_what_crosses_the_devices(
    fake: FakeCuda, manifest: list[dict[str, Any]], open_pair: Open
) -> None:
    """Kernels whose parameters point to memory of the other device, and which parameters."""
    names = {k["name"]: [p["name"] for p in k["parameters"]] for k in manifest}
    stream = open_pair()
    fake.trace()
    for _ in range(4):
        denoise(stream)
    crossing: dict[str, set[str]] = {}
    for line in fake.trace():
        device, kernel, *homes = line.split()
        for parameter, home in zip(names.get(kernel, []), homes, strict=False):
            if home not in ("-", device):
                crossing.setdefault(f"{device} {kernel}", set()).add(parameter)
    upper = {"upper_q", "upper_q_scale", "upper_k"}
    attention = {f"self_attention.f8{to}" for to in ("", ".to_f8")}
    found = {name.split()[1] for name in crossing}
    assert found - attention == {"split_qkv.qk.256.f8", "split_qkv.v.f8", "barrier.signal"}
    assert crossing["0 split_qkv.qk.256.f8"] == upper
    assert crossing["1 split_qkv.qk.256.f8"] == {name.removeprefix("upper_") for name in upper}
    assert crossing["0 split_qkv.v.f8"] == {"upper_v"}
    assert crossing["1 split_qkv.v.f8"] == {"v"}
    assert crossing["0 self_attention.f8.to_f8"] == {"rest", "rest_scale"}
    assert crossing["1 self_attention.f8.to_f8"] == {"out", "out_scale"}
    assert crossing["0 barrier.signal"] == crossing["1 barrier.signal"] == {"peer_arrived"}
    assert fake.fault() == ""


def test_one_graph_for_each_device_and_step(fake: FakeCuda, open_pair: Open) -> None:
    stream = open_pair()
    counts = []
    for _ in range(5):
        fake.clear()
        denoise(stream)
        counts.append(calls(fake.log()))
    assert [c["cuStreamBeginCapture"] for c in counts] == [0, 0, 6, 0, 0]
    assert [c["cuGraphLaunch"] for c in counts] == [0, 0, 6, 6, 6]
    assert sum(c["cuMemAlloc"] for c in counts) == 0, "denoise must not allocate"


def test_both_graphs_are_ready_before_either_starts(fake: FakeCuda, open_pair: Open) -> None:
    """From the first launch to the second one a device waits for the other: it must not be long."""
    stream = open_pair()
    for _ in range(2):
        denoise(stream)
    fake.clear()
    denoise(stream)
    kinds = {"cuGraphInstantiate": "i", "cuGraphLaunch": "l"}
    order = "".join(kinds.get(line.split()[0], "") for line in fake.log())
    assert order == "iill" * 3


def test_nothing_comes_between_the_parts_of_two_devices(fake: FakeCuda, open_pair: Open) -> None:
    """Another session frees its memory while one device has its part and the other one has not: the
    driver would wait for the first device, and hold up the launch that this one waits for."""
    stream, other = open_pair(), open_pair()
    for _ in range(3):
        denoise(stream)
    closing = threading.Thread(target=other.close)
    between = []

    def close_the_other() -> None:
        closing.start()
        closing.join(0.3)
        between.append(closing.is_alive())

    fake.interrupt("cuGraphLaunch 0", close_the_other)
    denoise(stream)
    closing.join(30)
    assert between == [True] and not closing.is_alive()


@pytest.mark.parametrize("device", [0, 1])
def test_a_graph_that_one_device_does_not_start(
    fake: FakeCuda, open_pair: Open, device: int
) -> None:
    """The other one has started and waits: it must not do so for ever."""
    stream = open_pair()
    for _ in range(3):
        denoise(stream)
    fake.fail(f"cuGraphLaunch {device}", 719)
    with pytest.raises(DeviceError, match="719"):
        denoise(stream)
    stream.set_prompt(torch.randn(3, 64))  # which waits for what was recorded
    stream.close()
    assert fake.waiting() == 0


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 2, 3])  # eager, captured, replayed
def test_cancelling_at_any_layer(fake: FakeCuda, open_pair: Open, block: int) -> None:
    call = "cuGraphLaunch 0" if block == 3 else "cuLaunchKernel split_qkv.v.f8"
    for skipped in (0, 1, 2 * NUM_LAYERS + 1) if block < 3 else (0, 1):
        stream = open_pair()
        fake.interleave(1 + skipped)
        for _ in range(block):
            denoise(stream)
        cancel_after(fake, call, skipped, stream)
        with pytest.raises(SessionError, match="cancelled"):
            denoise(stream)
        stream.close()
        assert fake.waiting() == 0
        fake.interleave(0)


def cancel_after(fake: FakeCuda, call: str, skipped: int, stream: DitStream) -> None:
    """Cancels in the middle of this call, after it has come that often."""

    def again() -> None:
        cancel_after(fake, call, skipped - 1, stream)

    fake.interrupt(call, again if skipped else stream.cancel)


def test_devices_that_cannot_share_are_refused(
    fake: FakeCuda, images: Images, weights: dict[str, torch.Tensor]
) -> None:
    first, second = (open_device(fake, images, index) for index in (0, 1))

    def refused(expected: str, *devices: _core.Device) -> None:
        with pytest.raises(DeviceError, match=expected):
            open_stream(devices or (first, second), weights)

    try:
        fake.set_link(access=False)
        refused("cuda:0 and cuda:1: expected access to the memory of one another, found none")
        assert _core.cuda_peer_obstacle(0, 1, fake.path).startswith("access to the memory")
        fake.set_link(atomics=False)
        refused("expected NVLink between them, found a link without native atomics")
        fake.set_link()
        fake.set_name(1, "Fake H100")
        refused("expected two GPUs alike, found Fake H200 and Fake H100")
        fake.set_name(1)
        refused("expected two GPUs, found one twice", first, open_device(fake, images, 0))
        refused("cuda:0: expected another GPU beside it, found cpu", first, _core.open_cpu())
        assert _core.cuda_peer_obstacle(0, 1, fake.path) == ""
        assert _core.cuda_device_count(fake.path) == 2
    finally:
        fake.set_link()
        fake.set_name(1)
