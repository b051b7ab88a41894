"""JSON of requests, read without holding up the event loop: a portrait makes it many megabytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

SMALL_BYTES = 64 * 1024  # what takes no time


class _Request(Request):
    async def json(self) -> Any:
        """The body as Python values. Raises JSONDecodeError."""
        body = await self.body()
        try:
            if len(body) <= SMALL_BYTES:
                return from_json(body)
            # NOTE: the parser holds Python's lock, for 5 ms of 16 MiB; json.loads holds it for 22.
            return await asyncio.to_thread(from_json, body)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class BodyRoute(APIRoute):
    """A route whose body is parsed in a thread where it is large."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return handle
