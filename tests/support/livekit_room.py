"""Stand-ins for LiveKit's rooms: what its avatar classes use of one, without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from livekit import rtc


class _Reader:
    """A byte stream at its receiver."""

    def __init__(self, name: str, attributes: dict[str, str]) -> None:
        self.info = SimpleNamespace(stream_id=name, attributes=attributes)
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __anext__(self) -> bytes:
        data = await self.queue.get()
        if data is None:
            raise StopAsyncIteration
        return data


class _Writer:
    """The same stream at its sender."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    async def write(self, data: bytes) -> None:
        await self._reader.queue.put(data)

    async def aclose(self) -> None:
        await self._reader.queue.put(None)


class _Publication:
    async def wait_for_subscription(self) -> None:
        pass


class _Participant:
    """In its own room and in the other one."""

    def __init__(self, room: Room, identity: str) -> None:
        self.identity = identity
        self.kind = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
        self.state = rtc.ParticipantState.PARTICIPANT_STATE_ACTIVE
        self._room = room
        self._rpc_handlers: dict[str, Callable[[Any], Any]] = {}

    async def publish_track(self, track: Any, options: Any) -> _Publication:
        self._room.published.append((track, options))
        return _Publication()

    def register_rpc_method(self, method: str, handler: Callable[[Any], Any]) -> None:
        self._rpc_handlers[method] = handler

    async def perform_rpc(self, *, destination_identity: str, method: str, payload: str) -> str:
        await asyncio.sleep(0.005)  # there and back
        handler = self._room.others[destination_identity].local_participant._rpc_handlers[method]
        return handler(rtc.RpcInvocationData("1", self.identity, payload, 10.0))

    async def stream_bytes(
        self,
        *,
        name: str,
        topic: str,
        destination_identities: list[str],
        attributes: dict[str, str],
    ) -> _Writer:
        (destination,) = destination_identities
        reader = _Reader(name, attributes)
        self._room.others[destination].byte_streams[topic](reader, self.identity)
        return _Writer(reader)


class Room(rtc.EventEmitter[str]):
    """Connected from the beginning.

    Attributes:
        published: tracks, each with its options.
        others: the rooms of the other participants, by identity.
    """

    def __init__(self, identity: str) -> None:
        super().__init__()
        self.name = "room"
        self.local_participant = _Participant(self, identity)
        self.published: list[tuple[Any, Any]] = []
        self.others: dict[str, Room] = {}
        self.byte_streams: dict[str, Callable[[Any, str], None]] = {}

    @property
    def remote_participants(self) -> dict[str, _Participant]:
        return {identity: room.local_participant for identity, room in self.others.items()}

    def isconnected(self) -> bool:
        return True

    def register_byte_stream_handler(self, topic: str, handler: Callable[[Any, str], None]) -> None:
        self.byte_streams[topic] = handler


def linked_rooms(first: str, second: str) -> tuple[Room, Room]:
    """One room, as its two participants see it."""
    rooms = Room(first), Room(second)
    rooms[0].others[second], rooms[1].others[first] = rooms[1], rooms[0]
    return rooms
