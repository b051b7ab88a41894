"""A session and its stream in one connection, as docs/protocol.md says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from liveact.engine import Engine
from tests.support.pipeline import speech
from tests.support.server import DirectClient, Served, serving
from tests.support.session import wait_until


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine) as found:
        yield found


def started(served: Served, **fields: Any) -> DirectClient:
    client = DirectClient(served.url, served.schemas)
    client.say(type="start", portrait="me", **fields)
    return client


def test_one_connection_is_enough(served: Served) -> None:
    with started(served, width=48, height=32, fps=30) as client:
        ready = client.event("ready")
        assert (ready["width"], ready["height"], ready["fps"]) == (48, 32, 30)
        client.hear(speech(2.0))
        client.say(type="end_of_utterance")
        frames = client.frames_until("utterance_finished")
        assert sum(frame.speech for frame in frames) == 60
    wait_until(lambda: len(served.sessions) == 0, "the session outlives its connection")


def test_where_there_is_no_place_the_first_message_is_answered_with_one(served: Served) -> None:
    with started(served) as one, started(served) as other:
        one.event("ready"), other.event("ready")
        with started(served) as third:
            refused = third.event("refused")
            assert refused["code"] == "full" and refused["position"] == 1
            assert refused["retry_after_s"] > 0 and refused["ticket"]
            with pytest.raises(ConnectionClosed) as closed:
                third.next()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 4503


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ('{"type": "start"}', "bad_start"),
        ('{"type": "start", "portrait": "nobody"}', "not_found"),
        ('{"type": "start", "portrait": "me", "width": 40}', "bad_request"),
        ('{"type": "ping"}', "bad_start"),
        ("[" * 10_000, "bad_start"),
        (b"\0\0", "bad_start"),
    ],
)
def test_a_bad_start_is_answered_with_one_line(
    served: Served, first: str | bytes, code: str
) -> None:
    with DirectClient(served.url, served.schemas) as client:
        client.socket.send(first)
        refused = client.event("refused")
        assert refused["code"] == code and "\n" not in refused["message"]
        with pytest.raises(ConnectionClosed) as closed:
            client.next()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 4400
    assert len(served.sessions) == 0


def test_a_token_and_an_origin_are_asked_for(engine: Engine) -> None:
    with serving(engine, token="sesame-sesame-0123") as served:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer sesame-sesame-0124"}, 401),
            ({"Authorization": "Bearer sesame-sesame-0123", "Origin": "https://a.example"}, 403),
        ):
            with pytest.raises(InvalidStatus) as refused:
                connect(f"{served.url.replace('http', 'ws')}/v1/stream", additional_headers=headers)
            assert refused.value.response.status_code == status


def test_who_says_nothing_is_let_go(engine: Engine) -> None:
    with (
        serving(engine, request_s=0.2) as served,
        DirectClient(served.url, served.schemas) as client,
    ):
        assert client.event("refused")["code"] == "too_slow"
