"""The examples of docs/embedding.md, run as they stand there, on a smaller picture."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.film import decode
from tests.support.paths import PORTRAIT, REPOSITORY
from tests.support.pipeline import Background, demo_checkpoint, speech, write_wav

PAGE = REPOSITORY / "docs" / "embedding.md"
EXAMPLE = re.compile(r"<!-- example: (\w+) -->\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an example in a directory with what it opens; `names` are what it leaves to its user."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").symlink_to(demo_checkpoint())
    shutil.copy(PORTRAIT, "me.png")
    write_wav(tmp_path / "speech.wav", speech(2.0))
    examples = dict(EXAMPLE.findall(PAGE.read_text()))
    assert set(examples) == {"film", "live", "agent"}

    def call(name: str, **names: Any) -> None:
        code = examples[name].replace("512, 512", "64, 64")
        assert code != examples[name]
        Background(exec, compile(code, f"{PAGE.name}:{name}", "exec"), names).result(60)

    return call


def test_film(run: Any) -> None:
    run("film")
    pictures, _, sound, rate_hz = decode(Path("me.mp4"))
    assert len(pictures) == 40
    assert len(sound) / rate_hz == pytest.approx(2.0, abs=0.1)


@pytest.mark.slow
def test_live(run: Any) -> None:
    said = speech(2.5)
    shown: list[tuple[float, int, np.ndarray]] = []

    def microphone() -> Iterator[np.ndarray]:
        time.sleep(1.5)
        for start in range(0, len(said), 320):
            time.sleep(0.02)
            yield said[start : start + 320, 0]

    def show(frames: np.ndarray, pcm: np.ndarray) -> None:
        shown.append((time.monotonic(), len(frames), pcm))

    run("live", microphone=microphone(), show=show)
    heard = np.concatenate([pcm for *_, pcm in shown])
    begin = int(np.flatnonzero(heard[:, 0])[0])
    assert begin > 0, "it idled before"
    assert np.count_nonzero(heard) > 0.95 * 2.5 * 48_000
    seconds = shown[-1][0] - shown[0][0]
    assert seconds > 0.9 * sum(frames for _, frames, _ in shown[:-1]) / 20, "shown at its pace"


@pytest.mark.slow
def test_agent(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[np.ndarray] = []

    async def send(frames: np.ndarray, pcm: np.ndarray) -> None:
        heard.append(pcm)
        await asyncio.sleep(len(frames) / 20)

    async def text_to_speech(text: str) -> AsyncIterator[np.ndarray]:
        for number in range(int(text)):
            yield speech(1.0, rate_hz=24_000, seed=number)

    def spoken_s() -> float:
        return sum(np.count_nonzero(pcm) for pcm in heard) / 48_000

    async def conversation() -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(kind="answer", text="20")
        while spoken_s() < 1.0:
            await asyncio.sleep(0.02)
        yield SimpleNamespace(kind="visitor speaks")
        before_s = spoken_s()
        yield SimpleNamespace(kind="answer", text="2")
        while spoken_s() < before_s + 1.9:
            await asyncio.sleep(0.02)

    run("agent", send=send, text_to_speech=text_to_speech, conversation=conversation)
    found = re.fullmatch(r"utterance 0 was heard for ([0-9.]+) s\n", capsys.readouterr().out)
    assert found is not None and 1.0 <= float(found[1]) < 4.0
    assert spoken_s() == pytest.approx(float(found[1]) + 2.0, abs=0.3)
