"""A stream over WebSocket: sound and messages in, frames with their sound and events out.

The session ends with the stream, whoever ends it and however.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError
from starlette.websockets import WebSocketState

from liveact.audio.samples import as_float
from liveact.errors import BacklogFull, InputError, LiveActError
from liveact.serve.encoders import open_encoder
from liveact.serve.errors import Refused
from liveact.serve.fmp4 import MIME_TYPE
from liveact.serve.live import MAX_PROMPTS, Event, LiveSession
from liveact.serve.microphone import Microphone
from liveact.serve.wire import (
    MAX_JSON,
    MESSAGES,
    Audio,
    Close,
    EndOfUtterance,
    Format,
    Interrupt,
    Message,
    Ping,
    PromptMessage,
    one_line_of,
    pcm_of,
)
from liveact.session.pacing import Frame

GOODBYE_S = 1.0  # for the last words
# Why the session was closed → close code. What is not here is an ordinary end.
CLOSE_CODES = {
    "closed": 1000,
    "deleted": 1000,
    "draining": 1001,
    "server_closed": 1001,
    "failed": 4500,
    "idle_timeout": 4408,
    "total_timeout": 4409,
    "attach_timeout": 4410,
    "stalled": 4411,
    "not_connected": 4412,
}


class Stream:
    """One WebSocket of a session."""

    def __init__(self, socket: WebSocket, live: LiveSession, format: Format) -> None:
        """Raises Busy where another stream has what this one wants."""
        self._socket, self._live, self._format = socket, live, format
        self._frames = None if format == "events" else live.frames()
        self._events = live.events(exclusive=format == "events")
        self._sending = asyncio.Lock()
        self._audio = Audio(type="audio", sample_rate_hz=16_000, gate=False)
        self._microphone: Microphone | None = None  # where the sound is to be gated
        self._prompts: set[asyncio.Task[None]] = set()

    async def run(self, subprotocol: str | None = None) -> None:
        """Accepts it, where that was not done, and goes on until either side ends it. The session
        is closed then."""
        reason = "failed"  # by an error that is a bug, and is logged
        try:
            if self._socket.application_state is WebSocketState.CONNECTING:
                await self._socket.accept(subprotocol)
            await self._send_event(self._ready())
            reason = await self._work()
        except TimeoutError:
            reason = "stalled"
        except WebSocketDisconnect:
            reason = "disconnected"
        except asyncio.CancelledError:
            reason = "server_closed"
            raise
        finally:
            await self._live.close(reason)
            await self._close()
            self._live.leave(self._events)

    async def _work(self) -> str:
        """Reads and sends at once, until one of them ends; why it did."""
        reader = asyncio.ensure_future(self._read())
        tasks: list[asyncio.Future[Any]] = [reader, asyncio.ensure_future(self._tell())]
        if self._frames is not None:
            tasks.append(asyncio.ensure_future(self._show(self._frames)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in [*tasks, *self._prompts]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):  # the first is as good as any
                raise result
        return reader.result() if not reader.cancelled() else "disconnected"

    # ------------------------------------------------------------------------ in

    async def _read(self) -> str:
        """Takes what the client sends; why it ended."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return "disconnected"
            try:
                if (data := message.get("bytes")) is not None:
                    await self._hear(data)
                elif await self._obey(message["text"]):
                    return "closed"
            except BacklogFull as error:
                await self._send_error("backlog_full", str(error))
            except InputError as error:
                await self._send_error("bad_audio", str(error))
            except LiveActError:  # the session is over: `closed` says why
                await asyncio.Event().wait()

    async def _hear(self, data: bytes) -> None:
        try:
            pcm = pcm_of(data, self._audio.channels)
        except ValueError:
            raise InputError(
                f"audio: expected whole samples of {2 * self._audio.channels} bytes, "
                f"found {len(data)} bytes"
            ) from None
        if self._microphone is not None:
            await self._microphone.hear(as_float(pcm))
        else:
            await self._live.feed(pcm, self._audio.sample_rate_hz)

    async def _obey(self, text: str) -> bool:
        """Whether the message ends the stream."""
        try:
            if len(text) > MAX_JSON:
                raise ValueError(f"expected at most {MAX_JSON} characters, found {len(text)}")
            message: Message = MESSAGES.validate_json(text)
        except (ValidationError, ValueError) as error:
            found = one_line_of(error.errors()) if isinstance(error, ValidationError) else error
            await self._send_error("bad_message", f"message: {found}")
            return False
        match message:
            case Audio():
                self._listen(message)
            case EndOfUtterance():
                self._listen(self._audio)
                self._live.end_of_utterance()
            case Interrupt():
                await self._live.interrupt()
            case PromptMessage():
                await self._prompt(message.prompt)
            case Ping():
                await self._send_event({"type": "pong", "id": message.id})
            case Close():
                return True
        return False

    def _listen(self, audio: Audio) -> None:
        """What binary messages are from now on; a gate begins closed."""
        self._audio = audio
        self._microphone = Microphone(self._live, audio.sample_rate_hz) if audio.gate else None

    async def _prompt(self, text: str) -> None:
        """Changes the prompt without holding up what comes after it."""
        if len(self._prompts) >= MAX_PROMPTS:
            what = f"prompt: expected at most {MAX_PROMPTS} that wait"
            return await self._send_error("too_many_prompts", what)
        task = asyncio.ensure_future(self._change_prompt(text))
        self._prompts.add(task)
        task.add_done_callback(self._prompts.discard)

    async def _change_prompt(self, text: str) -> None:
        with contextlib.suppress(WebSocketDisconnect, TimeoutError):
            try:
                await self._live.set_prompt(text)
            except Refused as refused:
                await self._send_error(refused.kind, refused.detail)
            except InputError as error:
                await self._send_error("bad_prompt", str(error))
            except LiveActError:
                pass  # `closed` says why

    # ------------------------------------------------------------------------ out

    def _ready(self) -> Event:
        live = self._live
        mime = {"mime_type": MIME_TYPE} if self._format == "fmp4" else {}
        return mime | {
            "type": "ready",
            "format": self._format,
            "width": live.size[0],
            "height": live.size[1],
            "fps": float(live.session.fps),
            "sample_rate_hz": live.sample_rate_hz,
            "channels": 1,
        }

    async def _show(self, frames: AsyncIterator[Frame]) -> None:
        live = self._live
        encoder = await asyncio.to_thread(open_encoder, self._format, live.size, live.session.fps)
        try:
            async for frame in frames:
                epoch = live.epoch
                encoded = await asyncio.to_thread(encoder.encode, frame)
                async with self._sending:
                    await self._flush()
                    if frame.speech and epoch != live.epoch:
                        frame = _muted(frame)
                    for message in encoder.messages(frame, encoded):
                        await self._in_time(self._socket.send_bytes(message))
        finally:
            encoder.close()

    async def _tell(self) -> None:
        """Events, also where no frame comes."""
        while await self._events.wait():
            async with self._sending:
                await self._flush()

    async def _flush(self) -> None:
        while (event := self._events.take()) is not None:
            await self._in_time(self._socket.send_json(event))

    async def _send_event(self, event: Event) -> None:
        async with self._sending:
            await self._in_time(self._socket.send_json(event))

    async def _send_error(self, code: str, message: str) -> None:
        await self._send_event({"type": "error", "code": code, "message": message})

    async def _in_time(self, sending: Awaitable[None]) -> None:
        """Raises TimeoutError where the client takes nothing, WebSocketDisconnect where it went."""
        try:
            async with asyncio.timeout(self._live.settings.stalled_s):
                await sending
        except RuntimeError as error:  # uvicorn, where the connection was closed meanwhile
            raise WebSocketDisconnect(1006) from error

    async def _close(self) -> None:
        """Says why, to a client that listens."""
        reason = self._live.reason
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._flush()
                await self._socket.close(CLOSE_CODES.get(reason, 1000), reason)


def _muted(frame: Frame) -> Frame:
    """A frame of speech that was interrupted while it was on its way: its picture alone."""
    pcm = np.zeros_like(frame.pcm)
    return replace(frame, pcm=pcm, speech=False, last_of_utterance=False)
