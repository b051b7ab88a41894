"""`liveact serve` as a process of its own: started, talked to, told to stop."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.support.cli import Run, refused
from tests.support.paths import PORTRAIT
from tests.support.pipeline import demo_checkpoint, speech
from tests.support.server_process import Process

TOKEN = "sesame-sesame-0123"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Callable: starts the command with more options; it is killed in the end."""
    started: list[Process] = []

    def begin(*options: object) -> Process:
        started.append(Process(tmp_path, *options))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


@pytest.fixture
def portraits(tmp_path: Path) -> Path:
    folder = tmp_path / "portraits"
    folder.mkdir()
    (folder / "me.png").write_bytes(PORTRAIT.read_bytes())
    return folder


def create(server: Process, **headers: str) -> dict[str, Any]:
    answer = httpx.post(
        f"{server.url}/v1/sessions", json={"portrait": "me"}, headers=headers, timeout=60
    )
    assert answer.status_code == 201, answer.text
    return answer.json()


@pytest.mark.slow
def test_sigterm_ends_it_when_what_is_said_is_said(start: Any, portraits: Path) -> None:
    server = start("--portraits", portraits, "--max-sessions", 2)
    session, idle = create(server), create(server)
    url = server.url.replace("http:", "ws:")
    with connect(url + idle["stream"]) as silent, connect(url + session["stream"]) as talking:
        talking.send((speech(4.0) * 32767).astype("<i2").tobytes())
        talking.send('{"type": "end_of_utterance"}')
        events: list[dict[str, Any]] = []
        spoken, signalled = 0, False
        while not events or events[-1]["type"] != "closed":
            message = talking.recv(60)
            if isinstance(message, str):
                events.append(json.loads(message))
            else:
                spoken += message[5] & 1
            if spoken == 10 and not signalled:
                signalled = True
                server.process.send_signal(signal.SIGTERM)
                _wait_for_draining(server)
                with pytest.raises(ConnectionClosed, match="1001"):  # it said nothing
                    while True:
                        silent.recv(30)
        kinds = [event["type"] for event in events]
        assert "utterance_finished" in kinds
        assert spoken == 80  # 4 s at 20 fps: all of it
        assert events[-1]["reason"] == "draining"
    assert server.process.wait(60) == 0
    assert all(session["id"] not in json.dumps(line) for line in server.log())
    names = {line["session"] for line in server.log() if line["message"] == "closed: draining"}
    assert len(names) == 2


def _wait_for_draining(server: Process) -> None:
    deadline_s = time.monotonic() + 30
    while httpx.get(f"{server.url}/readyz").status_code != 503:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    answer = httpx.post(f"{server.url}/v1/sessions", json={"portrait": "me"})
    assert answer.json()["error"]["type"] == "draining"


@pytest.mark.slow
def test_draining_is_bounded_and_a_second_signal_hurries_it(start: Any, portraits: Path) -> None:
    """One of them listens where others reach it, without a token, and says so."""
    everywhere = ["--drain-s", 1, "--host", "0.0.0.0"]
    for options, signals in ((everywhere, 1), (["--drain-s", 1000], 2)):
        server = start("--portraits", portraits, *options)
        session = create(server)
        with connect(server.url.replace("http:", "ws:") + session["stream"]) as talking:
            talking.send(np.zeros(16_000 * 30, "<i2").tobytes())  # of an utterance without end
            while "utterance_started" not in str(talking.recv(60)):
                pass
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
            assert server.process.wait(60) == 0
        warnings = [line["message"] for line in server.log() if line["level"] == "warning"]
        assert len(warnings) == (options is everywhere), warnings
        assert all(text.startswith("0.0.0.0: anybody who reaches") for text in warnings)


@pytest.mark.slow
def test_token_interrupt_from_the_keyboard_and_logs(
    start: Any, portraits: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    server = start("--token-file", tmp_path / "token", "--portraits", portraits)
    assert httpx.get(f"{server.url}/v1/portraits").status_code == 401
    session = create(server, Authorization=f"Bearer {TOKEN}")
    assert server.stop(signal.SIGINT) == 0
    log = server.log()
    assert {"time", "level", "logger", "message"} <= log[0].keys()
    request = next(line for line in log if line["message"] == "request" and line["status"] == 201)
    assert (request["method"], request["route"]) == ("POST", "/v1/sessions")
    text = json.dumps(log)
    assert TOKEN not in text and session["id"] not in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--port", 70_000], "port: expected a whole number from 0 to 65535"),
        (["--max-sessions", 0], "max-sessions: expected"),
        (["--size", "33x32"], "expected multiples of 16"),
        (["--fps", 0], "fps: expected"),
        (["--drain-s", "nan"], "drain-s: expected"),
        (["--allow-origin", "example.com"], "allow-origin: expected an origin such as"),
        (["--allow-origin", "https://example.com/"], "allow-origin: expected"),
        (["--host", "nowhere.invalid"], "nowhere.invalid:0: expected an address to listen at"),
        (["--token-file", "{tmp}/none"], "none: expected a file with a token"),
        (["--token-file", "{tmp}/short"], "short: expected a token of 16 to 512"),
        (["--portraits", "{tmp}/empty"], "empty: expected pictures"),
        (["--portraits", "{tmp}/none"], "none: expected a directory"),
        (["--portraits", "{tmp}/broken"], "me.png: expected an image"),
        (["--prompts", "{tmp}/short"], "short: expected JSON"),
        (["--checkpoint", "{tmp}/empty"], "expected"),
    ],
)
def test_what_cannot_be_served(
    run: Run, tmp_path: Path, options: list[object], expected: str
) -> None:
    (tmp_path / "short").write_text("secret")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "me.png").write_text("no picture")
    given = [str(option).format(tmp=tmp_path) for option in options]
    defaults = ["--checkpoint", demo_checkpoint(), "--port", 0, "--size", "32x32"]
    answer = run("serve", *defaults, *given)
    refused(answer, expected)
    assert "secret" not in answer[2]


def test_a_port_that_is_taken(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(run("serve", "--checkpoint", demo_checkpoint(), "--port", port), "in use")


def test_without_the_packages_of_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liveact.commands.serve.PACKAGES", ("fastapi", "no_such_package"))
    answer = run("serve", "--checkpoint", demo_checkpoint())
    refused(answer, r"expected the package no_such_package.*pip install liveact-engine\[serve\]")
