"""The application: routes over the sessions of one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, cast, get_args

from fastapi import APIRouter, FastAPI, Header, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from liveact import __version__
from liveact.engine import Engine
from liveact.errors import InputError, LiveActError
from liveact.serve import asyncapi
from liveact.serve.bodies import BodyRoute
from liveact.serve.direct import start_and_stream
from liveact.serve.errors import Refused, not_found
from liveact.serve.logs import AccessLog
from liveact.serve.security import Guard
from liveact.serve.sessions import Sessions
from liveact.serve.settings import ServeSettings
from liveact.serve.site import page_files
from liveact.serve.webrtc import add_webrtc
from liveact.serve.websocket import Stream
from liveact.serve.wire import (
    SUBPROTOCOL,
    CreateSession,
    ErrorBody,
    Format,
    Interrupted,
    Options,
    PortraitInfo,
    QueuedBody,
    SessionCreated,
    SessionState,
    SetPrompt,
    one_line_of,
)

FORMATS: tuple[str, ...] = get_args(Format)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the schema: what else an operation may answer."""
    return {status: {"model": ErrorBody} for status in (400, 401, 403, 421, *statuses)}


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """The server of an engine, which stays the caller's. `app.state.sessions` has its sessions.

    Raises InputError for a portrait that cannot be used.
    """
    sessions = Sessions(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await sessions.close()

    app = FastAPI(
        title="LiveAct engine",
        version=__version__,
        description="Live talking portraits: docs/protocol.md.",
        docs_url=None,  # these pages would load scripts of somebody else's
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.sessions = sessions
    app.include_router(_probes(sessions))
    app.include_router(_sessions(sessions))
    app.include_router(_portraits(sessions))
    app.include_router(_page(sessions))
    app.include_router(page_files())

    @app.websocket("/v1/stream")
    async def direct(socket: WebSocket) -> None:
        await start_and_stream(sessions, socket)

    _answer_errors(app)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allow_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Liveact-Ticket"],
        expose_headers=["Retry-After"],
    )
    app.add_middleware(AccessLog)
    return app


def _probes(sessions: Sessions) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: {"model": ErrorBody}})
    async def readyz() -> dict[str, str]:
        """New sessions are taken; 503 while the server drains."""
        if not sessions.accepting:
            raise Refused(503, "draining", "server: expected one that goes on, found it draining")
        return {"status": "ready"}

    @router.get("/asyncapi.json", responses=_errors())
    async def schema() -> dict[str, Any]:
        """The messages of a stream, as AsyncAPI."""
        return asyncapi.document()

    @router.get("/metrics", responses=_errors(), response_class=Response)
    async def metrics() -> Response:
        """In Prometheus' format."""
        return Response(sessions.metrics.text(), media_type=sessions.metrics.content_type)

    return router


def _sessions(sessions: Sessions) -> APIRouter:
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=BodyRoute)

    @router.post(
        "",
        status_code=201,
        responses=_errors(404, 408, 413) | {503: {"model": QueuedBody}},
    )
    async def create(
        asked: CreateSession,
        liveact_ticket: Annotated[str | None, Header(max_length=64)] = None,
    ) -> SessionCreated:
        """Opens a session. 503 where there is no place: try again after `Retry-After`, with the
        ticket."""
        live = await sessions.create(asked, asked.ticket or liveact_ticket)
        path = f"/v1/sessions/{live.id}"
        return SessionCreated(
            id=live.id,
            expires_s=sessions.settings.attach_s,
            stream=f"{path}/stream",
            offer=f"{path}/offer",
            width=live.size[0],
            height=live.size[1],
            fps=float(live.session.fps),
            sample_rate_hz=live.sample_rate_hz,
        )

    @router.get("/{id}", responses=_errors(404))
    async def state(id: str) -> SessionState:
        """What the session does."""
        return SessionState(**sessions.get(id).stats())

    @router.delete("/{id}", status_code=204, responses=_errors(404))
    async def delete(id: str) -> None:
        """Ends the session; returns when its memory is free."""
        await sessions.get(id).close("deleted")

    @router.post("/{id}/interrupt", responses=_errors(404))
    async def interrupt(id: str) -> Interrupted:
        """Stops speaking at once."""
        found = await sessions.get(id).interrupt()
        return Interrupted(**found._asdict())

    @router.post("/{id}/prompt", status_code=204, responses=_errors(404, 408, 413, 429))
    async def prompt(id: str, asked: SetPrompt) -> None:
        """Another prompt, from the next block on."""
        await sessions.get(id).set_prompt(asked.prompt)

    @router.websocket("/{id}/stream")
    async def stream(socket: WebSocket, id: str) -> None:
        await _stream(sessions, socket, id)

    add_webrtc(router, sessions)
    return router


