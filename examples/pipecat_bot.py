"""A Pipecat bot with a face: speech to text, a language model, text to speech, and video of it.

    pip install liveact-engine[pipecat] "pipecat-ai[runner,webrtc,openai,silero]"
    python examples/pipecat_bot.py

needs OPENAI_API_KEY; open http://localhost:7860 and talk. Other services of Pipecat do as well.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import (
    LLMContextAggregatorPair,
    LLMUserAggregatorParams,
)
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.services.openai.stt import OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.workers.runner import WorkerRunner

import liveact
from liveact.integrations.pipecat import LiveActVideoService

HERE = Path(__file__).resolve().parent
MODEL, PORTRAIT, SIZE = HERE / "talker", HERE / "portrait.png", (128, 128)
PROMPT = "A person is speaking."
INSTRUCTIONS = "You are friendly and curious. You answer in one or two short sentences."


@functools.cache
def engine() -> liveact.Engine:
    """One for all conversations."""
    return liveact.Engine.load(MODEL)


def conversation(transport: BaseTransport, video: LiveActVideoService) -> PipelineWorker:
    """The pipeline of one conversation, which begins when a client is there and ends with it."""
    context = LLMContext([{"role": "system", "content": INSTRUCTIONS}])
    listens = LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer())
    said = LLMContextAggregatorPair(context, user_params=listens)
    pipeline = Pipeline(
        [
            transport.input(),
            OpenAISTTService(),
            said.user(),
            OpenAILLMService(),
            OpenAITTSService(),
            video,  # between the TTS and the transport
            transport.output(),
            said.assistant(),
        ]
    )
    worker = PipelineWorker(pipeline)

    async def greet(transport: BaseTransport, client: Any) -> None:
        await worker.queue_frame(LLMRunFrame())

    async def leave(transport: BaseTransport, client: Any) -> None:
        await worker.cancel()

    transport.add_event_handler("on_client_connected", greet)
    transport.add_event_handler("on_client_disconnected", leave)
    return worker


async def bot(arguments: RunnerArguments) -> None:
    """Pipecat's runner calls it for every client."""
    video = LiveActVideoService(engine(), image=PORTRAIT, prompt=PROMPT, size=SIZE)
    params = TransportParams(audio_in_enabled=True, **video.transport_params())
    transport = await create_transport(arguments, {"webrtc": lambda: params})
    runner = WorkerRunner(handle_sigint=arguments.handle_sigint)
    await runner.add_workers(conversation(transport, video))
    await runner.run()


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
