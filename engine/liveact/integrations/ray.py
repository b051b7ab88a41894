"""Replicas of the server on Ray Serve (`liveact[ray]`).

    clients ─► Ray's proxy ─► replica: an engine and the application of `liveact serve`

A replica takes a new connection where fewest are open. A connection of `WS /v1/stream` is a session
(docs/protocol.md) and stays with its replica; the number of open connections is what Ray scales by.
The sessions of `POST /v1/sessions` need a second request to the same replica, which Ray's proxy
does not promise: use them with one replica, or with none of this.

    serve run liveact.integrations.ray:application checkpoint=/models/liveact max_sessions=2
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pydantic
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig

from liveact.blocks import check_size
from liveact.engine import Engine
from liveact.serve.app import create_app
from liveact.serve.portraits import list_portraits
from liveact.serve.security import read_token
from liveact.serve.settings import ServeSettings

PROBES = 4  # requests besides sessions that a replica takes at a time: refusals, states, metrics


class Replicas(pydantic.BaseModel):
    """The arguments of `application`.

    Attributes:
        checkpoint: a directory that every machine has.
        device: as of `Engine.load`; None: `cuda:0` where a replica has GPUs, else the CPU.
        precision: as of `Engine.load`.
        num_gpus, num_cpus: that Ray reserves for a replica.
        max_sessions: of a replica.
        min_replicas, max_replicas: between which Ray scales.
        target_sessions: of a replica, to which Ray scales; None: seven tenths of `max_sessions`.
        drain_s: how long the sessions of a replica that is to be removed may go on.
        portraits: a directory of pictures that clients may ask for by name.
        size: width and height of a session that names none.
        fps: of a session that names none.
        token_file: of what clients must bear; None: nothing.
        allow_origins: of pages that may use it.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    checkpoint: str
    device: str | None = None
    precision: str | None = None
    num_gpus: float = 1
    num_cpus: float = 2
    max_sessions: int = pydantic.Field(1, ge=1)
    min_replicas: int = pydantic.Field(1, ge=1)
    max_replicas: int = pydantic.Field(1, ge=1)
    target_sessions: float | None = None
    drain_s: float = 60.0
    portraits: str | None = None
    size: tuple[int, int] = (512, 512)
    fps: float = 20.0
    token_file: str | None = None
    allow_origins: tuple[str, ...] = ()


def application(options: Replicas) -> serve.Application:
    """The Ray Serve application: `serve run liveact.integrations.ray:application checkpoint=DIR`,
    or the `import_path` of a config file, whose `args` are those of `Replicas`."""

    def build() -> FastAPI:
        return build_replica(options)

    deployment = serve.deployment(
        name="LiveAct",
        max_ongoing_requests=options.max_sessions + PROBES,
        max_queued_requests=PROBES,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_sessions or 0.7 * options.max_sessions,
            downscale_delay_s=300,
        ),
        graceful_shutdown_timeout_s=options.drain_s,
        ray_actor_options={"num_gpus": options.num_gpus, "num_cpus": options.num_cpus},
    )
    return deployment(serve.ingress(build)()).bind()


def build_replica(options: Replicas) -> FastAPI:
    """Loads the engine of a replica, in its process, and makes its application."""
    device = options.device or ("cuda:0" if options.num_gpus else "cpu")
    engine = Engine.load(options.checkpoint, device=device, precision=options.precision)
    app = create_app(engine, settings_of(options))
    of_server = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with of_server(app) as state:
            yield state
        engine.close()

    app.router.lifespan_context = lifespan
    return app


def settings_of(options: Replicas) -> ServeSettings:
    """Of a replica's server. Its proxy decides what is heard from outside, so that the host says
    nothing here. Raises InputError."""
    size = options.size
    check_size(*size)
    portraits = {}
    if options.portraits is not None:
        portraits = list_portraits(Path(options.portraits))
    defaults = ServeSettings()
    return ServeSettings(
        host="0.0.0.0",
        token=None if options.token_file is None else read_token(Path(options.token_file)),
        allow_origins=options.allow_origins,
        portraits=portraits,
        size=size,
        fps=options.fps,
        max_pixels=max(defaults.max_pixels, size[0] * size[1]),
        max_fps=max(defaults.max_fps, options.fps),
        max_sessions=options.max_sessions,
        drain_s=options.drain_s,
    )
