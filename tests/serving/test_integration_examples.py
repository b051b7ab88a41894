"""The example programs of the integrations, as far as they go without a network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from livekit.agents import AgentServer, JobExecutorType
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.base_transport import BaseTransport

from examples import livekit_agent, pipecat_bot
from liveact.engine import Engine
from liveact.integrations.pipecat import LiveActVideoService
from tests.support.paths import PORTRAIT
from tests.support.session import open_session


def test_the_livekit_worker_takes_jobs_while_there_is_a_free_session(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    original = AgentServer.__init__

    def remember(self: AgentServer, **options: Any) -> None:
        given.update(options)
        original(self, **options)

    monkeypatch.setattr(AgentServer, "__init__", remember)
    livekit_agent.serve(engine)
    assert given["job_executor_type"] is JobExecutorType.THREAD
    assert given["load_fnc"]() < given["load_threshold"]
    with open_session(engine):
        assert given["load_fnc"]() > given["load_threshold"]


class Transport(BaseTransport):
    """Ends that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._register_event_handler("on_client_connected")
        self._register_event_handler("on_client_disconnected")

    def input(self) -> FrameProcessor:
        return FrameProcessor()

    def output(self) -> FrameProcessor:
        return FrameProcessor()


def test_the_pipecat_bot_is_a_pipeline(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    async def work() -> None:
        video = LiveActVideoService(engine, image=PORTRAIT, prompt="A person.", size=(32, 32))
        pipecat_bot.conversation(Transport(), video)
        assert isinstance(video.previous, OpenAITTSService)
        assert isinstance(video.next, FrameProcessor)

    asyncio.run(work())
