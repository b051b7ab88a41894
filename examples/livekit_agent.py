"""A LiveKit agent with a face: a worker whose jobs share one engine.

    pip install liveact-engine[livekit]
    python examples/livekit_agent.py start

needs LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET of a LiveKit Cloud project, whose
inference hears, thinks and speaks here. Plugins of livekit-agents for STT, LLM and TTS do as well.
"""

from __future__ import annotations

from pathlib import Path

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, JobExecutorType, cli
from livekit.agents.voice.avatar import QueueAudioOutput
from livekit.agents.voice.room_io import RoomOptions

import liveact
from liveact.integrations.livekit import LiveActVideoGenerator, load_of

HERE = Path(__file__).resolve().parent
MODEL, PORTRAIT, SIZE = HERE / "talker", HERE / "portrait.png", (128, 128)
PROMPT = "A person is speaking."
MAX_SESSIONS = 1  # that this machine makes in real time
INSTRUCTIONS = "You are friendly and curious. You answer in one or two short sentences."


def serve(engine: liveact.Engine) -> AgentServer:
    """A worker that takes jobs while there is a free session."""
    server = AgentServer(
        job_executor_type=JobExecutorType.THREAD,  # an engine belongs to its process
        load_fnc=load_of(engine, MAX_SESSIONS),
        load_threshold=0.99,  # LiveKit's 0.7 would leave sessions unused
    )

    @server.rtc_session()
    async def talk(job: JobContext) -> None:
        await job.connect()
        face = await LiveActVideoGenerator.open(engine, image=PORTRAIT, prompt=PROMPT, size=SIZE)
        job.add_shutdown_callback(face.aclose)
        # What the agent says goes to the face, which publishes it together with the pictures.
        speech = QueueAudioOutput(wait_playback_start=True)
        await face.start(job.room, speech)
        session: AgentSession[None] = AgentSession(
            stt="deepgram/nova-3", llm="openai/gpt-4.1-mini", tts="cartesia/sonic-3"
        )
        session.output.audio = speech
        agent = Agent(instructions=INSTRUCTIONS)
        await session.start(agent, room=job.room, room_options=RoomOptions(audio_output=False))
        await session.generate_reply(instructions="Greet the user.")

    return server


if __name__ == "__main__":
    with liveact.Engine.load(MODEL) as engine:
        cli.run_app(serve(engine))
