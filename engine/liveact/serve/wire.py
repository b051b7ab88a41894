"""What goes over the wire: bodies of requests, messages of a stream, the header of a frame.

docs/protocol.md is written for who implements a client.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from liveact.audio.front_end import MAX_RATE_HZ, MIN_RATE_HZ
from liveact.audio.samples import as_int16
from liveact.session.pacing import Frame

MAX_PROMPT = 2000  # characters
MAX_JSON = 16_384  # characters of a message
SUBPROTOCOL = "liveact.v1"

Format = Literal["jpeg", "rgb24", "fmp4", "events"]  # of a stream

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# ------------------------------------------------------------------------ bodies of requests


class Upload(_Strict):
    """A portrait that comes with the request."""

    data: str = Field(description="A PNG or JPEG file in base64.", min_length=1)


class CreateSession(_Strict):
    """A session: one portrait that speaks."""

    portrait: Annotated[str, Field(min_length=1, max_length=200)] | Upload = Field(
        description="The name of a portrait of the server, or a picture."
    )
    prompt: Prompt | None = Field(None, description="What the person does.")
    width: int | None = Field(None, ge=16, le=4096, description="Pixels, a multiple of 16.")
    height: int | None = Field(None, ge=16, le=4096, description="Pixels, a multiple of 16.")
    fps: float | None = Field(None, ge=1, le=100, description="Frames per second.")
    seed: int = Field(42, ge=-(2**63), le=2**63 - 1, description="Of the noise.")
    idle: Literal["silence", "wait"] = Field(
        "silence",
        description="While nobody speaks: `silence` shows a listening person, `wait` the last "
        "picture.",
    )
    ticket: str | None = Field(
        None, max_length=64, description="Of the refusal before, to keep the place in the queue."
    )


class SessionCreated(BaseModel):
    """What a client needs to use the session."""

    id: str = Field(description="Whoever knows it may use the session.")
    expires_s: float = Field(description="A stream must be opened within this time.")
    stream: str = Field(description="Path of the WebSocket.")
    offer: str = Field(description="Path that takes the offer of a WebRTC client.")
    width: int
    height: int
    fps: float
    sample_rate_hz: int = Field(description="Of the sound that comes out, mono.")


class SessionState(BaseModel):
    """A session at this moment."""

    state: str = Field(
        description="`waiting` or `idling` for speech, `speaking`, `ended`, `failed`, `closed`."
    )
    utterance: int = Field(description="Number of the utterance that takes sound.")
    frames: int = Field(description="That were handed out.")
    repeated: int = Field(description="Of these, that had to be repeated.")
    underruns: int = Field(description="How often that began although something was being made.")
    blocks: int = Field(description="Begun so far.")
    lag_s: float = Field(description="For how long the next picture is overdue.")
    backlog_s: float = Field(description="Seconds of sound that wait.")
    interruptions: int
    age_s: float


class Start(CreateSession):
    """The first message of `WS /v1/stream`: a session, and the format of its frames."""

    type: Literal["start"]
    format: Format = "jpeg"


class SetPrompt(_Strict):
    """Another prompt."""

    prompt: Prompt


class Interrupted(BaseModel):
    """What was cut off."""

    utterance: int
    delivered_s: float = Field(description="Seconds of it that were shown.")


class PortraitInfo(BaseModel):
    """A portrait of the server."""

    name: str
    width: int
    height: int
    thumbnail: str = Field(description="Path of a small PNG.")


class Options(BaseModel):
    """What a page may offer."""

    prompts: dict[str, str] = Field(description="Name → prompt, of what the model has learned.")
    prompt: str = Field(description="Of a session that names none.")
    width: int
    height: int
    fps: float
    max_portrait_bytes: int = Field(description="Of the file of a portrait that is sent.")
    ice_servers: list[str] = Field(description="URLs of STUN and TURN servers.")
    example: str | None = Field(description="Path of speech to try it with.")


class Offer(_Strict):
    """What a WebRTC client offers."""

    sdp: str = Field(min_length=1, max_length=200_000)
    type: Literal["offer"]


class Answer(BaseModel):
    """The server's side of WebRTC."""

    sdp: str
    type: Literal["answer"]


class ErrorDetail(BaseModel):
    """What is wrong."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(description="A word that programs can compare.")
    message: str = Field(description="One line for people.")


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class QueuedDetail(ErrorDetail):
    """A session that was refused for now."""

    position: int | None = Field(None, description="In the queue; 1 is next.")
    ticket: str | None = Field(None, description="Keeps the place when it is sent again.")


class QueuedBody(BaseModel):
    """The body of a 503."""

    error: QueuedDetail


# -------------------------------------------------------------------------- messages of a stream


class Audio(_Strict):
    """What the binary messages from now on are."""

    type: Literal["audio"]
    sample_rate_hz: int = Field(ge=MIN_RATE_HZ, le=MAX_RATE_HZ)
    channels: Literal[1, 2] = 1
    gate: bool = Field(
        False,
        description="Of a microphone that is left open: what is said into it is found, begins and "
        "ends utterances by itself.",
    )


class EndOfUtterance(_Strict):
    """What was sent so far is complete."""

    type: Literal["end_of_utterance"]


class Interrupt(_Strict):
    """Stops speaking at once."""

    type: Literal["interrupt"]


class PromptMessage(_Strict):
    """Another prompt, from the next block on."""

    type: Literal["prompt"]
    prompt: Prompt


class Ping(_Strict):
    """Asks for a `pong`."""

    type: Literal["ping"]
    id: int | None = Field(None, description="Comes back in the `pong`.")


class Close(_Strict):
    """Ends the session."""

    type: Literal["close"]


Message = Audio | EndOfUtterance | Interrupt | PromptMessage | Ping | Close
MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


# --------------------------------------------------------------------------- the header of a frame

HEADER = struct.Struct("<4sBBHHHIQII")  # 32 bytes
MAGIC = b"LAF1"
KINDS = {"jpeg": 1, "rgb24": 2}
SPEECH, LAST_OF_UTTERANCE, REPEATED = 1, 2, 4


def pack_frame(frame: Frame, kind: str, picture: bytes) -> bytes:
    """Header, picture and sound of a frame; `picture` is in the format `kind`."""
    height, width, _ = frame.picture.shape
    pcm = as_int16(frame.pcm).tobytes()
    flags = (
        SPEECH * frame.speech
        | LAST_OF_UTTERANCE * frame.last_of_utterance
        | REPEATED * frame.repeated
    )
    header = HEADER.pack(
        MAGIC,
        KINDS[kind],
        flags,
        width,
        height,
        0,
        frame.utterance,
        frame.number,
        len(picture),
        len(pcm),
    )
    return b"".join([header, picture, pcm])


def one_line_of(errors: list[Any]) -> str:
    """What pydantic found, as one line."""
    found = []
    for error in errors[:3]:
        where = ".".join(str(part) for part in error["loc"]) or "body"
        found.append(f"{where}: {error['msg']}")
    return "; ".join(found).replace("\n", " ")[:300]


def pcm_of(data: bytes, channels: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """PCM16LE → int16 [n, channels]. Raises ValueError for half a sample."""
    return np.frombuffer(data, "<i2").reshape(-1, channels)
