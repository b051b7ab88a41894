"""What an operator sees: GPUs where there are some, blocks by stage, logs that name nobody."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from liveact.engine import Engine
from liveact.serve.logs import json_logs
from liveact.serve.metrics import Gpus
from tests.support.pipeline import speech
from tests.support.server import serving


class FakeNvml:
    """Two GPUs, of which the second does not answer."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle == 1:
            raise self.NVMLError("fallen off the bus")
        return SimpleNamespace(used=30, total=100)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=50)


def test_gpus_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    found = {name: values for name, _, values in Gpus().gauges()}
    assert found == {
        "liveact_gpu_memory_used_bytes": [({"gpu": "0"}, 30)],
        "liveact_gpu_memory_total_bytes": [({"gpu": "0"}, 100)],
        "liveact_gpu_utilization_ratio": [({"gpu": "0"}, 0.5)],
    }


def test_no_gpu_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert list(Gpus().gauges()) == []


def test_blocks_are_measured_by_stage(engine: Engine) -> None:
    with serving(engine) as served:
        with served.talk() as client:
            client.hear(speech(2.0))
            client.say(type="end_of_utterance")
            client.event("utterance_finished")
            for _ in range(40):  # to the end of its second block, and more
                client.frame()
        served.wait_until_free()
        text = served.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    blocks = float(values["liveact_blocks_total"])
    assert blocks >= 2
    for stage in ("wait", "audio", "denoise", "decode"):
        assert float(values[f'liveact_block_seconds_count{{stage="{stage}"}}']) == blocks
    assert float(values['liveact_block_seconds_sum{stage="denoise"}']) > 0
    assert float(values['liveact_sessions_closed_total{reason="disconnected"}']) == 1


def test_logs_are_json_and_what_was_before_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    root, engine_log = logging.getLogger(), logging.getLogger("liveact")
    before = root.handlers, root.level, engine_log.handlers
    with json_logs():
        logging.getLogger("liveact.serve").info(
            "two\nlines, é", extra={"session": "abc", "unknown": 1}
        )
        try:
            raise ValueError("bad")
        except ValueError:
            logging.getLogger("liveact.serve").exception("failed")
        logging.getLogger("uvicorn.error").info("/v1/sessions/SECRET/stream")
    assert (root.handlers, root.level, engine_log.handlers) == before
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["two\nlines, é", "failed"]
    assert lines[0].keys() == {"time", "level", "logger", "message", "session"}
    assert "ValueError: bad" in lines[1]["exception"]
