"""Large uploads, and the other connections of the server meanwhile.

Times are processor time of a thread, which a busy machine does not make longer.
"""

from __future__ import annotations

import asyncio
import binascii
import functools
import gc
import io
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from liveact.engine import Engine
from liveact.errors import InputError
from liveact.serve import bodies, portraits
from tests.support.server import Served, serving, upload

FRAME_S = 0.05  # at 20 fps
BODY_BYTES = 10e6


@functools.cache
def large_portrait() -> bytes:
    """A JPEG that hardly compresses."""
    noise = np.random.default_rng(1).integers(0, 256, (2000, 2400, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def send(served: Served) -> None:
    created = served.create(portrait=upload(large_portrait()))
    served.client.delete(f"/v1/sessions/{created['id']}")


async def longest_s(until: Callable[[], bool]) -> float:
    """That this loop computed without a break."""
    longest = 0.0
    while not until():
        begin_s = time.thread_time()
        await asyncio.sleep(0.002)
        longest = max(longest, time.thread_time() - begin_s)
    return longest


@pytest.mark.slow
def test_the_clock_of_another_connection_is_not_held_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by what the loop computes, nor by what holds Python's lock in a thread: half of
    a frame at most. Parsing and decoding at once would be more than a frame."""
    held: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def work(*given: Any, **options: Any) -> Any:
            begin_s = time.thread_time()
            try:
                return call(*given, **options)
            finally:
                held.append(time.thread_time() - begin_s)

        return work

    monkeypatch.setattr(bodies, "from_json", timed(bodies.from_json))
    monkeypatch.setattr(binascii, "a2b_base64", timed(binascii.a2b_base64))
    with serving(engine, max_sessions=2) as served, served.talk() as client:
        assert len(json.dumps(upload(large_portrait()))) > BODY_BYTES
        client.frame()
        done = False
        gc.disable()  # all that other tests have left would count
        watching = asyncio.run_coroutine_threadsafe(longest_s(lambda: done), served.loop)
        for _ in range(3):
            send(served)
        done = True
        longest = watching.result(30)
        gc.enable()
        print(f"loop {longest * 1e3:.1f} ms, lock {max(held) * 1e3:.1f} ms")
        assert len(held) > 3 * BODY_BYTES / portraits.PIECE
        assert longest < FRAME_S / 2
        assert max(held) < FRAME_S / 2
        client.frame()


def test_base64_in_pieces_is_as_strict_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portraits, "PIECE", 8)
    decode = portraits._from_base64
    whole = bytes(range(256))
    for length in range(40):
        assert decode(upload(whole[:length])["data"]).getvalue() == whole[:length]
    for bad in ("AAAA====", "AAAAAA==AAAA", "AAAAAAA=", "AAAAAAAAA", "AAAA AAAAAAA", "AAAAAAAé"):
        try:
            expected = binascii.a2b_base64(bad, strict_mode=True)
        except ValueError:
            with pytest.raises(InputError, match="portrait: expected base64"):
                decode(bad)
        else:
            assert decode(bad).getvalue() == expected


@pytest.mark.parametrize("padding", [0, 100_000])
def test_what_is_no_json_is_one_line(engine: Engine, padding: int) -> None:
    """Small or large, which is parsed elsewhere."""
    with serving(engine) as served:
        for body in (b'{"portrait": ', b'{"portrait": "\xff"}', b"[]", b"nul"):
            answer = served.client.post(
                "/v1/sessions",
                content=body + b" " * padding,
                headers={"Content-Type": "application/json"},
            )
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["type"] == "bad_request" and "\n" not in error["message"]
