"""`liveact serve`: live sessions over HTTP, WebSocket and WebRTC (docs/serve.md)."""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from liveact import arguments
from liveact.blocks import MAX_FPS, MIN_FPS, check_size
from liveact.commands import demo
from liveact.commands.options import parse_size
from liveact.device.devices import open_devices
from liveact.engine import Engine
from liveact.errors import InputError
from liveact.files import read_json

if TYPE_CHECKING:
    from liveact.serve.settings import ServeSettings

PACKAGES = ("fastapi", "uvicorn", "websockets", "aiortc", "prometheus_client")
PROMPTS_FILE = "prompts.json"  # of a checkpoint, or given: {"name": "prompt", …}
ORIGIN = r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?"

_log = logging.getLogger("liveact.serve")


def run(options: argparse.Namespace) -> None:
    """Serves until a signal comes. Everything that can be refused is, before the model is loaded.

    Raises InputError, DeviceError.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"serve: expected the package {missing[0]}, found none: "
            "pip install liveact-engine[serve]"
        )
    from liveact.serve.app import create_app
    from liveact.serve.logs import json_logs
    from liveact.serve.server import Server, listen, url_of

    settings = settings_of(options)
    checkpoint = options.checkpoint or demo.bundle_directory() / demo.MODEL
    devices = open_devices(options.device, options.vae_device, options.precision, checkpoint)
    with listen(settings) as listening, json_logs():
        if not settings.is_loopback and settings.token is None:
            _log.warning(
                "%s: anybody who reaches this address may use the server: no --token-file is given",
                settings.host,
            )
        with Engine.load(checkpoint, device=devices, wav2vec=options.wav2vec) as engine:
            server = Server(create_app(engine, settings), settings)
            print(f"liveact serves at {url_of(listening)}", flush=True)
            asyncio.run(server.serve(sockets=[listening]))


def settings_of(options: argparse.Namespace) -> ServeSettings:
    """The options, checked. Raises InputError."""
    from liveact.serve.portraits import list_portraits
    from liveact.serve.security import read_token
    from liveact.serve.settings import ServeSettings

    defaults = ServeSettings()
    bundled = options.checkpoint is None
    size = parse_size(options.size or (demo.SIZE if bundled else "512x512"))
    check_size(*size)
    portraits = {}
    if options.portraits is not None:
        portraits = list_portraits(options.portraits)
    elif bundled:
        portraits = {"cartoon": demo.bundle_directory() / demo.PORTRAIT}
    return ServeSettings(
        host=options.host,
        port=arguments.whole_number("port", options.port, 0, 65_535),
        token=None if options.token_file is None else read_token(options.token_file),
        allow_origins=tuple(_origin(text) for text in options.allow_origin),
        portraits=portraits,
        prompts=_prompts(options),
        example=demo.bundle_directory() / demo.SPEECH if bundled else None,
        size=size,
        fps=float(arguments.number("fps", options.fps, MIN_FPS, MAX_FPS)),
        max_pixels=max(defaults.max_pixels, size[0] * size[1]),
        max_fps=max(defaults.max_fps, options.fps),
        max_sessions=arguments.whole_number("max-sessions", options.max_sessions, 1, 1000),
        idle_s=float(arguments.number("idle-s", options.idle_s, 1, 1e9)),
        total_s=float(arguments.number("total-s", options.total_s, 1, 1e9)),
        drain_s=float(arguments.number("drain-s", options.drain_s, 0, 1e9)),
        ice_servers=tuple(options.ice_server),
    )


def _prompts(options: argparse.Namespace) -> dict[str, str]:
    """What the page offers: given, or what comes with the checkpoint."""
    path = options.prompts
    if path is None:
        folder = options.checkpoint or demo.bundle_directory() / demo.MODEL
        path = folder / PROMPTS_FILE
        if not path.is_file():
            return {}
    found = read_json(path)
    texts = all(isinstance(text, str) and text for text in found.values())
    if not texts or not all(found):
        raise InputError(f"{path}: expected names and prompts, found something else")
    return found


def _origin(text: str) -> str:
    """`https://example.com`, as browsers send it. Raises InputError."""
    if not re.fullmatch(ORIGIN, text):
        raise InputError(
            f"allow-origin: expected an origin such as https://example.com, found {text!r:.80}"
        )
    return text