async def _stream(sessions: Sessions, socket: WebSocket, id: str) -> None:
    format = socket.query_params.get("format", "jpeg")
    try:
        live = sessions.get(id)
        if format not in FORMATS:
            raise Refused(
                400, "bad_format", f"format: expected {', '.join(FORMATS)}, found {format!r:.40}"
            )
        stream = Stream(socket, live, cast(Format, format))
    except Refused as refused:
        return await socket.send_denial_response(refused.answer())
    # A browser gives up where it offers subprotocols and none is chosen; never the one that is a
    # token.
    offered = socket.scope.get("subprotocols", [])
    await stream.run(SUBPROTOCOL if SUBPROTOCOL in offered else None)


def _portraits(sessions: Sessions) -> APIRouter:
    router = APIRouter(prefix="/v1/portraits", tags=["portraits"])

    @router.get("", responses=_errors())
    async def names() -> list[PortraitInfo]:
        """The portraits that a session may ask for by name."""
        return [
            PortraitInfo(
                name=name,
                width=found.width,
                height=found.height,
                thumbnail=f"/v1/portraits/{name}.png",
            )
            for name, found in sessions.portraits.named.items()
        ]

    @router.get(
        "/{name}.png",
        responses=_errors(404) | {200: {"content": {"image/png": {}}}},
        response_class=Response,
    )
    async def thumbnail(name: str) -> Response:
        """A small picture of a portrait."""
        if (found := sessions.portraits.named.get(name)) is None:
            raise not_found("portrait")
        return Response(found.thumbnail, media_type="image/png")

    return router


def _page(sessions: Sessions) -> APIRouter:
    router = APIRouter(tags=["page"])

    @router.get("/v1/options", responses=_errors())
    async def options() -> Options:
        """What a page may offer."""
        settings = sessions.settings
        return Options(
            prompts=settings.prompts,
            prompt=settings.prompt,
            width=settings.size[0],
            height=settings.size[1],
            fps=settings.fps,
            max_portrait_bytes=settings.max_body_bytes * 3 // 4 - 1024,
            ice_servers=list(settings.ice_servers),
            example="/v1/example" if settings.example else None,
        )

    @router.get("/v1/example", responses=_errors(404), response_class=FileResponse)
    async def example() -> FileResponse:
        """Speech to try it with."""
        if (path := sessions.settings.example) is None:
            raise not_found("example")
        return FileResponse(path)

    return router


def _answer_errors(app: FastAPI) -> None:
    """Every error has the same form."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.answer()

    @app.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> JSONResponse:
        return Refused(400, "bad_request", str(error)).answer()

    @app.exception_handler(LiveActError)
    async def gone(_: Request, error: LiveActError) -> JSONResponse:
        return not_found("session").answer()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return Refused(400, "bad_request", one_line_of(list(error.errors()))).answer()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        headers = dict(error.headers or {})
        return Refused(error.status_code, kind, error.detail, headers).answer()

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        return Refused(500, "internal", "server: found an error of its own; see its log").answer()
