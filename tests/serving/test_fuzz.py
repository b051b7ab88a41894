"""Requests made from the server's own schema, and messages that nobody would send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from liveact.engine import Engine
from tests.support.server import Client, Served, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 25  # of each operation
MESSAGES = 60
QUIET = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine, attach_s=0.2, max_pixels=64 * 64) as found:
        yield found


@pytest.mark.slow
def test_requests_from_the_schema_get_answers_of_the_schema(served: Served) -> None:
    document = served.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = served.url
    operations = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        operations += 1

        @given(case=operation.as_strategy())
        @settings(QUIET, max_examples=EXAMPLES)
        def ask(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        ask()
    assert operations >= 10
    assert served.client.get("/healthz").status_code == 200
    served.wait_until_free()


numbers = st.one_of(st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=5))
kinds = st.sampled_from(
    ["audio", "end_of_utterance", "interrupt", "prompt", "ping", "ready", "", "AUDIO"]
)
objects = st.fixed_dictionaries(
    {"type": st.one_of(kinds, numbers)},
    optional={
        "sample_rate_hz": st.one_of(st.integers(4000, 384_000), numbers),
        "channels": st.one_of(st.sampled_from([1, 2]), numbers),
        "prompt": st.one_of(st.text(max_size=30), numbers),
        "id": numbers,
        "more": numbers,
    },
)
messages = st.one_of(
    objects.map(json.dumps),
    st.text(max_size=100),
    st.recursive(numbers, lambda inner: st.lists(inner, max_size=3)).map(json.dumps),
    st.binary(max_size=4000),
)


@pytest.mark.slow
def test_messages_that_nobody_would_send(engine: Engine) -> None:
    """The stream answers each that it cannot use, and goes on."""
    with (
        serving(engine, attach_s=600) as served,  # one takes no pictures
        served.talk("events") as client,
        served.talk() as pictures,
    ):

        @given(st.lists(messages, max_size=10))
        @settings(QUIET, max_examples=MESSAGES)
        def send(sent: list[str | bytes]) -> None:
            for stream in (client, pictures):
                _send_and_ask(stream, sent)

        send()
        pictures.say(type="interrupt")
        pictures.event("interrupted")
        pictures.frame()


def _send_and_ask(stream: Client, sent: list[str | bytes]) -> None:
    for message in sent:
        stream.socket.send(message)
    stream.say(type="ping", id=-1)
    while (pong := stream.event("pong"))["id"] != -1:
        assert pong
    stream.events.clear()
