"""The page in a real browser: what a visitor does, sees and hears."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from liveact.engine import Engine
from tests.support.browser import Visitor, visiting
from tests.support.pipeline import speech, write_wav
from tests.support.server import Served, serving

pytestmark = pytest.mark.slow

RATE_HZ = 48_000
SIZE = (64, 64)
PROMPTS = {"neutral": "A person is speaking.", "smiling": "A person smiles."}
# The whole picture, as its mean and its pixels.
LOOK = """() => {
  const video = document.getElementById("video");
  const canvas = new OffscreenCanvas(16, 16);
  const paint = canvas.getContext("2d");
  paint.drawImage(video, 0, 0, 16, 16);
  return [video.currentTime, ...paint.getImageData(0, 0, 16, 16).data];
}"""


AUDIBLE = """document.getElementById("video").srcObject.getAudioTracks()[0].enabled"""
# At once: what stays silent for a moment may be heard again when a test asks for it later.
INTERRUPT = f"""() => {{
  document.getElementById("interrupt").click();
  return {AUDIBLE};
}}"""


@pytest.fixture(scope="module")
def served(engine: Engine, microphone: Path) -> Iterator[Served]:
    with serving(engine, size=SIZE, prompts=PROMPTS, example=microphone) as found:
        yield found


@pytest.fixture
def visitor(browser: Browser, served: Served) -> Iterator[Visitor]:
    with visiting(browser, served.url) as found:
        yield found
    served.wait_until_free(20)


def test_a_face_is_shown_and_it_moves(visitor: Visitor) -> None:
    visitor.start()
    first = visitor.page.evaluate(LOOK)
    visitor.until(lambda: visitor.page.evaluate(LOOK)[0] > first[0] + 1, "the video stands still")
    assert np.mean(first[1:]) > 80 and np.std(first[1:]) > 5, "black, but for the opaque alpha"
    visitor.until(
        lambda: visitor.page.evaluate(LOOK)[1:] != first[1:], "the picture does not change"
    )
    visitor.until(lambda: "fps" in visitor.page.inner_text("#meter"), "nothing is measured")


def test_what_is_said_into_the_microphone_is_heard(visitor: Visitor) -> None:
    visitor.start()
    visitor.page.click("#talk")
    visitor.page.wait_for_selector("#talk >> text=Listening")
    visitor.until(lambda: "speech" in visitor.page.inner_text("#meter"), "no answer")
    visitor.until(lambda: visitor.heard > 1e-3, "nothing is heard")
    visitor.page.click("#talk")
    visitor.page.wait_for_selector("#talk >> text=Talk")


def test_an_interruption_is_silence_and_what_comes_next_is_heard(
    visitor: Visitor, tmp_path: Path
) -> None:
    visitor.start()
    long = write_wav(tmp_path / "long.wav", speech(20.0, RATE_HZ), RATE_HZ)
    visitor.page.set_input_files("#file", long)
    visitor.until(lambda: visitor.heard > 1e-3, "nothing is heard")
    assert not visitor.page.evaluate(INTERRUPT), "what is buffered in the browser is still heard"
    levels = [visitor.heard]

    def is_silent() -> bool:
        """Over half a second that was played."""
        visitor.page.wait_for_timeout(500)
        levels.append(visitor.heard)
        return levels[-1] - levels[-2] < 1e-5

    # Of the 20 s none is left, but what the jitter buffer holds.
    visitor.event("interrupted")
    visitor.until(is_silent, "it goes on speaking", limit_s=6)
    visitor.events.clear()
    assert visitor.event("stats")["backlog_s"] == 0
    visitor.page.click("#example")
    visitor.until(lambda: visitor.heard > levels[-1] + 1e-3, "the example is not heard")
    assert visitor.page.evaluate(AUDIBLE)


def test_a_reload_frees_the_session_and_a_new_one_opens(visitor: Visitor, served: Served) -> None:
    for _ in range(3):
        visitor.start()
        assert len(served.sessions) == 1
        visitor.page.reload()
        served.wait_until_free(20)
    visitor.start()
    visitor.page.click("#end")
    assert visitor.page.is_visible("#start")


def test_a_prompt_and_a_portrait_of_ones_own(visitor: Visitor, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 2000), "orange").save(tmp_path / "own.png")
    visitor.page.wait_for_selector(".tile img")
    visitor.page.set_input_files("#upload", tmp_path / "own.png")
    visitor.page.wait_for_selector("[title='own.png']")
    visitor.page.click("text=smiling")
    assert visitor.page.input_value("#prompt") == PROMPTS["smiling"]
    with visitor.page.expect_request("**/v1/sessions") as asked:
        visitor.start()
    wanted = asked.value.post_data_json
    assert wanted["prompt"] == PROMPTS["smiling"]
    # Reduced to 1024 pixels in the browser: a phone's picture need not be sent whole.
    assert len(wanted["portrait"]["data"]) < 100_000
    visitor.page.click("text=neutral")
    assert visitor.event("prompt_changed")["prompt"] == PROMPTS["neutral"]
    visitor.page.fill("#prompt", "Somebody sings.")
    visitor.page.press("#prompt", "Enter")
    visitor.until(
        lambda: visitor.events_of("prompt_changed")[-1]["prompt"] == "Somebody sings.", "no change"
    )


@pytest.mark.parametrize("reason, again", [("stalled", True), ("idle_timeout", False)])
def test_a_lost_connection_comes_back_and_an_ended_one_says_why(
    visitor: Visitor, served: Served, reason: str, again: bool
) -> None:
    visitor.start()
    (before,) = visitor.sessions
    served.call(served.sessions.get(before).close(reason))
    if again:
        visitor.until(lambda: len(visitor.sessions) == 2, "no other session")
        visitor.page.wait_for_selector(".stage.shows")
        assert len(served.sessions) == 1 and len(visitor.sessions) == 2
        assert visitor.error == ""
    else:
        visitor.until(lambda: visitor.error, "no word of it")
        assert visitor.error == "Nobody spoke for a while, so the session was closed."
        assert visitor.page.is_visible("#start")


def test_where_all_places_are_taken_visitors_wait_for_their_turn(
    browser: Browser, engine: Engine
) -> None:
    with (
        serving(engine, size=SIZE, max_sessions=1, retry_s=1.0) as served,
        visiting(browser, served.url) as first,
        visiting(browser, served.url) as second,
    ):
        first.start()
        second.page.wait_for_selector(".tile img")
        second.page.click("#start")
        second.page.wait_for_selector("text=You are number 1 in the queue")
        second.page.click("#cancel")
        assert second.page.is_visible("#start") and second.error == ""
        second.page.click("#start")
        second.page.wait_for_selector("text=You are number")
        first.page.click("#end")
        second.page.wait_for_selector(".stage.shows")
        assert len(served.sessions) == 1


def test_a_server_with_a_token_is_unlocked(browser: Browser, engine: Engine) -> None:
    token = "a-token-that-is-long"
    with (
        serving(engine, size=SIZE, token=token) as served,
        visiting(browser, served.url) as visitor,
    ):
        visitor.page.fill("#token", "another-one-that-is-wrong")
        visitor.page.click("text=Unlock")
        visitor.until(lambda: "token" in visitor.error, "no word of it")
        visitor.page.fill("#token", token)
        visitor.page.click("text=Unlock")
        visitor.start()
        assert not visitor.page.is_visible("#token")
        assert visitor.error == ""


def test_what_cannot_be_used_is_one_line(visitor: Visitor, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no picture, no sound")
    visitor.page.set_input_files("#upload", tmp_path / "text.txt")
    visitor.until(lambda: visitor.error, "no word of it")
    assert visitor.error == "The browser cannot read this file as a picture."
    visitor.start()
    assert visitor.error == ""
    visitor.page.set_input_files("#file", tmp_path / "text.txt")
    visitor.until(lambda: visitor.error, "no word of it")
    assert visitor.error == "The browser cannot read this file as sound."


def test_nothing_sticks_out_on_a_small_phone(browser: Browser, served: Served) -> None:
    with visiting(browser, served.url, viewport={"width": 320, "height": 568}) as visitor:
        width = "document.documentElement.scrollWidth"
        visitor.page.wait_for_selector(".tile img")
        assert visitor.page.evaluate(width) == 320
        visitor.start()
        assert visitor.page.evaluate(width) == 320
    served.wait_until_free(20)
