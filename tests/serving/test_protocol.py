"""What docs/protocol.md says, seen by a client that was written from it."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator

import av
import numpy as np
import pytest
from PIL import Image

from liveact.engine import Engine
from liveact.serve.encoders import Stills
from liveact.session import aio
from liveact.session.pacing import Frame
from tests.support.paths import PORTRAIT
from tests.support.pipeline import speech
from tests.support.server import Client, Served, Shown, serving, upload
from tests.support.session import Gate, decoder_of, fail

FPS = 20


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine) as found:
        yield found


@pytest.fixture(autouse=True)
def none_is_open(served: Served) -> Iterator[None]:
    yield
    served.wait_until_free()


def say(client: Client, seconds: float, rate_hz: int = 16_000, channels: int = 1) -> None:
    client.hear(speech(seconds, rate_hz, channels), rate_hz)
    client.say(type="end_of_utterance")


def in_order(frames: list[Shown]) -> bool:
    return [f.number for f in frames] == list(
        range(frames[0].number, frames[0].number + len(frames))
    )


# ---------------------------------------------------------------------------------- the stream


def test_what_is_said_comes_out_to_its_last_frame(served: Served) -> None:
    with served.talk() as client:
        ready = client.event("ready")
        assert ready | {"width": 32, "height": 32, "fps": FPS, "sample_rate_hz": 48_000} == ready
        say(client, 1.2)
        before = client.frames_until("utterance_started")
        frames = client.frames_until("utterance_finished")
        assert not any(frame.speech for frame in before)
        spoken = [frame for frame in frames if frame.speech]
        assert len(spoken) == 1.2 * FPS
        assert [frame.last_of_utterance for frame in spoken] == [False] * 23 + [True]
        assert client.events[-1]["delivered_s"] == pytest.approx(1.2)
        sound = np.concatenate([frame.pcm for frame in spoken])
        assert len(sound) == 1.2 * 48_000
        assert np.abs(sound).max() > 1000
        assert in_order([*before, *frames])
        assert Image.open(io.BytesIO(spoken[0].picture)).size == (32, 32)


def test_frames_come_on_one_clock_while_nobody_speaks(served: Served) -> None:
    with served.talk("rgb24") as client:
        frames = [client.frame() for _ in range(2 * FPS)]
        stats = client.event("stats")
        assert stats["frames"] <= stats["age_s"] * FPS + 1  # none is early
        assert in_order(frames)
        for frame in frames:
            assert (frame.kind, frame.width, frame.height) == (2, 32, 32)
            assert len(frame.picture) == 32 * 32 * 3
            assert len(frame.pcm) == 48_000 / FPS
            assert not frame.speech and not frame.pcm.any()


def test_interruption_stops_at_once(served: Served) -> None:
    with served.talk() as client:
        say(client, 12.0)  # more than the session holds
        client.event("utterance_started")
        shown = [client.frame() for _ in range(10)]
        client.say(type="interrupt")
        shown += client.frames_until("interrupted")
        cut = client.events[-1]
        # A frame on its way was counted, and is silent.
        silenced = round(cut["delivered_s"] * FPS) - sum(frame.speech for frame in shown)
        assert silenced in (0, 1)
        say(client, 1.0)
        between = client.frames_until("utterance_started")
        assert not any(frame.speech for frame in between)
        after = client.frames_until("utterance_finished")
        assert in_order([*shown, *between, *after])
        spoken = [frame for frame in after if frame.speech]
        assert len(spoken) == FPS
        assert {frame.utterance for frame in spoken} == {cut["utterance"] + 1}
        finished = [e["utterance"] for e in client.events if e["type"] == "utterance_finished"]
        assert finished == [cut["utterance"] + 1]


def test_a_frame_that_is_on_its_way_is_silenced(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption comes while a frame of speech is being encoded."""
    encode, entered, interrupted = Stills.encode, threading.Event(), threading.Event()

    def held(stills: Stills, frame: Frame) -> list[bytes]:
        if frame.speech and not interrupted.is_set():
            entered.set()
            assert interrupted.wait(30)
        return encode(stills, frame)

    monkeypatch.setattr(Stills, "encode", held)
    with served.talk() as client:
        say(client, 4.0)
        assert entered.wait(30)
        client.say(type="interrupt")
        before = client.frames_until("interrupted")
        interrupted.set()
        after = [client.frame() for _ in range(5)]
        assert in_order([*before, *after])
        assert not any(frame.speech or frame.pcm.any() for frame in [*before, *after])


