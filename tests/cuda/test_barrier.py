"""The barriers of two devices in every order that their queues can run in, and after every failure.

The programs are what the runtime put on the queues of the fake driver. That the search would find
what is wrong is shown by what is made wrong here: each mutant of the protocol dies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import le

import pytest

from liveact import _core
from liveact.dit.dit import Dit, MemoryPolicy
from tests.support.cuda.blocks import LATENT, NUM_LAYERS, condition, denoise, open_device
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import core_config, random_weights
from tests.support.cuda.two_queues import DEVICES, Op, Rules, of_each_device, programs, violation

Queues = tuple[list[Op], list[Op]]
EVALUATIONS = 2  # of the three of a block: a graph is launched, and launched again


@dataclass(frozen=True)
class Protocol:
    """Evaluations of a block on both devices.

    Attributes:
        queues: the ops of each device, in full.
        stops: how many of them are on the queues where the host may stop.
    """

    queues: Queues
    stops: list[tuple[int, int]]


@pytest.fixture(scope="module")
def traces(fake: FakeCuda, images: list[_core.KernelImage]) -> Iterator[list[list[str]]]:
    """What ran on both devices in blocks 0 to 3: as it came (0, 1), captured (2), replayed (3)."""
    fake.set_multiplies(False)
    devices = [open_device(fake, images, index) for index in DEVICES]
    dit = Dit(devices, core_config(NUM_LAYERS), random_weights(NUM_LAYERS), "bf16")
    stream = dit.open_stream(LATENT, MemoryPolicy(), 1.0, 4)
    condition(stream)
    result = []
    for _ in range(4):
        fake.trace()
        denoise(stream)
        result.append(fake.trace())
    yield result
    fake.set_multiplies(True)


@pytest.fixture(scope="module")
def eager(traces: list[list[str]]) -> Protocol:
    """The host may stop after any op: calls fail, and a cancel is seen between layers."""
    ops = programs(traces[1])
    stops = [lengths(ops[:count]) for count in range(len(ops))]
    queues = first_evaluations(of_each_device(ops))
    return Protocol(queues, [stop for stop in stops if all(map(le, stop, map(len, queues)))])


@pytest.fixture(scope="module")
def replayed(traces: list[list[str]]) -> Protocol:
    """The host may stop after any graph; each has one evaluation."""
    queues = of_each_device(programs(traces[3]))
    assert queues == of_each_device(programs(traces[2])) == of_each_device(programs(traces[1]))
    queues = first_evaluations(queues)
    one = [len(queue) // EVALUATIONS for queue in queues]
    stops = [(n * one[0], n * one[1]) for n in range(EVALUATIONS)]
    stops += [((n + 1) * one[0], n * one[1]) for n in range(EVALUATIONS)]
    stops += [(n * one[0], (n + 1) * one[1]) for n in range(EVALUATIONS)]
    return Protocol(queues, stops)


def first_evaluations(queues: Queues) -> Queues:
    first, second = (queue[: len(queue) * EVALUATIONS // 3] for queue in queues)
    return first, second


def lengths(ops: list[tuple[int, Op]]) -> tuple[int, int]:
    first, second = of_each_device(ops)
    return len(first), len(second)


def test_the_runtime_meets_twice_in_a_layer(eager: Protocol) -> None:
    for queue in eager.queues:
        names = [op.name for op in queue if op.name != "rest"]
        layer = ["split", "signal", "wait", "attend", "update", "signal", "wait"]
        assert names == EVALUATIONS * NUM_LAYERS * layer


def test_nothing_is_wrong_in_any_order(eager: Protocol, replayed: Protocol) -> None:
    assert violation(eager.queues, eager.stops) == ""
    assert violation(replayed.queues, replayed.stops) == ""


# Changes of the queue of one device, which the other one does not know of.
def without(name: str, index: int) -> Callable[[list[Op]], list[Op]]:
    """The signal or wait of this index is missing; a signal that is not there does not count."""

    def change(queue: list[Op]) -> list[Op]:
        at = [i for i, op in enumerate(queue) if op.name == name][index]
        later = [Op(n, c - (n == name)) for n, c in queue[at + 1 :]]
        return queue[:at] + later

    return change


def swapped(first: str, second: str) -> Callable[[list[Op]], list[Op]]:
    """Wherever `first` comes right before `second`, it comes after it."""

    def change(queue: list[Op]) -> list[Op]:
        result = list(queue)
        for i, (op, following) in enumerate(pairwise(queue)):
            if (op.name, following.name) == (first, second):
                result[i], result[i + 1] = following, op
        assert result != queue
        return result

    return change


def frozen(*names: str) -> Callable[[list[Op]], list[Op]]:
    """Each launch of a graph has the counts of the first one: they were recorded, not counted."""

    def change(queue: list[Op]) -> list[Op]:
        one = len(queue) // EVALUATIONS
        return [
            Op(op.name, queue[i % one].number) if op.name in names else op
            for i, op in enumerate(queue)
        ]

    return change


MEETINGS = range(2 * NUM_LAYERS)  # of the first evaluation
CHANGES = {
    **{f"wait {i} is missing": without("wait", i) for i in MEETINGS},
    **{f"signal {i} is missing": without("signal", i) for i in MEETINGS},
    "signals come before what they announce is stored": swapped("split", "signal"),
    "keys are read before the wait for them": swapped("wait", "attend"),
    "rows are read before the wait for them": swapped("wait", "rest"),
    "the memory is made after the signal that gives the keys away": swapped("update", "signal"),
    "neither count goes on when a graph is launched again": frozen("signal", "wait"),
    "signals do not count on": frozen("signal"),
    "waits do not count on": frozen("wait"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_queue_that_is_wrong_is_found(replayed: Protocol, change: str, device: int) -> None:
    """Without any failure: in some order of the two devices."""
    queues = [list(queue) for queue in replayed.queues]
    queues[device] = CHANGES[change](queues[device])
    assert violation((queues[0], queues[1]), []) != ""


def test_a_signal_that_does_not_release_is_found(replayed: Protocol) -> None:
    assert violation(replayed.queues, [], Rules(releases=False)) != ""


@pytest.mark.parametrize("opens", [(), (0,), (1,)])
def test_a_barrier_that_stays_closed_on_a_device_is_found(
    replayed: Protocol, opens: tuple[int, ...]
) -> None:
    assert "nobody goes on" in violation(replayed.queues, replayed.stops, Rules(opens=opens))


def test_no_wait_is_on_a_queue_before_its_signal_is(eager: Protocol) -> None:
    """So a cancel between ops leaves nobody waiting, whether or not barriers are opened."""
    assert violation(eager.queues, eager.stops, Rules(opens=())) == ""


@pytest.mark.parametrize("awaited", [(), (0,), (1,)])
def test_memory_that_is_freed_while_the_other_device_runs_is_found(
    eager: Protocol, awaited: tuple[int, ...]
) -> None:
    found = violation(eager.queues, eager.stops, Rules(awaited=awaited))
    assert "memory that was freed" in found
