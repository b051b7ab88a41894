"""The schema of a stream's messages, as AsyncAPI 3, made from the models that check them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from liveact import __version__
from liveact.serve.wire import (
    Audio,
    Close,
    EndOfUtterance,
    Format,
    Interrupt,
    Interrupted,
    Ping,
    PromptMessage,
    SessionState,
    Start,
)


class Ready(BaseModel):
    """The stream is open."""

    type: Literal["ready"]
    format: Format
    width: int
    height: int
    fps: float
    sample_rate_hz: int
    channels: Literal[1]
    mime_type: Annotated[str | None, Field(description="Of `fmp4`.")] = None


class UtteranceStarted(BaseModel):
    """Right before its first frame."""

    type: Literal["utterance_started"]
    utterance: int


class UtteranceFinished(BaseModel):
    """Right after its last frame."""

    type: Literal["utterance_finished"]
    utterance: int
    delivered_s: float


class InterruptedEvent(Interrupted):
    """No frame of speech of the utterance follows."""

    type: Literal["interrupted"]


class PromptChanged(BaseModel):
    """From the next block on."""

    type: Literal["prompt_changed"]
    prompt: str


class Stats(SessionState):
    """Every second."""

    type: Literal["stats"]
    fps: float


class Pong(BaseModel):
    """Answers `ping`."""

    type: Literal["pong"]
    id: int | None


class Error(BaseModel):
    """Something could not be used; the stream goes on."""

    type: Literal["error"]
    code: Literal[
        "bad_message",
        "bad_audio",
        "bad_prompt",
        "too_many_prompts",
        "backlog_full",
        "session_failed",
    ]
    message: str


class Refused(BaseModel):
    """The answer to `start` where no session can be had; the socket is closed after it."""

    type: Literal["refused"]
    code: Annotated[str, Field(description="The `type` of the error that HTTP would answer with.")]
    message: str
    position: Annotated[int | None, Field(description="In the queue; 1 is next.")] = None
    ticket: Annotated[str | None, Field(description="Keeps the place.")] = None
    retry_after_s: float | None = None


class Closed(BaseModel):
    """The last event."""

    type: Literal["closed"]
    reason: str


SENT: tuple[type[BaseModel], ...] = (
    *(Audio, EndOfUtterance, Interrupt, PromptMessage, Ping, Close),
)
RECEIVED: tuple[type[BaseModel], ...] = (
    *(Ready, UtteranceStarted, UtteranceFinished, InterruptedEvent, PromptChanged),
    *(Stats, Pong, Error, Closed),
)
_SOUND = {
    "name": "sound",
    "contentType": "application/octet-stream",
    "summary": "Signed 16-bit PCM, little-endian, channels interleaved.",
}
_FRAME = {
    "name": "frame",
    "contentType": "application/octet-stream",
    "summary": "A header of 32 bytes, picture and sound; with fmp4 a segment of the film.",
}


def document() -> dict[str, Any]:
    """AsyncAPI 3.0."""
    models: list[type[BaseModel]] = [Start, *SENT, *RECEIVED, Refused]
    _, schemas = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
    )
    names = [model.__name__ for model in models]
    messages: dict[str, Any] = {
        name: {"name": name, "payload": {"$ref": f"#/components/schemas/{name}"}} for name in names
    }
    messages |= {"Sound": _SOUND, "Frame": _FRAME}
    ours = [*(model.__name__ for model in RECEIVED), "Frame"]
    theirs = [*(model.__name__ for model in SENT), "Sound"]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "LiveAct engine, the stream of a session",
            "version": __version__,
            "description": "docs/protocol.md",
        },
        "channels": {
            "stream": {
                "address": "/v1/sessions/{id}/stream",
                "parameters": {"id": {"description": "Of the session."}},
                "bindings": {
                    "ws": {
                        "query": {
                            "type": "object",
                            "properties": {
                                "format": {
                                    "type": "string",
                                    "enum": list(get_args(Format)),
                                    "default": "jpeg",
                                }
                            },
                        }
                    }
                },
                "messages": _references("#/components/messages", [*theirs, *ours]),
            },
            "direct": {
                "address": "/v1/stream",
                "messages": _references(
                    "#/components/messages", ["Start", *theirs, *ours, "Refused"]
                ),
            },
        },
        "operations": {
            "hear": _operation("receive", "stream", theirs),
            "show": _operation("send", "stream", ours),
            "hear_directly": _operation("receive", "direct", ["Start", *theirs]),
            "show_directly": _operation("send", "direct", [*ours, "Refused"]),
        },
        "components": {"messages": messages, "schemas": schemas["$defs"]},
    }


def _references(where: str, names: list[str]) -> dict[str, dict[str, str]]:
    return {name: {"$ref": f"{where}/{name}"} for name in names}


def _operation(action: str, channel: str, names: list[str]) -> dict[str, Any]:
    where = f"#/channels/{channel}"
    messages = list(_references(f"{where}/messages", names).values())
    return {"action": action, "channel": {"$ref": where}, "messages": messages}
