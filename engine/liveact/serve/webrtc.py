"""A session over WebRTC: its pictures and sound to a browser, the browser's microphone to it.

    LiveSession.frames ─► Playout ─► two tracks ─► browser ─► microphone ─► Microphone ─► feed

A peer that is connected is the one consumer of its session, and lives as long: whichever ends first
ends the other. One that is not connected yet makes way for a stream over WebSocket: where UDP finds
no way through, a client goes on with that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import numpy as np
import numpy.typing as npt
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.codecs import h264, vpx
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame
from fastapi import APIRouter

from liveact.errors import InputError, LiveActError
from liveact.files import one_line
from liveact.serve.errors import Busy
from liveact.serve.live import LiveSession
from liveact.serve.microphone import Microphone
from liveact.serve.playout import Playout
from liveact.serve.sessions import Sessions
from liveact.serve.wire import Answer, ErrorBody, Offer

OFFER_ERRORS = (400, 401, 403, 404, 408, 409, 413, 421)
CONNECT_S = 15.0  # from the answer to the first packet
CLOSE_S = 5.0  # aiortc may wait for ever for a peer that is gone
MAX_SECTIONS = 8  # of an offer

# Bits per second. aiortc's own, 0.5 to 1 Mbit/s, blur a face of 512×512. An encoder reads them when
# it is made; between them the receiver's estimate decides.
BITRATES = {"MIN_BITRATE": 500_000, "DEFAULT_BITRATE": 2_500_000, "MAX_BITRATE": 8_000_000}
for _codec in (vpx, h264):
    for _name, _bits_per_s in BITRATES.items():
        setattr(_codec, _name, _bits_per_s)

_log = logging.getLogger("liveact.serve")


class Peer:
    """One browser. `answer` connects it; it ends by itself, or with its session.

    Attributes:
        running: done when everything of it is closed, the session too unless another stream has
            it; None before `answer`.
    """

    def __init__(self, live: LiveSession) -> None:
        self._live = live
        self._playout = Playout()
        servers = [RTCIceServer(urls=url) for url in live.settings.ice_servers]
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        self._connection.on("connectionstatechange", self._note_state)
        self._connection.on("track", self._note_track)
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._replaced = asyncio.Event()  # by another stream, before it was connected
        self._microphone: asyncio.Task[None] | None = None
        self.running: asyncio.Task[None] | None = None

    async def answer(self, offer_sdp: str) -> str:
        """The SDP answer, with all candidates; the peer runs from then on.

        Raises InputError for an offer that cannot be answered, Busy where the session has a stream
        already; both leave the session as it was.
        """
        try:
            await self._take_offer(offer_sdp)
            self._live.reserve(self._replaced.set)
        except BaseException:
            await self._close()
            raise
        try:
            await self._connection.setLocalDescription()
        except BaseException:
            await self._close()
            await self._live.close("not_connected")
            raise
        self.running = asyncio.create_task(self._run(), name="liveact-webrtc")
        return self._connection.localDescription.sdp

    async def _take_offer(self, offer_sdp: str) -> None:
        if offer_sdp.count("\nm=") > MAX_SECTIONS:
            raise InputError(f"offer: expected at most {MAX_SECTIONS} media, found more")
        try:
            await self._connection.setRemoteDescription(RTCSessionDescription(offer_sdp, "offer"))
        except Exception as error:  # aiortc raises anything for what it cannot read
            raise InputError(f"offer: expected SDP, found {one_line(error)}") from error
        self._send(self._playout.video, receive=False)
        self._send(self._playout.audio, receive=True)

    def _send(self, track: MediaStreamTrack, *, receive: bool) -> None:
        """Sends a track in the first section of its kind; nothing else of the kind is received."""
        sections = [t for t in self._connection.getTransceivers() if t.kind == track.kind]
        if not sections:
            raise InputError(f"offer: expected audio and video, found no {track.kind}")
        for section in sections:
            section.direction = "inactive"
        sections[0].sender.replaceTrack(track)
        sections[0].direction = "sendrecv" if receive else "sendonly"

    # ------------------------------------------------------------------------- its life

    async def _run(self) -> None:
        tasks = [
            asyncio.create_task(work)
            for work in (self._show(), self._watch(), self._make_way(), self._follow_events())
        ]
        reason = "failed"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            reason = done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            _log.info("webrtc: %s", reason, extra={"session": self._live.name})
            await self._close()
            if not self._replaced.is_set():
                await self._live.close(reason)

    async def _show(self) -> str:
        """Sends every frame from the moment that it is connected; returns why no more come."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._connected.wait()
        except TimeoutError:
            return "not_connected"
        with contextlib.suppress(Busy):  # replaced or closed at this moment
            async for frame in self._live.frames(reserved=True):
                self._playout.put(frame)
        return "ended"

    async def _watch(self) -> str:
        await self._lost.wait()
        return "disconnected"

    async def _make_way(self) -> str:
        await self._replaced.wait()
        return "replaced"

    async def _follow_events(self) -> str:
        """Silences what is interrupted; returns when the session is closed."""
        events = self._live.events()
        try:
            while await events.wait():
                event = events.take()
                if event is not None and event["type"] == "interrupted":
                    self._playout.hush()
        finally:
            self._live.leave(events)
        return "ended"

    async def _close(self) -> None:
        if self._microphone is not None:
            self._microphone.cancel()
        self._playout.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connection.close(), CLOSE_S)

    def _note_state(self) -> None:
        state = self._connection.connectionState
        if state == "connected":
            self._connected.set()
        elif state in ("failed", "closed"):
            self._lost.set()

    # -------------------------------------------------------------------- the microphone

    def _note_track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio" and self._microphone is None:
            self._microphone = asyncio.create_task(self._listen(track))

    async def _listen(self, track: MediaStreamTrack) -> None:
        microphone: Microphone | None = None
        with contextlib.suppress(MediaStreamError, LiveActError):
            while True:
                packet = await track.recv()
                assert isinstance(packet, AudioFrame)
                microphone = microphone or Microphone(self._live, packet.sample_rate)
                await microphone.hear(_mono(packet))


def add_webrtc(router: APIRouter, sessions: Sessions) -> None:
    """The route of the offer, on the router of the sessions."""
    peers: set[asyncio.Task[None]] = set()

    @router.post("/{id}/offer", responses={s: {"model": ErrorBody} for s in OFFER_ERRORS})
    async def offer(id: str, asked: Offer) -> Answer:
        """Shows the session to a WebRTC client: pictures and sound in one stream, and hears its
        microphone. The offer has to have all candidates, as the answer does."""
        peer = Peer(sessions.get(id))
        answer = Answer(sdp=await peer.answer(asked.sdp), type="answer")
        if peer.running is not None:  # the loop itself holds tasks weakly
            peers.add(peer.running)
            peer.running.add_done_callback(peers.discard)
        return answer


def _mono(packet: AudioFrame) -> npt.NDArray[np.float32]:
    """float32 [n, 1] of what Opus decodes to: int16, channels interleaved."""
    samples = packet.to_ndarray().reshape(-1, packet.layout.nb_channels)
    return samples.mean(axis=1, keepdims=True, dtype=np.float32) / np.float32(32_768)
