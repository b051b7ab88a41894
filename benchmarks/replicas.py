"""Two replicas on Ray Serve against one, on this machine: how many frames the same sessions get.

All sessions speak without a pause, over `WS /v1/stream` through Ray's proxy. The CPUs are divided
among the replicas, so that on a CPU two of them have what one has; with GPUs each has one of its
own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import spread
from benchmarks.machine import weights_hash
from benchmarks.options import picture_size, positive
from benchmarks.quality import TALKER
from benchmarks.serve import NAME, PORTRAITS, RATE_HZ, SPEECH
from liveact.checkpoint.layout import DIT_STEM
from liveact.checkpoint.tensors import open_tensors
from liveact.errors import InputError, LiveActError

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

    from liveact.integrations.ray import Replicas

LIMIT_S = 300.0  # for anything that is waited for
AHEAD_S = 10.0  # of sound that waits in a session
AGAIN_S = 0.2  # after a refusal: the proxy may have asked a replica that is full
REPEATED = 4  # a flag of a frame

FIELDS: dict[str, Any] = {
    "sessions": int,
    "seconds": float,
    "replicas": [
        {"replicas": int, "frames_per_s": float, "each": [float], "connect_s": spread.FIELDS}
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=TALKER, help="%(default)s")
    parser.add_argument("--sessions", type=positive, default=4, help="in all (default 4)")
    parser.add_argument("--seconds", type=positive, default=30, help="counted (default 30)")
    parser.add_argument(
        "--size", type=picture_size, default=(128, 128), metavar="WxH", help="default 128x128"
    )
    parser.set_defaults(repeat=1)


def device_of(options: argparse.Namespace) -> str:
    """Of each replica."""
    device: str | None = options.device
    return device or ("cuda:0" if torch.cuda.is_available() else "cpu")


def _free_port() -> int:
    """Not one of those that a system gives to whoever asks for any: Ray's other processes do,
    between now and when its proxy listens."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise LiveActError("port: expected a free one from 20000 to 31999, found none in 100")


@contextlib.contextmanager
def on_ray(options: Replicas, cpus: int) -> Iterator[int]:
    """The application on a Ray of its own that may use so many CPUs: the port of its proxy. What
    Ray changes in this process is as before afterwards."""
    import ray  # here, as the other benchmarks run where it is not installed
    from ray import serve

    from liveact.integrations.ray import application
    from liveact.integrations.ray_proxy import PROXY_CALLBACK

    variables = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": PROXY_CALLBACK,
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",  # not 5: of a loaded machine
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    before = {name: os.environ.get(name) for name in variables}
    terminated = signal.getsignal(signal.SIGTERM)
    port = _free_port()
    os.environ |= variables
    try:
        ray.init(
            num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(options))
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()
        signal.signal(signal.SIGTERM, terminated)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def serving(options: argparse.Namespace, replicas: int) -> Iterator[str]:
    """So many replicas on a Ray of their own; the address."""
    from liveact.integrations.ray import Replicas

    on_cpu = device_of(options) == "cpu"
    cpus = os.cpu_count() or 1
    found = Replicas(
        checkpoint=str(options.checkpoint.resolve()),
        device=device_of(options),
        num_gpus=0 if on_cpu else 1,
        num_cpus=cpus / replicas,
        max_sessions=options.sessions,
        min_replicas=replicas,
        max_replicas=replicas,
        portraits=str(PORTRAITS),
        size=options.size,
        drain_s=1,
    )
    # One more than there are: the proxy and the controller reserve none, but are not free.
    with on_ray(found, cpus + 1) as port:
        yield f"ws://127.0.0.1:{port}/v1/stream"


