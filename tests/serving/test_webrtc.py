"""A session over WebRTC, seen and heard by an aiortc client."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.codecs.h264 import H264Encoder
from aiortc.codecs.vpx import Vp8Encoder

from liveact.engine import Engine
from liveact.serve import live, playout, webrtc
from liveact.serve.playout import Playout
from tests.support.peer import (
    LOUD,
    RATE_HZ,
    MicrophoneTrack,
    Viewer,
    loudness,
    offer_of,
    post,
    viewing,
)
from tests.support.pipeline import speech
from tests.support.server import Client, Served, flash_and_beep, serving

FPS = 20


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine) as found:
        yield found


async def none_left(served: Served, limit_s: float = 20.0) -> None:
    """Waits until no session holds a place."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + limit_s
    while len(served.sessions):
        assert loop.time() < deadline_s, "the session is not freed"
        await asyncio.sleep(0.02)


def pts(frames: list[tuple[float, Any]]) -> list[int]:
    return [frame.pts for _, frame in frames]


@pytest.mark.slow
def test_no_gap_in_either_track_and_what_belongs_together_comes_together(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_and_beep(monkeypatch, FPS)
    # However busy the machine is, nothing is left out to catch up.
    monkeypatch.setattr(live, "CATCH_UP_S", 60.0)
    monkeypatch.setattr(playout, "MAX_PICTURES", 1000)
    monkeypatch.setattr(playout, "MAX_PACKETS", 5000)

    async def work() -> None:
        async with viewing(served) as viewer:
            await viewer.until(lambda: len(viewer.sounds) > 5 * 50, "no sound comes")
            pictures, sounds = list(viewer.pictures), list(viewer.sounds)
            # Stamped with the timeline of the session, whatever the clocks did.
            assert set(np.diff(pts(pictures))) == {90_000 // FPS}
            assert set(np.diff(pts(sounds))) == {960}
            bright = [frame.to_ndarray(format="gray").mean() > 128 for _, frame in pictures]
            flashes = [at for (at, _), on in zip(pictures, bright, strict=True) if on]
            loud = loudness(sounds) > 3000
            starts = np.flatnonzero(loud & ~np.roll(loud, 1))
            beeps = [sounds[i][0] for i in starts]
            assert len(flashes) >= 3 and len(beeps) >= 3
            # aiortc holds four packets of sound back, which makes 80 ms; pictures not at all.
            apart = [min(abs(beep - flash) for beep in beeps) for flash in flashes[:3]]
            print(f"arrival, sound after picture: {apart}")
            assert np.median(apart) < 0.2

    run(work())


@pytest.mark.slow
def test_what_a_microphone_hears_is_said(served: Served) -> None:
    said = MicrophoneTrack(
        np.concatenate([np.zeros(RATE_HZ // 2, "f4"), speech(1.2, RATE_HZ)[:, 0]])
    )

    async def work() -> None:
        async with viewing(served, said) as viewer:
            await viewer.event("utterance_started")
            finished = await viewer.event("utterance_finished")
            # What the gate adds: 0.2 s before it at most, 0.7 s after; whole chunks of 0.2 s.
            assert 1.2 <= finished["delivered_s"] <= 1.2 + 0.2 + 0.7 + 0.2
            await viewer.until(lambda: (loudness(viewer.sounds) > LOUD).any(), "it is not heard")

    run(work())


@pytest.mark.slow
def test_after_an_interruption_no_speech_is_heard(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, hushed = Playout.hush, []

    def hush(self: Playout) -> None:
        hushed.append(self)
        original(self)

    monkeypatch.setattr(Playout, "hush", hush)

    async def work() -> None:
        async with viewing(served) as viewer:
            await viewer.say(speech(8.0), 16_000)
            await viewer.event("utterance_started")
            await viewer.until(lambda: (loudness(viewer.sounds) > LOUD).sum() > 20, "not heard")
            answer = await post(served, f"/v1/sessions/{viewer.id}/interrupt")
            assert answer.status_code == 200
            heard = len(viewer.sounds)
            await viewer.until(lambda: len(viewer.sounds) > heard + 75, "the sound stops")
            after = loudness(viewer.sounds[heard:]) > LOUD
            # The client's jitter buffer: 4 packets, up to 16 where the machine was late.
            assert after.sum() <= 16
            assert not after[25:].any()
            assert len(hushed) == 1, "what was not sent yet is sent"

    run(work())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["peer", "socket", "server"])
def test_whoever_leaves_frees_the_session(served: Served, how: str) -> None:
    async def leave(viewer: Viewer) -> None:
        if how == "peer":
            await viewer.peer.close()
        elif how == "socket":
            await viewer.socket.close()
        else:
            await asyncio.to_thread(served.client.delete, f"/v1/sessions/{viewer.id}")

    async def work() -> None:
        async with viewing(served) as viewer:
            await viewer.until(lambda: len(viewer.pictures) > 3, "no picture comes")
            await leave(viewer)
            await none_left(served)
            gone = ("closed", "failed")
            await viewer.until(lambda: viewer.peer.connectionState in gone, "it stays connected")

    run(work())


def test_a_peer_that_does_not_connect_frees_the_session(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webrtc, "CONNECT_S", 0.2)

    async def work() -> None:
        session = await asyncio.to_thread(served.create)
        peer = RTCPeerConnection()
        answer = await post(
            served, session["offer"], {"sdp": await offer_of(peer), "type": "offer"}
        )
        assert answer.status_code == 200
        await none_left(served)
        await peer.close()

    run(work())


SDP = "v=0\r\no=- 0 0 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n"


@pytest.mark.parametrize(
    "sdp",
    [
        "hello",
        SDP,
        SDP + "m=audio 9 UDP/TLS/RTP/SAVPF 0\r\n",
        SDP + "m=audio x y z\r\na=rtpmap:zz\r\n",
        SDP + 20 * "m=video 9 UDP/TLS/RTP/SAVPF 96\r\n",
    ],
)
def test_a_bad_offer_is_refused_and_the_session_stays(served: Served, sdp: str) -> None:
    session = served.create()
    answer = served.client.post(session["offer"], json={"sdp": sdp, "type": "offer"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("offer: expected")
    assert served.client.get(f"/v1/sessions/{session['id']}").json()["state"] != "closed"
    served.client.delete(f"/v1/sessions/{session['id']}")


@pytest.mark.slow
def test_a_second_peer_is_refused_and_the_first_goes_on(served: Served) -> None:
    async def work() -> None:
        async with viewing(served) as viewer:
            other = RTCPeerConnection()
            body = {"sdp": await offer_of(other), "type": "offer"}
            answer = await post(served, f"/v1/sessions/{viewer.id}/offer", body)
            assert answer.status_code == 409
            await other.close()
            seen = len(viewer.pictures)
            await viewer.until(
                lambda: len(viewer.pictures) > seen + 5, "the first one stands still"
            )

    run(work())


@pytest.mark.slow
def test_nothing_is_received_but_one_microphone(served: Served) -> None:
    async def work() -> None:
        session = await asyncio.to_thread(served.create)
        peer = RTCPeerConnection()
        peer.addTransceiver("video", direction="sendrecv")
        for _ in range(3):
            peer.addTransceiver("audio", direction="sendrecv")
        await peer.setLocalDescription(await peer.createOffer())
        body = {"sdp": peer.localDescription.sdp, "type": "offer"}
        answer = (await post(served, session["offer"], body)).json()
        await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], "answer"))
        directions = [transceiver.currentDirection for transceiver in peer.getTransceivers()]
        assert directions == ["recvonly", "sendrecv", "inactive", "inactive"]
        await peer.close()
        await none_left(served)

    run(work())


def test_faces_are_not_blurred_by_a_low_bitrate() -> None:
    for encoder in (Vp8Encoder(), H264Encoder()):
        assert encoder.target_bitrate == 2_500_000
        encoder.target_bitrate = 100_000_000
        assert encoder.target_bitrate == 8_000_000


@pytest.mark.slow
def test_a_peer_that_is_not_connected_makes_way_for_a_socket(served: Served) -> None:
    """And for no second peer."""

    async def work() -> None:
        session = await asyncio.to_thread(served.create)
        peer, other = RTCPeerConnection(), RTCPeerConnection()
        body = {"sdp": await offer_of(peer), "type": "offer"}
        assert (await post(served, session["offer"], body)).status_code == 200
        second = {"sdp": await offer_of(other), "type": "offer"}
        assert (await post(served, session["offer"], second)).status_code == 409

        def watch() -> None:
            with Client(served, session) as client:
                assert client.frame().width == 32
                # The peer is gone, and the session is not: it goes on for longer than it takes.
                for _ in range(3 * FPS):
                    client.frame()
                # Now it is the stream that has the session.
                answer = served.client.post(session["offer"], json=second)
                assert answer.status_code == 409

        await asyncio.to_thread(watch)
        await none_left(served)
        await asyncio.gather(peer.close(), other.close())

    run(work())
