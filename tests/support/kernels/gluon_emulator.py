"""Runs the Gluon attention kernel on a CPU: its numbers, and its warp groups in any order.

Triton's interpreter knows no Gluon. Here the source of triton_kernels/self_attention_hopper.py is
executed as Python, with stand-ins for what it imports of Gluon: tensors are torch's, a pointer is a
place in one memory per type, and each warp group is a thread. One runs at a time; at every barrier,
copy and product the next one is drawn. What the hardware may do late is done late or at once, as
drawn:

- A copy to shared memory makes its target NaN when it begins. What it copies arrives when its group
  was waited for, and products see it after the fence that follows.
- An asynchronous product reads its operands when it begins, or when it is waited for.
- A barrier has a phase and a count, as an mbarrier; arrivals beyond the count are an error, and so
  is a state in which every warp group waits.

So a tile that is read too early or overwritten too early, in an order that was drawn, is NaN or
wrong in the result. Layouts and swizzles are the compiler's and are not emulated; neither is a race
between the four warps of a group.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.support.paths import REPOSITORY

SOURCE = REPOSITORY / "triton_kernels" / "self_attention_hopper.py"
GUARD = 4096  # elements between two buffers, which belong to nobody


class Deadlock(Exception):
    """Every warp group waits."""


# --------------------------------------------------------------------------- values


class Number(int):
    """An integer of the kernel."""

    def to(self, dtype: torch.dtype) -> Number:
        return self


def constexpr(value: float) -> Any:
    """The number, with `value` as Gluon's has it."""
    kind = type(value)
    return type("constexpr", (kind,), {"value": value})(value)