def connected(url: str, stack: ExitStack) -> tuple[ClientConnection, float]:
    """A session that has shown its first frame, and how long that took; the stack closes it."""
    from websockets.sync.client import connect

    begin_s = time.monotonic()
    while time.monotonic() < begin_s + LIMIT_S:
        opened = connect(url, max_size=None, open_timeout=LIMIT_S, ping_interval=None)
        socket = stack.enter_context(opened)
        socket.send(json.dumps({"type": "start", "portrait": NAME}))
        while isinstance(message := socket.recv(LIMIT_S), str):
            if (event := json.loads(message))["type"] != "refused":
                continue
            socket.close()
            if event["code"] != "full":
                raise LiveActError(f"replicas: expected a session, found {event['message']}")
            time.sleep(AGAIN_S)
            break
        else:
            return socket, time.monotonic() - begin_s
    raise LiveActError(f"replicas: expected a session within {LIMIT_S:g} s, found none")


def speaking_frames_per_s(client: ClientConnection, seconds: float, seed: int) -> float:
    """New frames that speak, from the first of them on."""
    random = np.random.default_rng(seed)

    def second() -> bytes:
        return (3000 * random.standard_normal(RATE_HZ)).astype("<i2").tobytes()

    for _ in range(round(AHEAD_S)):
        client.send(second())
    count, begin_s, told_s = 0, None, 0.0
    while begin_s is None or time.monotonic() < begin_s + seconds:
        message = client.recv(LIMIT_S)
        if isinstance(message, bytes):
            if message[5] & SPEECH and not message[5] & REPEATED:
                begin_s = begin_s or time.monotonic()
                count += 1
            continue
        event = json.loads(message)
        if event["type"] == "stats" and event["backlog_s"] < AHEAD_S - 1:
            client.send(second())
        if event["type"] == "error":
            raise LiveActError(f"replicas: expected frames, found {event['message']}")
        told_s = told_s or time.monotonic()
        if begin_s is None and time.monotonic() > told_s + LIMIT_S:
            raise LiveActError("replicas: expected a frame that speaks, found none")
    return count / (time.monotonic() - begin_s)


def measure_replicas(options: argparse.Namespace, replicas: int) -> dict[str, Any]:
    """All sessions at once, on so many replicas."""
    with serving(options, replicas) as url, ExitStack() as stack:
        sockets, times = [], []
        for _ in range(options.sessions):
            client, seconds = connected(url, stack)
            sockets.append(client)
            times.append(seconds)
        with ThreadPoolExecutor(options.sessions) as pool:
            each = list(
                pool.map(
                    speaking_frames_per_s,
                    sockets,
                    [float(options.seconds)] * options.sessions,
                    range(options.seed, options.seed + options.sessions),
                )
            )
    return {
        "replicas": replicas,
        "frames_per_s": sum(each),
        "each": each,
        "connect_s": spread.spread(times),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One replica, then two."""
    if not (options.checkpoint / "config.json").is_file():
        raise InputError(f"{options.checkpoint}: expected a checkpoint, found no config.json")
    tensors = open_tensors(options.checkpoint, DIT_STEM)
    return {
        "timed": "new speaking frames that clients receive through Ray's proxy, from the first one "
        "on; a connection from its opening to its first frame",
        "not_timed": "the start of Ray and of the replicas, a network, frames that are repeated",
        "device": device_of(options),
        "precision": None,  # the engine's own choice
        "sizes": {"width": options.size[0], "height": options.size[1]},
        "memory_policy": None,
        "weights": {"source": options.checkpoint.name, "sha256": weights_hash(tensors)},
        "sessions": options.sessions,
        "seconds": float(options.seconds),
        "replicas": [measure_replicas(options, count) for count in (1, 2)],
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['sessions']} sessions that speak", title_justify="left")
    for column in ("replicas", "frames a second", "of each session", "connection, median", "max"):
        table.add_column(column, justify="right")
    for row in result["replicas"]:
        table.add_row(
            str(row["replicas"]),
            f"{row['frames_per_s']:.1f}",
            " ".join(f"{one:.1f}" for one in row["each"]),
            *[f"{row['connect_s'][name]:.2f} s" for name in ("median", "max")],
        )
    console.print(table)
    console.print(f"timed: {result['timed']}\nnot timed: {result['not_timed']}")
