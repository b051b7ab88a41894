"""The page where WebRTC finds no way through: a real browser that goes on over a WebSocket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from liveact.engine import Engine
from liveact.serve.errors import Busy
from liveact.serve.live import LiveSession
from liveact.session.chunk import Interruption
from liveact.session.pacing import Frame
from tests.support.browser import (
    FLASHES,
    KEEP_OUTPUTS,
    LIMIT_S,
    NO_WAY_THROUGH,
    NO_WEBRTC,
    Visitor,
    visiting,
)
from tests.support.pipeline import speech, write_wav
from tests.support.server import Served, flash_and_beep, serving

pytestmark = pytest.mark.slow

RATE_HZ, FPS = 48_000, 20
SIZE = (64, 64)
PROMPTS = {"neutral": "A person is speaking.", "smiling": "A person smiles."}
APART_S = 0.08  # from which on viewers notice: ITU-R BT.1359 has +45 and -125 ms for experts
# Every pixel that is shown.
LOOK = """() => {
  const paint = new OffscreenCanvas(64, 64).getContext("2d", { willReadFrequently: true });
  paint.drawImage(document.getElementById("canvas"), 0, 0);
  const { data } = paint.getImageData(0, 0, 64, 64);
  return Array.from(data.filter((_, i) => i % 4 !== 3));
}"""
# The loudest of the last 2048 samples that go to the loudspeaker.
LOUDNESS = """() => {
  const output = window.outputs.findLast((node) => node instanceof GainNode);
  window.analyser ??= new AnalyserNode(output.context, { fftSize: 2048 });
  output.connect(window.analyser);
  const samples = new Float32Array(2048);
  window.analyser.getFloatTimeDomainData(samples);
  return samples.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
}"""
# Clicks, and returns when so many seconds of sound have been played since.
PRESS_AND_LISTEN = """async ([button, seconds]) => {
  const { context } = window.outputs.at(-1);
  document.querySelector(button).click();
  const begunS = context.currentTime;
  while (context.currentTime < begunS + seconds) await new Promise((done) => setTimeout(done, 2));
}"""
# Its ramp (exp(-8) is 3e-4), the samples of LOUDNESS, and a fourth for the browser's own thread.
HUSHED_S = 1.25 * (8 * 0.005 + 2048 / RATE_HZ)


# Every line of the state, from now on.
KEEP_LINES = """() => {
  const state = document.getElementById("state");
  window.lines = [];
  new MutationObserver(() => lines.push(state.textContent)).observe(state, { childList: true });
}"""


@pytest.fixture(scope="module")
def served(engine: Engine, microphone: Path) -> Iterator[Served]:
    with serving(engine, size=SIZE, prompts=PROMPTS, example=microphone) as found:
        yield found


@pytest.fixture
def visitor(browser: Browser, served: Served) -> Iterator[Visitor]:
    """Where there is no WebRTC at all."""
    with visiting(browser, served.url, NO_WEBRTC + KEEP_OUTPUTS) as found:
        yield found
    served.wait_until_free(20)


def test_where_webrtc_finds_no_way_the_same_session_goes_on(
    browser: Browser, served: Served
) -> None:
    with visiting(browser, served.url, NO_WAY_THROUGH) as visitor:
        visitor.page.wait_for_selector(".tile img")
        visitor.page.evaluate(KEEP_LINES)
        visitor.start()
        lines = visitor.page.evaluate("lines")
        assert "WebRTC finds no way through: connecting over a WebSocket…" in lines
        assert visitor.streams == ["stream?format=events", "stream?format=jpeg"]
        assert len(visitor.sessions) == 1 and len(served.sessions) == 1
        visitor.until(lambda: "over\u00a0WebSocket" in visitor.page.inner_text("#meter"), "no word")
        first = visitor.page.evaluate(LOOK)
        assert np.mean(first) > 80 and np.std(first) > 5, "black"
        visitor.until(lambda: visitor.page.evaluate(LOOK) != first, "the picture stands still")
    served.wait_until_free(20)


def test_what_is_said_into_the_microphone_becomes_utterances(visitor: Visitor) -> None:
    visitor.start()
    visitor.page.click("#talk")
    visitor.page.wait_for_selector("#talk >> text=Listening")
    visitor.until(lambda: len(visitor.events_of("utterance_finished")) >= 2, "no two utterances")
    visitor.until(lambda: "speech" in visitor.page.inner_text("#meter"), "no answer")
    visitor.until(lambda: visitor.page.evaluate(LOUDNESS) > 0.01, "nothing is heard")
    visitor.page.click("#talk")
    visitor.page.wait_for_selector("#talk >> text=Talk")


def test_an_interruption_is_silence_and_what_comes_next_is_heard(
    visitor: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, answer = LiveSession.interrupt, threading.Event()

    async def interrupt(self: LiveSession) -> Interruption:
        await asyncio.to_thread(answer.wait, LIMIT_S)
        return await original(self)

    monkeypatch.setattr(LiveSession, "interrupt", interrupt)
    visitor.start()
    long = write_wav(tmp_path / "long.wav", speech(20.0, RATE_HZ), RATE_HZ)
    visitor.page.set_input_files("#file", long)
    visitor.until(lambda: visitor.page.evaluate(LOUDNESS) > 0.01, "nothing is heard")
    try:
        visitor.page.evaluate(PRESS_AND_LISTEN, ["#interrupt", HUSHED_S])
        assert visitor.page.evaluate(LOUDNESS) < 1e-3, "it speaks until the server has answered"
    finally:
        answer.set()
    visitor.event("interrupted")
    for _ in range(20):
        assert visitor.page.evaluate(LOUDNESS) < 1e-3, "what is buffered is heard after all"
        visitor.page.wait_for_timeout(50)
    visitor.events.clear()
    assert visitor.event("stats")["backlog_s"] == 0
    visitor.page.click("#example")
    visitor.until(lambda: visitor.page.evaluate(LOUDNESS) > 0.01, "the example is not heard")


def test_where_webrtc_came_through_too_late_another_session_is_opened(
    browser: Browser, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has begun to send when the page has just given up."""
    original, taken = LiveSession.frames, []

    def frames(self: LiveSession, *, reserved: bool = False) -> AsyncIterator[Frame]:
        if not taken:
            taken.append(self.id)
            raise Busy
        return original(self, reserved=reserved)

    monkeypatch.setattr(LiveSession, "frames", frames)
    with visiting(browser, served.url, NO_WAY_THROUGH) as visitor:
        visitor.start()
        assert visitor.error == ""
        assert len(visitor.sessions) == 2 and visitor.sessions[0] == taken[0]
        assert len(served.sessions) == 1
        visitor.complaints.clear()  # the socket that was refused
    served.wait_until_free(20)