def test_sound_that_is_being_taken_is_dropped(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption comes while the session is being given sound that was sent before."""
    as_float, entered, interrupted = aio.as_float, threading.Event(), threading.Event()

    def held(pcm: np.ndarray) -> np.ndarray:
        entered.set()
        assert interrupted.wait(30)
        return as_float(pcm)

    with served.talk() as client:
        client.frame()
        monkeypatch.setattr(aio, "as_float", held)
        client.hear(speech(1.0))
        assert entered.wait(30)
        client.say(type="interrupt")
        client.event("interrupted")
        interrupted.set()
        for _ in range(5):
            client.frame()
        found = served.client.get(f"/v1/sessions/{client.id}").json()
        assert (found["state"], found["backlog_s"]) == ("idling", 0)


def test_the_film_in_fragments_plays(served: Served) -> None:
    with served.talk("fmp4") as client:
        ready = client.event("ready")
        assert ready["mime_type"].startswith("video/mp4; codecs=")
        client.hear(speech(1.0), 16_000)
        client.say(type="end_of_utterance")
        segments: list[bytes] = []
        while "utterance_finished" not in [event["type"] for event in client.events]:
            message = client.socket.recv(30)
            if isinstance(message, bytes):
                segments.append(message)
            else:
                client.events.append(json.loads(message))
    assert segments[0][4:8] == b"ftyp" and b"moov" in segments[0]
    assert all(segment[4:8] == b"moof" for segment in segments[1:])
    with av.open(io.BytesIO(b"".join(segments))) as film:
        codecs = [stream.codec_context.name for stream in film.streams]
        assert codecs == ["h264", "aac"]
        pictures = [frame.pts * frame.time_base for frame in film.decode(video=0)]
    steps = np.diff([float(at) for at in pictures])
    assert len(pictures) >= FPS
    assert np.allclose(steps, 1 / FPS, atol=1e-3)


def test_a_stream_of_events_ends_the_session_too(served: Served) -> None:
    session = served.create()
    with Client(served, session, "events") as events, Client(served, session) as pictures:
        pictures.frame()
        say(events, 1.0)  # sound may come by either
        assert events.event("utterance_finished")["delivered_s"] == pytest.approx(1.0)
        events.socket.close()
        assert pictures.end() == (1000, "disconnected")


def test_sound_of_any_rate_and_a_change_of_it(served: Served) -> None:
    with served.talk() as client:
        client.hear(speech(1.0, 24_000), 24_000)
        client.hear(speech(1.0, 44_100, 2), 44_100)  # another format: another utterance
        client.say(type="end_of_utterance")
        for _ in range(2):
            assert client.event("utterance_finished")["delivered_s"] == pytest.approx(1.0)


def test_of_an_open_microphone_what_is_said_becomes_utterances(served: Served) -> None:
    quiet = np.zeros((16_000, 1), np.float32)
    heard = np.concatenate([quiet, speech(1.2), quiet, speech(0.8), quiet])
    with served.talk() as client:
        client.say(type="audio", sample_rate_hz=16_000, channels=1, gate=True)
        client.hear(heard)
        # What the gate adds: 0.2 s before at most, 0.7 s after; whole chunks of 0.2 s.
        for seconds in (1.2, 0.8):
            delivered_s = client.event("utterance_finished")["delivered_s"]
            assert seconds <= delivered_s <= seconds + 0.2 + 0.7 + 0.2 + 1e-6
        client.say(type="audio", sample_rate_hz=16_000, channels=1, gate=True)
        client.hear(speech(0.6))
        client.say(type="end_of_utterance")  # nobody waits for quiet
        assert client.event("utterance_finished")["delivered_s"] <= 0.6 + 0.2 + 1e-6


def test_sound_beyond_the_limit_is_refused_and_the_rest_goes_on(served: Served) -> None:
    with served.talk() as client:
        client.say(type="audio", sample_rate_hz=4000)
        for _ in range(8):
            client.socket.send(bytes(2 * 4000 * 10))  # 10 s
        assert client.event("error")["code"] == "backlog_full"
        client.say(type="interrupt")
        client.event("interrupted")
        say(client, 1.0)
        client.event("utterance_finished")


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("no json", "bad_message"),
        ("[]", "bad_message"),
        ('{"type": "fly"}', "bad_message"),
        ('{"type": "ping", "more": 1}', "bad_message"),
        ('{"type": "audio", "sample_rate_hz": 1}', "bad_message"),
        ('{"type": "audio", "sample_rate_hz": 16000, "channels": 3}', "bad_message"),
        ('{"type": "prompt", "prompt": ""}', "bad_message"),
        ('{"type": "ping", "id": ' + "1" * 20_000 + "}", "bad_message"),
        (b"\0", "bad_audio"),
    ],
)
def test_what_cannot_be_used_is_an_error_and_the_stream_goes_on(
    served: Served, sent: str | bytes, code: str
) -> None:
    with served.talk("events") as client:
        client.socket.send(sent)
        error = client.event("error")
        assert error["code"] == code
        assert "\n" not in error["message"]
        client.say(type="ping", id=7)
        assert client.event("pong")["id"] == 7


def test_prompt_ping_and_close(served: Served) -> None:
    with served.talk() as client:
        client.say(type="prompt", prompt="A person is smiling.")
        assert client.event("prompt_changed")["prompt"] == "A person is smiling."
        client.say(type="ping")
        assert client.event("pong")["id"] is None
        client.say(type="close")
        assert client.end() == (1000, "closed")
        assert client.events[-1] == {"type": "closed", "reason": "closed"}


def test_prompts_are_changed_in_order_and_only_some_wait(served: Served) -> None:
    """While the text encoder is busy."""
    with served.talk("events") as client:
        live = served.sessions.get(client.id)
        gate = Gate(live.session, "set_prompt")
        for number in range(10):
            client.say(type="prompt", prompt=f"A person, {number}.")
        client.say(type="ping")
        client.event("pong")
        errors = [event["code"] for event in client.events if event["type"] == "error"]
        assert errors == ["too_many_prompts"] * 2
        path = f"/v1/sessions/{client.id}/prompt"
        answer = served.client.post(path, json={"prompt": "A person."})
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "too_many_prompts"
        gate.open()
        changed = [client.event("prompt_changed")["prompt"] for _ in range(8)]
        assert changed == [f"A person, {number}." for number in range(8)]


def test_a_session_that_fails_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with served.talk() as client:
        client.frame()
        monkeypatch.setattr(decoder_of(served.sessions.get(client.id).session), "decode", fail)
        assert client.end() == (4500, "failed")
        last = [event for event in client.events if event["type"] != "stats"][-2:]
        assert [event["type"] for event in last] == ["error", "closed"]
        assert last[0]["code"] == "session_failed"


def test_statistics_come_every_second(served: Served) -> None:
    with served.talk() as client:
        client.frame()
        found = [client.event("stats") for _ in range(2)]
        assert found[0]["state"] == "idling"
        assert found[1]["frames"] > found[0]["frames"]
        assert found[1]["age_s"] - found[0]["age_s"] > 0.9


# ---------------------------------------------------------------------------------------- HTTP


def test_a_session_over_http(served: Served) -> None:
    session = served.create(prompt="A person.", width=48, height=32, fps=25, seed=1, idle="wait")
    path = f"/v1/sessions/{session['id']}"
    assert session == {
        "id": session["id"],
        "expires_s": 15.0,
        "stream": f"{path}/stream",
        "offer": f"{path}/offer",
        "width": 48,
        "height": 32,
        "fps": 25.0,
        "sample_rate_hz": 48_000,
    }
    assert served.client.get(path).json()["state"] == "waiting"
    answer = served.client.post(f"{path}/prompt", json={"prompt": "A sad person."})
    assert answer.status_code == 204
    answer = served.client.post(f"{path}/interrupt")
    assert answer.json() == {"utterance": 0, "delivered_s": 0.0}
    assert served.client.delete(path).status_code == 204
    assert len(served.sessions) == 0
    for gone in (served.client.get(path), served.client.delete(path)):
        assert gone.status_code == 404
        assert gone.json()["error"]["type"] == "not_found"


def test_a_portrait_that_is_sent(served: Served) -> None:
    session = served.create(portrait=upload(PORTRAIT.read_bytes()))
    with Client(served, session) as client:
        client.frame()


def test_portraits_have_names_and_thumbnails(served: Served) -> None:
    (found,) = served.client.get("/v1/portraits").json()
    assert found["name"] == "me"
    answer = served.client.get(found["thumbnail"])
    assert answer.headers["content-type"] == "image/png"
    assert max(Image.open(io.BytesIO(answer.content)).size) == 256


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"portrait": "nobody"}, 404, "not_found"),
        ({"portrait": "../me"}, 404, "not_found"),
        ({"portrait": {"data": "%%%"}}, 400, "bad_request"),
        ({"portrait": upload(b"GIF89a no picture")}, 400, "bad_request"),
        ({"portrait": upload(PORTRAIT.read_bytes()[:5000])}, 400, "bad_request"),
        ({"width": 33}, 400, "bad_request"),
        ({"width": 4096, "height": 4096}, 400, "bad_request"),
        ({"fps": 99}, 400, "bad_request"),
        ({"fps": "20"}, 400, "bad_request"),
        ({"seed": 2**70}, 400, "bad_request"),
        ({"idle": "dance"}, 400, "bad_request"),
        ({"prompt": "x" * 2001}, 400, "bad_request"),
        ({"colour": "red"}, 400, "bad_request"),
    ],
)
def test_what_cannot_be_opened(
    served: Served, fields: dict[str, object], status: int, kind: str
) -> None:
    answer = served.client.post("/v1/sessions", json={"portrait": "me"} | fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == kind
    assert error["message"] and "\n" not in error["message"]
    assert len(served.sessions) == 0


def test_streams_that_are_refused(served: Served) -> None:
    """Before the upgrade, as an answer with a body."""
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }

    def refusal(path: str) -> tuple[int, str]:
        answer = served.client.get(path, headers=headers)
        return answer.status_code, answer.json()["error"]["type"]

    session = served.create()
    with Client(served, session), Client(served, session, "events"):
        assert refusal(session["stream"]) == (409, "busy")
        assert refusal(session["stream"] + "?format=events") == (409, "busy")
        assert refusal(session["stream"] + "?format=gif") == (400, "bad_format")
        assert refusal("/v1/sessions/nobody/stream") == (404, "not_found")


def test_probes_and_metrics(served: Served) -> None:
    assert served.client.get("/healthz").json() == {"status": "ok"}
    assert served.client.get("/readyz").json() == {"status": "ready"}
    with served.talk() as client:
        say(client, 2.0)
        client.event("utterance_started")
        client.say(type="interrupt")
        client.event("interrupted")
        client.frame()
        text = served.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["liveact_sessions_opened_total"]) >= 1
    assert sum(float(v) for n, v in values.items() if n.startswith("liveact_sessions{")) == 1
    for name in ("first_frame", "speech_to_frame", "interrupt"):
        assert float(values[f"liveact_{name}_seconds_count"]) >= 1, name
    assert float(values['liveact_frames_total{kind="speech"}']) >= 1
    assert float(values['liveact_memory_free_bytes{pool="host"}']) > 0