class Memory:
    """All buffers of one type, and which of its elements belong to one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.data = torch.zeros(GUARD, dtype=dtype)
        self.owned = torch.zeros(GUARD, dtype=torch.bool)

    def place(self, tensor: torch.Tensor) -> Pointer:
        """A copy of the tensor; where it begins."""
        start = len(self.data)
        gap = torch.zeros(GUARD, dtype=self.data.dtype)
        self.data = torch.cat([self.data, tensor.flatten(), gap])
        owned = torch.ones(tensor.numel(), dtype=torch.bool)
        self.owned = torch.cat([self.owned, owned, torch.zeros(GUARD, dtype=torch.bool)])
        return Pointer(self, start)


@dataclass
class Pointer:
    """`at`: an element of the memory, or an int64 tensor of them."""

    memory: Memory
    at: Any

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.at[index])

    def load(self, mask: torch.Tensor, other: float) -> torch.Tensor:
        at, mask = torch.broadcast_tensors(torch.as_tensor(self.at), mask)
        assert self.memory.owned[at[mask]].all(), "a load outside of every buffer"
        found = torch.full(at.shape, other).to(self.memory.data.dtype)
        found[mask] = self.memory.data[at[mask]]
        return found

    def store(self, values: Any, mask: Any) -> None:
        at, mask = torch.broadcast_tensors(torch.as_tensor(self.at), mask)
        assert self.memory.owned[at[mask]].all(), "a store outside of every buffer"
        stored = torch.broadcast_to(values, at.shape).to(self.memory.data.dtype)
        self.memory.data[at[mask]] = stored[mask]


# --------------------------------------------------------------------- who runs when


class Scheduler:
    """Warp groups as threads of which one runs at a time."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        # How likely each is to be chosen: from one that is never ahead to one that always is.
        self._speeds = [draw.choice((1, 10, 1000)) for _ in range(3)]
        self._changed = threading.Condition()
        self._ready: dict[int, Callable[[], bool]] = {}
        self._running = -1
        self._error: BaseException | None = None

    def run(self, groups: list[Callable[[], None]]) -> None:
        """Returns when all have ended; raises what one of them raised, or Deadlock."""
        self._ready = {index: lambda: True for index in range(len(groups))}
        threads = [
            threading.Thread(target=self._run, args=(index, group))
            for index, group in enumerate(groups)
        ]
        for thread in threads:
            thread.start()
        with self._changed:
            self._choose()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def wait(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Lets another group go on, and returns when `ready` and drawn."""
        index = self._running
        with self._changed:
            self._ready[index] = ready
            self._choose()
            self._until_chosen(index)

    def _run(self, index: int, group: Callable[[], None]) -> None:
        with self._changed:
            self._until_chosen(index)
        try:
            if self._error is None:
                group()
        except BaseException as error:
            self._error = self._error or error
        with self._changed:
            del self._ready[index]
            self._choose()

    def _until_chosen(self, index: int) -> None:
        self._changed.wait_for(lambda: self._running == index or self._error is not None)
        if self._error is not None:
            raise SystemExit  # of this thread

    def _choose(self) -> None:
        able = [index for index, ready in self._ready.items() if ready()]
        if able:
            weights = [self._speeds[index] for index in able]
            self._running = self._draw.choices(able, weights)[0]
        elif self._ready:
            self._error = self._error or Deadlock(f"groups {sorted(self._ready)} wait for ever")
        self._changed.notify_all()


@dataclass
class Barrier:
    """An mbarrier: the parity of its phase, and how many arrivals are missing."""

    count: int = 0
    missing: int = 0
    phase: int = 0


@dataclass
class Tile:
    """A part of shared memory, as products see it."""

    data: torch.Tensor

    def index(self, at: int) -> Tile:
        return Tile(self.data[at])

    def permute(self, order: tuple[int, int]) -> Tile:
        return Tile(self.data.permute(order))

    def store(self, values: torch.Tensor) -> None:
        self.data.copy_(values)


@dataclass
class Barriers:
    """A row of them, in shared memory."""

    row: list[Barrier]

    def index(self, at: int) -> Barrier:
        return self.row[at]


@dataclass
class Product:
    """An asynchronous product; `result` once it has read its operands."""

    read: Callable[[], torch.Tensor]
    result: torch.Tensor | None = None


@dataclass
class Program:
    """What one program of the kernel's grid does."""

    ids: tuple[int, int]
    draw: random.Random
    scheduler: Scheduler = field(init=False)
    # Of the producer: copies of the group that is open, of groups that were closed, and those that
    # arrived since the last fence.
    open_copies: list[Callable[[], None]] = field(default_factory=list)
    groups: list[list[Callable[[], None]]] = field(default_factory=list)
    arrived: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.draw)

    # ------------------------------------------------------------------ language

    def program_id(self, axis: int) -> Number:
        return Number(self.ids[axis])

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0.0) -> torch.Tensor:
        return pointer.load(torch.as_tensor(mask), other)

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:
            return Barriers([Barrier() for _ in range(shape[0])])
        return Tile(torch.full([int(n) for n in shape], torch.nan).to(dtype))

    def warp_specialize(self, groups: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(warps) == len(registers) == len(groups) - 1
        self.scheduler.run([lambda f=f, a=a: f(*a) for f, a in groups])  # type: ignore[misc]

    # ------------------------------------------------------------------ barriers

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def arrive(self, barrier: Barrier, count: int) -> None:
        barrier.missing -= count
        assert barrier.missing >= 0, "more arrivals than the barrier counts"
        if barrier.missing == 0:
            barrier.phase ^= 1
            barrier.missing = barrier.count
        self.scheduler.wait()

    def wait(self, barrier: Barrier, phase: int, pred: bool = True) -> None:
        assert barrier.count, "a barrier that was not made"
        self.scheduler.wait(lambda: not pred or barrier.phase != phase)

    # -------------------------------------------------------------------- copies

    def copy(self, tile: Tile, pointer: Pointer) -> None:
        values = pointer.load(torch.tensor(True), 0.0)
        tile.data.fill_(torch.nan)
        self.open_copies.append(lambda: tile.store(values))
        self.scheduler.wait()

    def commit_group(self) -> None:
        self.groups.append(self.open_copies)
        self.open_copies = []

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending:
            self.arrived += self.groups.pop(0)
        self.scheduler.wait()

    def fence(self) -> None:
        for copy in self.arrived:
            copy()
        self.arrived.clear()
        self.scheduler.wait()

    # ------------------------------------------------------------------ products

    def mma(
        self, a: Any, b: Tile, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Any:
        def read() -> torch.Tensor:
            left = a.data if isinstance(a, Tile) else a
            found = left.float() @ b.data.float()
            return acc + found if use_acc else found

        product = Product(read)
        if not is_async or self.draw.random() < 0.5:
            product.result = read()
        self.scheduler.wait()
        return product if is_async else product.result

    def mma_wait(self, pending: int, deps: list[Product]) -> list[torch.Tensor]:
        assert pending == 0
        self.scheduler.wait()
        return [p.read() if p.result is None else p.result for p in deps]


# ----------------------------------------------------------------------- the module


_program: Program  # the one that runs; programs do not meet


def _of_program(name: str) -> Callable[..., Any]:
    """A function of the language that the program which runs knows more about."""
    return lambda *args, **options: getattr(_program, name)(*args, **options)


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    if isinstance(a, Pointer):
        return Pointer(a.memory, torch.where(condition, a.at, b.at))
    return torch.where(condition, a, b)


def _language() -> SimpleNamespace:
    def layout(*_: Any) -> None:
        return None

    return SimpleNamespace(
        constexpr=constexpr,
        float32=torch.float32,
        bfloat16=torch.bfloat16,
        float8e4nv=torch.float8_e4m3fn,
        int64=torch.int64,
        BlockedLayout=layout,
        SliceLayout=layout,
        NVMMADistributedLayout=layout,
        NVMMASharedLayout=layout,
        DotOperandLayout=layout,
        program_id=_of_program("program_id"),
        load=_of_program("load"),
        store=lambda pointer, values, mask: pointer.store(values, mask),
        allocate_shared_memory=_of_program("allocate"),
        warp_specialize=_of_program("warp_specialize"),
        thread_barrier=lambda: None,  # of the threads of one group
        static_range=range,
        cdiv=lambda a, b: -(-a // b),
        where=_where,
        arange=lambda start, end, _: torch.arange(start, end),
        full=lambda shape, value, dtype, _: torch.full([int(n) for n in shape], value).to(dtype),
        zeros=lambda shape, dtype, _: torch.zeros([int(n) for n in shape], dtype=dtype),
        exp2=torch.exp2,
        minimum=lambda a, b: torch.minimum(a, torch.as_tensor(b)),
        maximum=lambda a, b: torch.maximum(a, torch.as_tensor(b)),
        max=lambda x, axis: x.amax(dim=axis),
        sum=lambda x, axis: x.sum(dim=axis),
        convert_layout=lambda x, _, assert_trivial: x,
    )


def _hopper() -> dict[str, Any]:
    return {
        "async_copy": SimpleNamespace(
            async_copy_global_to_shared=_of_program("copy"),
            commit_group=_of_program("commit_group"),
            wait_group=_of_program("wait_group"),
        ),
        "fence_async_shared": _of_program("fence"),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=_of_program("init"),
            arrive=_of_program("arrive"),
            wait=_of_program("wait"),
        ),
        "warpgroup_mma": _of_program("mma"),
        "warpgroup_mma_wait": _of_program("mma_wait"),
    }


@contextmanager
def _stand_ins() -> Iterator[None]:
    """What the kernel's module finds instead of Gluon."""
    from triton_kernels import self_attention  # noqa: F401  # imports the real Triton

    def module(name: str, **members: Any) -> ModuleType:
        result = ModuleType(name)
        result.__dict__.update(members)
        return result

    root = "triton.experimental"
    gluon = module(f"{root}.gluon", jit=lambda function: function, language=_language())
    modules = {
        root: module(root, gluon=gluon),
        f"{root}.gluon": gluon,
        f"{root}.gluon.language": module(f"{root}.gluon.language"),
        f"{root}.gluon.language.nvidia": module(f"{root}.gluon.language.nvidia"),
        f"{root}.gluon.language.nvidia.hopper": module("hopper", **_hopper()),
    }
    with mock.patch.dict(sys.modules, modules):
        yield


@cache
def kernel(changes: tuple[tuple[str, str], ...]) -> Callable[..., None]:
    """The kernel as a Python function; changes: texts of its source, and others in their place."""
    source = SOURCE.read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"expected {old!r} once in {SOURCE.name}"
        source = source.replace(old, new)
    spec = importlib.util.spec_from_loader("emulated_self_attention_hopper", loader=None)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    with _stand_ins(), mock.patch.dict(sys.modules, {spec.name: found}):
        exec(compile(source, str(SOURCE), "exec"), found.__dict__)
    function: Callable[..., None] = found.self_attention_hopper
    return function


def run(
    arguments: dict[str, Any], seed: int, changes: dict[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """All programs of a launch, in an order drawn with `seed`: what the buffers hold afterwards.

    `out` begins as NaN. Raises Deadlock, AssertionError for what no order may do.
    """
    global _program
    draw = random.Random(seed)
    memories: dict[torch.dtype, Memory] = {}
    given: list[Any] = []
    places: dict[str, Pointer] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            memory = memories.setdefault(value.dtype, Memory(value.dtype))
            value = places[name] = memory.place(value.fill_(torch.nan) if name == "out" else value)
        else:
            value = Number(value)
        given.append(value)
    function = kernel(tuple((changes or {}).items()))
    for block in range(-(-arguments["tokens"] // 128)):
        for head in range(arguments["heads"]):
            _program = Program((block, head), draw)
            function(*given)
    return {
        name: place.memory.data[place.at : place.at + arguments[name].numel()].view(
            arguments[name].shape
        )
        for name, place in places.items()
    }
