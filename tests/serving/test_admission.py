"""Who gets a place, who waits, and what is counted: with a clock and a memory of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from liveact.engine import Engine
from liveact.serve.admission import Admission, Place
from liveact.serve.errors import Refused
from liveact.serve.memory import MARGIN_BYTES, SessionMemory, free_host_bytes
from tests.support.paths import PORTRAIT
from tests.support.pipeline import demo_checkpoint


class FixedMemory:
    """One pool of so many bytes."""

    def __init__(self, free: int) -> None:
        self.free = free

    def fits(self, needed: tuple[int, ...], promised: list[tuple[int, ...]]) -> bool:
        return needed[0] + sum(one[0] for one in promised) <= self.free


class Door:
    """An admission whose time goes by when it is told to."""

    def __init__(self, max_sessions: int = 2, max_waiting: int = 3, free: int = 1000) -> None:
        self.now_s = 0.0
        self.memory = FixedMemory(free)
        self.admission = Admission(
            self.memory,
            max_sessions=max_sessions,
            max_waiting=max_waiting,
            retry_s=2.0,
            clock=lambda: self.now_s,
        )

    def enter(self, ticket: str | None = None, needed: int = 1) -> Place:
        return self.admission.enter((needed,), ticket)

    def refused(self, ticket: str | None = None, needed: int = 1) -> Refused:
        with pytest.raises(Refused) as refused:
            self.enter(ticket, needed)
        return refused.value


def test_no_more_than_so_many() -> None:
    door = Door()
    places = [door.enter(), door.enter()]
    refused = door.refused()
    assert refused.status_code == 503
    assert refused.headers == {"Retry-After": "2"}
    assert refused.details["position"] == 1
    places[0].release()
    places[0].release()  # once is enough
    door.enter(refused.details["ticket"])
    door.refused()


def test_who_came_first_is_served_first() -> None:
    door = Door(max_sessions=1)
    place = door.enter()
    first, second = door.refused(), door.refused()
    assert (first.details["position"], second.details["position"]) == (1, 2)
    assert door.refused(first.details["ticket"]).details["position"] == 1
    place.release()
    assert door.refused().details["position"] == 3  # a newcomer, though a place is free
    assert door.refused(second.details["ticket"]).details["position"] == 2
    place = door.enter(first.details["ticket"])
    assert door.refused(second.details["ticket"]).details["position"] == 1
    place.release()
    door.enter(second.details["ticket"])


def test_clients_that_ignore_tickets_do_not_lock_the_door() -> None:
    door = Door(max_sessions=1)
    place = door.enter()
    for _ in range(10):
        door.refused()
    place.release()
    door.enter()


def test_a_ticket_that_is_not_sent_again_is_forgotten() -> None:
    door = Door(max_sessions=1)
    place = door.enter()
    left, kept = (door.refused().details["ticket"] for _ in range(2))
    door.now_s = 5.0
    assert door.refused(kept).details["position"] == 2
    door.now_s = 7.0
    assert door.refused(kept).details["position"] == 1
    assert door.refused(left).details["ticket"] != left
    place.release()
    door.enter(kept)


def test_the_queue_is_bounded() -> None:
    door = Door(max_sessions=1, max_waiting=2)
    door.enter()
    tickets = [door.refused().details["ticket"] for _ in range(5)]
    assert all(tickets[:2]) and tickets[2:] == [None] * 3
    assert door.admission.waiting == 2
    assert door.refused("not a ticket").details["ticket"] is None


def test_memory_that_was_promised_is_not_given_twice() -> None:
    door = Door(max_sessions=9, free=100)
    first = door.enter(needed=60)
    assert door.refused(needed=60).kind == "full"
    first.allocated = lambda: (60,)  # it has it by now, so that less is free
    door.memory.free = 40
    assert door.refused(needed=60).kind == "full"
    door.enter(needed=40)
    first.release()


def test_what_can_never_fit_gets_no_ticket() -> None:
    door = Door(free=100)
    refused = door.refused(needed=101)
    assert refused.kind == "no_memory"
    assert "ticket" not in refused.details


# --------------------------------------------------------------------------------- real memory


def test_what_a_session_needs_is_what_it_takes(engine: Engine) -> None:
    """The DiT's part to the byte; with the decoder's it is at least what is there after some
    pictures."""
    memory = SessionMemory(engine)
    (needed,) = memory.needed((64, 32))
    before = engine.dit.device.allocated_bytes
    size = {"size": (64, 32), "prompt": "A person."}
    with engine.open_session(image=PORTRAIT, idle="silence", **size) as session:
        assert engine.dit.device.allocated_bytes - before == engine.session_bytes((64, 32)).dit
        for _ in range(12):
            session.next_chunk(30)
        taken = session.stats().device_bytes
        assert 0.5 * needed < taken <= needed
        assert memory.allocated((needed,), session.stats())[0] == pytest.approx(taken, abs=1)


def test_a_session_on_two_devices_needs_memory_on_both() -> None:
    with Engine.load(demo_checkpoint(), device="cpu,cpu") as engine:
        needed = engine.session_bytes((64, 32))
        before = engine.stats().device_bytes
        with engine.open_session(image=PORTRAIT, prompt="A person.", size=(64, 32)):
            taken = engine.stats().device_bytes - before
        # The larger of two parts, on each.
        assert needed.dit < taken <= 2 * needed.dit
        assert sum(SessionMemory(engine).needed((64, 32))) > 2 * needed.dit + needed.vae


def test_a_session_beyond_free_memory_does_not_fit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SessionMemory(engine)
    monkeypatch.setattr("liveact.serve.memory.free_host_bytes", lambda: MARGIN_BYTES + 100)
    assert memory.fits((100,), [])
    assert not memory.fits((101,), [])
    assert not memory.fits((60,), [(60,)])


def test_free_memory_is_the_lesser_of_machine_and_container(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert free_host_bytes(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   50 kB\n")
    assert free_host_bytes(meminfo, cgroup) == 50 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    assert free_host_bytes(meminfo, cgroup) == 50 * 1024
    (cgroup / "memory.max").write_text("30000\n")
    (cgroup / "memory.current").write_text("20000\n")
    (cgroup / "memory.stat").write_text("anon 15000\ninactive_file 4000\n")
    assert free_host_bytes(meminfo, cgroup) == 14_000


def test_a_session_on_two_devices_takes_from_both() -> None:
    size = (64, 32)
    with Engine.load(demo_checkpoint(), device="cpu,cpu") as engine:
        devices, one = engine.dit.devices, engine.session_bytes(size)
        before = [device.allocated_bytes for device in devices]
        (needed,) = SessionMemory(engine).needed(size)
        assert needed > 2 * one.dit + one.vae
        with engine.open_session(
            image=PORTRAIT, prompt="A person.", size=size, idle="silence"
        ) as session:
            taken = [d.allocated_bytes - b for d, b in zip(devices, before, strict=True)]
            assert taken == [one.dit, one.dit]
            assert session.next_chunk(60).frames.shape[1:] == (32, 64, 3)
    assert [device.allocated_bytes for device in devices] == [0, 0]
