"""A WebRTC client of a served session, in this process: aiortc as a browser would use it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from aiortc import MediaStreamTrack, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame, VideoFrame
from websockets.asyncio.client import ClientConnection, connect

from tests.support.server import TIMEOUT_S, Served

RATE_HZ = 48_000
PACKET = 960  # samples of 20 ms
LOUD = 500  # of int16, in a packet that is not silence


class MicrophoneTrack(MediaStreamTrack):
    """Says float32 [n] at RATE_HZ at its pace, then silence."""

    kind = "audio"

    def __init__(self, pcm: np.ndarray) -> None:
        super().__init__()
        self._pcm, self._at, self._start_s = pcm, 0, 0.0

    async def recv(self) -> AudioFrame:
        loop = asyncio.get_running_loop()
        self._start_s = self._start_s or loop.time()
        await asyncio.sleep(self._start_s + self._at / RATE_HZ - loop.time())
        samples = np.zeros(PACKET, np.float32)
        part = self._pcm[self._at : self._at + PACKET]
        samples[: len(part)] = part
        packet = AudioFrame.from_ndarray((samples * 32_767).astype(np.int16)[None], "s16", "mono")
        packet.sample_rate, packet.pts = RATE_HZ, self._at
        packet.time_base = Fraction(1, RATE_HZ)
        self._at += PACKET
        return packet


@dataclass
class Viewer:
    """What arrived: (seconds of the loop's clock, frame)."""

    id: str
    peer: RTCPeerConnection
    socket: ClientConnection
    pictures: list[tuple[float, VideoFrame]] = field(default_factory=list)
    sounds: list[tuple[float, AudioFrame]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def event(self, kind: str) -> dict[str, Any]:
        """The next event of a kind that has not been seen."""
        while True:
            message = json.loads(await asyncio.wait_for(self.socket.recv(), TIMEOUT_S))
            self.events.append(message)
            if message["type"] == kind:
                return message

    async def say(self, pcm: np.ndarray, rate_hz: int) -> None:
        """float32 [n, 1], at once, as an utterance."""
        command = {"type": "audio", "sample_rate_hz": rate_hz, "channels": 1}
        await self.socket.send(json.dumps(command))
        await self.socket.send((pcm * 32_767).astype("<i2").tobytes())
        await self.socket.send(json.dumps({"type": "end_of_utterance"}))

    async def until(self, condition: Any, message: str) -> None:
        deadline_s = asyncio.get_running_loop().time() + TIMEOUT_S
        while not condition():
            assert asyncio.get_running_loop().time() < deadline_s, message
            await asyncio.sleep(0.02)

    def watch(self, track: MediaStreamTrack) -> None:
        kept = self.pictures if track.kind == "video" else self.sounds

        async def keep() -> None:
            with contextlib.suppress(MediaStreamError):
                while True:
                    frame = await track.recv()
                    kept.append((asyncio.get_running_loop().time(), frame))  # type: ignore[arg-type]

        self.tasks.append(asyncio.create_task(keep()))


async def offer_of(peer: RTCPeerConnection, microphone: MediaStreamTrack | None = None) -> str:
    """The offer of a browser: video to receive, sound both ways."""
    peer.addTransceiver("video", direction="recvonly")
    peer.addTransceiver(microphone or "audio", direction="sendrecv")
    await peer.setLocalDescription(await peer.createOffer())
    return peer.localDescription.sdp


async def post(served: Served, path: str, body: dict[str, Any] | None = None) -> Any:
    return await asyncio.to_thread(served.client.post, path, json=body)


@contextlib.asynccontextmanager
async def viewing(
    served: Served, microphone: MediaStreamTrack | None = None, **fields: Any
) -> AsyncIterator[Viewer]:
    """A new session, seen and heard by a client that is connected."""
    session = await asyncio.to_thread(lambda: served.create(**fields))
    url = served.url.replace("http:", "ws:") + session["stream"] + "?format=events"
    peer = RTCPeerConnection()
    async with connect(url, open_timeout=TIMEOUT_S, close_timeout=5) as socket:
        viewer = Viewer(session["id"], peer, socket)
        peer.on("track", viewer.watch)
        try:
            sdp = await offer_of(peer, microphone)
            answer = await post(served, session["offer"], {"sdp": sdp, "type": "offer"})
            assert answer.status_code == 200, answer.text
            await peer.setRemoteDescription(RTCSessionDescription(answer.json()["sdp"], "answer"))
            await viewer.until(lambda: peer.connectionState == "connected", "it does not connect")
            yield viewer
        finally:
            await asyncio.wait_for(peer.close(), 10)
            for task in viewer.tasks:
                task.cancel()


def loudness(packets: list[tuple[float, AudioFrame]]) -> np.ndarray:
    """The largest sample of each packet of sound: int [n]."""
    return np.array([np.abs(frame.to_ndarray().astype(int)).max() for _, frame in packets])
