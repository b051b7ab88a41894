"""Two queues that meet at barriers, in every order that their devices may run them.

A model of what two devices promise, searched whole: each runs its own queue in order, at any pace;
what it stores in the other one's memory may arrive at any time until it releases; a wait lasts
until the count is there. The programs are those that the runtime put on the queues.

Memory has a cell for each half of q, K, V (`heads`) and of what attention mixed (`mixed`), on each
device and from each writer. Its value is the version: how many layers were begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

DEVICES = (0, 1)


class Op(NamedTuple):
    """`split`, `attend`, `update` and `rest` of a version; `signal` and `wait` of a count."""

    name: str
    number: int


Cell = tuple[str, int, int]  # heads or mixed, the device that has it, the device that writes it
# Each cell's place in State.versions.
CELLS = {
    (kind, *pair): index
    for index, (kind, pair) in enumerate(product(("heads", "mixed"), product(DEVICES, DEVICES)))
}


class State(NamedTuple):
    done: tuple[int, int]  # ops of each device
    arrived: tuple[int, int]  # how often the other one signalled, on each device
    versions: tuple[int, ...]  # of CELLS
    on_the_way: frozenset[tuple[Cell, int]]  # stores that the other device does not see yet
    opened: frozenset[int]  # devices whose waits were ended by the host
    freed: bool


@dataclass(frozen=True)
class Rules:
    """What a runtime does besides its programs; the defaults are right.

    Attributes:
        releases: a signal makes visible what was stored before it.
        opens: devices whose waits end after a failure.
        awaited: devices that must be idle before memory is freed.
    """

    releases: bool = True
    opens: tuple[int, ...] = DEVICES
    awaited: tuple[int, ...] = DEVICES


def programs(trace: Sequence[str]) -> list[tuple[int, Op]]:
    """What ran, as (device, op) in the order of the host. `trace`: FakeCuda.trace()."""
    ops: list[tuple[int, Op]] = []
    version, signals, waits = [0, 0], [0, 0], [0, 0]
    last = ["", ""]
    for line in trace:
        device, kernel = int(line.split()[0]), line.split()[1].split(".")
        name = {"split_qkv": "split", "self_attention": "attend", "update_memory": "update"}.get(
            kernel[0], "rest"
        )
        if kernel[0] == "barrier":
            name = kernel[1]
            counts = signals if name == "signal" else waits
            counts[device] += 1
            ops.append((device, Op(name, counts[device])))
        elif name != last[device]:
            version[device] += name == "split"
            ops.append((device, Op(name, version[device])))
        last[device] = name
    return ops


@dataclass
class Model:
    """Searches all orders of two programs.

    stopped: the host put no more than these on the queues, because something failed or was
        cancelled: it opens the barriers, waits for both devices and frees the memory.
    """

    queues: tuple[list[Op], list[Op]]
    stopped: bool = False
    rules: Rules = field(default_factory=Rules)

    def violation(self) -> str:
        """What is wrong in some order; empty: nothing in any."""
        first = State((0, 0), (0, 0), (0,) * len(CELLS), frozenset(), frozenset(), False)
        seen, ahead = {first}, deque([first])
        while ahead:
            state = ahead.popleft()
            following = list(self.steps(state))
            if not following and not self.is_over(state):
                return f"nobody goes on: {self.position(state)}"
            for wrong, after in following:
                if wrong:
                    return f"{wrong}: {self.position(state)}"
                if after not in seen:
                    seen.add(after)
                    ahead.append(after)
        return ""

    def is_idle(self, state: State, device: int) -> bool:
        return state.done[device] == len(self.queues[device])

    def is_over(self, state: State) -> bool:
        return all(self.is_idle(state, d) for d in DEVICES)

    def position(self, state: State) -> str:
        parts = []
        for device in DEVICES:
            at, queue = state.done[device], self.queues[device]
            parts.append(f"device {device} before {queue[at] if at < len(queue) else 'nothing'}")
        return ", ".join(parts)

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """What may happen next: (what is wrong with it, the state after it)."""
        for cell, version in state.on_the_way:
            yield "", arrive(state, {(cell, version)})
        if self.stopped:
            for device in set(self.rules.opens) - state.opened:
                yield "", state._replace(opened=state.opened | {device})
            if not state.freed and all(self.is_idle(state, d) for d in self.rules.awaited):
                yield "", state._replace(freed=True)
        for device in DEVICES:
            if not self.is_idle(state, device):
                yield from self.run(state, device, self.queues[device][state.done[device]])

    def run(self, state: State, device: int, op: Op) -> Iterator[tuple[str, State]]:
        if op.name == "wait" and state.arrived[device] < op.number and device not in state.opened:
            return
        done = put(state.done, device, state.done[device] + 1)
        after = state._replace(done=done)
        wrong = ""
        if op.name in ("attend", "update", "rest"):
            kind = "mixed" if op.name == "rest" else "heads"
            found = {state.versions[CELLS[kind, device, writer]] for writer in DEVICES}
            # Once a barrier is open, what is computed is of no use.
            if found != {op.number} and not state.opened:
                wrong = f"{op.name} of device {device} finds {kind} of {sorted(found)}"
        if op.name == "signal":
            if self.rules.releases:
                own = {store for store in state.on_the_way if store[0][2] == device}
                after = arrive(after, own)
            count = max(after.arrived[1 - device], op.number)
            after = after._replace(arrived=put(after.arrived, 1 - device, count))
        if op.name in ("split", "attend"):
            if state.freed:
                wrong = f"{op.name} of device {device} stores in memory that was freed"
            kind = "heads" if op.name == "split" else "mixed"
            after = arrive(after, {((kind, device, device), op.number)})
            remote = ((kind, 1 - device, device), op.number)
            overtaken = {store for store in after.on_the_way if store[0] == remote[0]}
            after = after._replace(on_the_way=after.on_the_way - overtaken | {remote})
        yield wrong, after


def put(pair: tuple[int, int], index: int, value: int) -> tuple[int, int]:
    return (value, pair[1]) if index == 0 else (pair[0], value)


def arrive(state: State, stores: set[tuple[Cell, int]]) -> State:
    versions = list(state.versions)
    for cell, version in stores:
        versions[CELLS[cell]] = version
    return state._replace(versions=tuple(versions), on_the_way=state.on_the_way - stores)


def of_each_device(ops: Sequence[tuple[int, Op]]) -> tuple[list[Op], list[Op]]:
    first, second = ([op for device, op in ops if device == wanted] for wanted in DEVICES)
    return first, second


def violation(
    queues: tuple[list[Op], list[Op]], stops: Sequence[tuple[int, int]], rules: Rules = Rules()
) -> str:
    """Of two programs in full, or where the host stops having put that many ops on each queue."""
    wrong = Model(queues, False, rules).violation()
    for first, second in stops:
        wrong = wrong or Model((queues[0][:first], queues[1][:second]), True, rules).violation()
    return wrong