def starts_s(found: list[list[float]], threshold: float) -> np.ndarray:
    """When values [ms, value] rise above a threshold, [n]."""
    ms, values = np.array(found).T
    on = values > threshold
    return ms[1:][on[1:] & ~on[:-1]] / 1000


def test_pictures_are_shown_when_their_sound_is_heard(
    browser: Browser, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_and_beep(monkeypatch, FPS)
    # The test's own worklet is not of the page.
    with visiting(browser, served.url, NO_WEBRTC + KEEP_OUTPUTS, bypass_csp=True) as visitor:
        visitor.start()
        found = visitor.page.evaluate(FLASHES, 8)
    served.wait_until_free(20)
    drawn_s = float(np.percentile(np.diff([ms for ms, _ in found["pictures"]]), 90)) / 1000
    if drawn_s > APART_S / 2:
        pytest.skip(f"this machine is too busy to draw: a picture every {drawn_s:.3f} s")
    flashes = starts_s(found["pictures"], 128)
    beeps = starts_s(found["sounds"], 0.25)
    apart = [float(flash - beeps[np.abs(beeps - flash).argmin()]) for flash in flashes]
    print(f"picture after sound: {np.round(apart, 3)}; drawn every {drawn_s:.3f} s")
    assert len(apart) >= 3
    assert abs(np.median(apart)) <= APART_S


def test_prompts_reloads_and_the_end(visitor: Visitor, served: Served) -> None:
    visitor.start()
    visitor.page.click("text=smiling")
    assert visitor.event("prompt_changed")["prompt"] == PROMPTS["smiling"]
    visitor.page.reload()
    served.wait_until_free(20)
    visitor.start()
    visitor.page.click("#end")
    served.wait_until_free(20)
    assert visitor.page.is_visible("#start") and visitor.error == ""


def test_a_lost_connection_comes_back_the_same_way(visitor: Visitor, served: Served) -> None:
    visitor.start()
    (before,) = visitor.sessions
    served.call(served.sessions.get(before).close("stalled"))
    visitor.until(lambda: len(visitor.sessions) == 2, "no other session")
    visitor.page.wait_for_selector(".stage.shows")
    assert len(served.sessions) == 1 and len(visitor.sessions) == 2
    assert visitor.error == ""
    served.call(served.sessions.get(visitor.sessions[-1]).close("idle_timeout"))
    visitor.until(lambda: visitor.error, "no word of it")
    assert visitor.error == "Nobody spoke for a while, so the session was closed."
