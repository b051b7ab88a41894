"""Debian's chromium on a page of `liveact serve`, without a screen, a microphone or a network."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Page,
    TimeoutError,
    WebSocket,
    sync_playwright,
)

LIMIT_S = 60.0
# So that tests can ask the browser what it measured of its own connections.
KEEP_PEERS = """
  window.peers = [];
  window.RTCPeerConnection = class extends RTCPeerConnection {
    constructor(...given) { super(...given); window.peers.push(this); }
  };
"""
# A network without UDP, as WebRTC finds it: no candidate, so that it tries until it gives up.
NO_WAY_THROUGH = """
  window.RTCPeerConnection = class extends RTCPeerConnection {
    constructor(given) { super({ ...given, iceServers: [], iceTransportPolicy: "relay" }); }
  };
"""
NO_WEBRTC = "delete window.RTCPeerConnection;"
# So that tests can listen to what a page plays without an element.
KEEP_OUTPUTS = """
  window.outputs = [];
  const connect = AudioNode.prototype.connect;
  AudioNode.prototype.connect = function (to, ...rest) {
    if (to instanceof AudioDestinationNode) outputs.push(this);
    return connect.call(this, to, ...rest);
  };
"""


def script(name: str) -> str:
    """A function of one argument beside this file, that has those of peaks.js."""
    peaks, own = ((Path(__file__).parent / file).read_text() for file in ("peaks.js", name))
    return f"async (given) => {{\n{peaks}\nreturn ({own.strip()}\n)(given);\n}}"


MEASURE = script("measure.js")  # what a visitor to WebRTC sees and hears
FLASHES = script("flashes.js")  # the same over a WebSocket, of what flashes and beeps
STATS = """async () => {
  const found = {};
  for (const report of (await peers.at(-1).getStats()).values()) {
    if (report.type === "inbound-rtp") found[report.kind] = report;
  }
  return found;
}"""


def chromium() -> str:
    """The program; skips the test where there is none."""
    given = os.environ.get("CHROMIUM")
    found = given or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no browser found: expected chromium on the PATH, or its name in $CHROMIUM")
    return found


@contextlib.contextmanager
def visiting(browser: Browser, url: str, script: str = "", **options: Any) -> Iterator[Visitor]:
    """Somebody at the page, whose browser has nothing to complain of.

    script: that runs before those of the page. options: of the browser's context.
    """
    options = {"viewport": {"width": 480, "height": 900}} | options
    context = browser.new_context(**options)
    try:
        visitor = Visitor(context, url, script)
        yield visitor
        assert visitor.complaints == []
        assert all(asked.startswith((url, "blob:", "data:")) for asked in visitor.asked)
    finally:
        context.close()


@contextlib.contextmanager
def browsing(microphone: Path) -> Iterator[Browser]:
    """A browser whose microphone hears a WAV file, again and again."""
    program = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            args=[
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={microphone}",
                "--autoplay-policy=no-user-gesture-required",
                "--allow-loopback-in-peer-connection",  # where there is no other interface
            ],
        )
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """Somebody at the page.

    Attributes:
        page: for what has no method here.
        complaints: what the browser had to say: errors, warnings, violations of the page's policy.
        asked: addresses of everything that was requested.
        sessions: ids, in the order in which they were opened.
        streams: WebSockets: what follows the id in their addresses.
        events: of all of them.
    """

    def __init__(self, context: BrowserContext, url: str, script: str = "") -> None:
        context.set_default_timeout(LIMIT_S * 1000)
        context.add_init_script(KEEP_PEERS + script)
        self.page: Page = context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.page.on("console", self._note)
        self.sessions: list[str] = []
        self.streams: list[str] = []
        self.page.on("websocket", self._note_socket)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def _note(self, message: Any) -> None:
        refused = ("401 (Unauthorized)", "503 (Service Unavailable)")  # which the page handles
        if message.type in ("error", "warning") and not any(one in message.text for one in refused):
            self.complaints.append(message.text)

    def _note_socket(self, socket: WebSocket) -> None:
        id, _, stream = socket.url.split("/sessions/")[1].partition("/")
        if id not in self.sessions:
            self.sessions.append(id)
        self.streams.append(stream)
        socket.on("framereceived", self._hear)

    def _hear(self, frame: str | bytes) -> None:
        if isinstance(frame, str):
            self.events.append(json.loads(frame))

    def start(self) -> None:
        """Until the first picture is there."""
        self.page.wait_for_selector(".tile img")
        self.page.click("#start")
        try:
            self.page.wait_for_selector(".stage.shows")
        except TimeoutError as error:
            line, streams = self.page.inner_text("#state"), self.streams[-2:]
            what = f"no picture: {line!r}, error {self.error!r}, streams {streams}"
            raise AssertionError(f"{what}, the browser says {self.complaints}") from error

    def until(self, condition: Callable[[], Any], message: str, limit_s: float = LIMIT_S) -> None:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline_s, message
            self.page.wait_for_timeout(50)

    def event(self, kind: str) -> dict[str, Any]:
        """The last event of a kind, which is waited for."""
        self.until(lambda: self.events_of(kind), f"no {kind}")
        return self.events_of(kind)[-1]

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    @property
    def error(self) -> str:
        """The line that is shown; empty where there is none."""
        return self.page.inner_text("#error") if self.page.is_visible("#error") else ""

    @property
    def stats(self) -> dict[str, dict[str, Any]]:
        """What the browser says of the `audio` and the `video` that arrive."""
        return self.page.evaluate(STATS)

    @property
    def heard(self) -> float:
        """Energy of the sound so far: grows only while something is heard."""
        return float(self.stats.get("audio", {}).get("totalAudioEnergy", 0.0))

    def measure(self, seconds: float, part: tuple[float, ...], side: int = 16) -> Measured:
        """What is seen and heard for so long. Needs a context without the page's policy, which
        would not let a worklet of the test's in."""
        given = {"part": part, "seconds": seconds, "side": side}
        return Measured.of(self.page.evaluate(MEASURE, given))


@dataclass(frozen=True)
class Measured:
    """Times are those of one clock, in seconds.

    Attributes:
        shown_s: when each picture was shown, [n].
        grey: pixels of the part of it that was asked for, [n, side², 0 to 255].
        heard_s: of every 128 samples of sound, [m].
        peaks: the largest of those samples, [m], 0 to 1.
    """

    shown_s: np.ndarray
    grey: np.ndarray
    heard_s: np.ndarray
    peaks: np.ndarray

    @classmethod
    def of(cls, found: dict[str, Any]) -> Measured:
        pictures, sounds = found["pictures"], found["sounds"]
        return cls(
            np.array([picture["ms"] for picture in pictures]) / 1000,
            np.array([picture["grey"] for picture in pictures], float),
            np.array([ms for ms, _ in sounds]) / 1000,
            np.array([peak for _, peak in sounds]),
        )
