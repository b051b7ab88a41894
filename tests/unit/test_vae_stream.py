"""The queue of a GPU, on a CPU: CUDA streams, events and graphs are stand-ins that keep a log.

The stand-in of a graph runs the call again; what a real one does is in test_gpu_vae.py.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from liveact.checkpoint.random import random_vae
from liveact.checkpoint.tensors import PthTensors
from liveact.errors import SessionError
from liveact.vae.queue import DecodeQueue, RecordedCall
from liveact.vae.vae import Vae, VaeStream

LATENTS = torch.randn(16, 12, 2, 2, generator=torch.Generator().manual_seed(1))


def load() -> Vae:
    return Vae.from_tensors(PthTensors(random_vae(8, 0), Path("random")), "cpu")


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def record(self, stream: Any) -> None:
        self._log.append("copied")

    def synchronize(self) -> None:
        self._log.append("waited")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> Vae:
    """A VAE on the CPU that believes it has a GPU."""

    def stream(device: torch.device, priority: int) -> Any:
        assert priority == 0
        return SimpleNamespace(device=device)

    @contextmanager
    def working_on(stream: Any) -> Iterator[None]:
        log.append("turn")
        yield

    def record(call: Callable[..., Any], latents: torch.Tensor) -> Any:
        log.append(f"record {latents.shape[1]}")
        pictures = torch.zeros(4 * latents.shape[1], 16, 16, 3, dtype=torch.uint8)
        return pictures, lambda: (log.append("replay"), pictures.copy_(call(latents)))

    empty = torch.empty

    def unpinned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*shape, **options)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", working_on)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: FakeEvent(log))
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: threading.Lock())
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(RecordedCall, "record", staticmethod(record))
    vae = load()
    vae.queue = DecodeQueue(torch.device("cpu"))
    return vae


def pictures(decoder: VaeStream, latents: torch.Tensor) -> np.ndarray:
    return np.concatenate(list(decoder.decode(latents)))


def past(decoder: VaeStream) -> list[torch.Tensor]:
    """What its convolutions remember."""
    buffers = decoder._state._buffers
    return [buffer[: conv.past_frames] for conv, buffer in buffers.items()]


@pytest.mark.parametrize("frames_per_call", [1, 2])
def test_the_pictures_are_those_without_a_queue(vae, frames_per_call):
    decoder, plain = (v.open_stream(frames_per_call) for v in (vae, load()))
    for block in (*LATENTS.split([3, 5, 4], dim=1), LATENTS[:, :4].double()):
        assert (pictures(decoder, block) == pictures(plain, block)).all()
        assert all(torch.equal(a, b) for a, b in zip(past(decoder), past(plain), strict=True))


def test_calls_warm_up_are_recorded_and_replayed(vae, log):
    """Each number of latent frames once per state; the first frame of a video never."""
    decoder = vae.open_stream(2)
    pictures(decoder, LATENTS[:, :4])  # 1, 2, 1 frames
    assert "replay" not in log
    pictures(decoder, LATENTS[:, 4:8])
    assert [line for line in log if "re" in line] == ["record 2", "replay", "replay"]
    log.clear()
    decoder.reset()
    pictures(decoder, LATENTS[:, :4])
    assert [line for line in log if "re" in line] == ["replay", "record 1", "replay"]
    decoder.reset()
    list(decoder.decode(LATENTS[:, :4, :1]))
    assert not any(recorded._replay for recorded in decoder._recorded.values())


def test_all_calls_are_enqueued_before_the_first_is_waited_for(vae, log):
    pieces = vae.open_stream().decode(LATENTS[:, :3])
    log.clear()
    first = next(pieces)
    assert log == ["turn", "copied", "copied", "record 1", "replay", "copied", "waited"]
    kept = first.copy()
    list(pieces)
    assert log[-2:] == ["waited"] * 2 and (first == kept).all() and first.base is None


def test_a_call_that_failed_while_it_warmed_up_is_not_recorded(vae, log):
    def fail(latents: torch.Tensor) -> Any:
        raise RuntimeError("out of luck")

    part = LATENTS[:, :1]
    recorded = RecordedCall(torch.empty(part.shape))
    with pytest.raises(RuntimeError, match="out of luck"):
        recorded(part, fail)
    assert torch.equal(recorded(part, lambda latents: latents + 1), part + 1) and not log
    recorded(part, lambda latents: torch.zeros(4, 16, 16, 3))
    assert log == ["record 1", "replay"]


def test_what_is_not_finite_comes_with_its_copy(vae, log):
    """Nothing more is waited for than the pictures themselves."""
    decoder = vae.open_stream()
    latents = LATENTS[:, :6].clone()
    latents[3, 4, 0, 0] = torch.nan
    pieces = decoder.decode(latents)
    log.clear()
    found = 0
    with pytest.raises(SessionError, match="VAE: expected finite pictures, found a NaN or an inf"):
        for _ in pieces:
            found += 1
    assert found == 4 and log.count("waited") == log.count("copied") - 1 == 5
    decoder.reset()
    assert len(list(decoder.decode(LATENTS[:, :6]))) == 6


def test_a_dropped_stream_is_freed_at_once(vae, monkeypatch):
    """Not when the garbage collector comes around: it knows nothing of the memory of a GPU."""
    monkeypatch.setattr(  # a graph holds addresses, no objects
        RecordedCall, "record", staticmethod(lambda call, given: (call(given), lambda: None))
    )
    decoder = vae.open_stream()
    pictures(decoder, LATENTS[:, :4])
    dropped = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert dropped() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["decode", "open", "reset", "close"])
def test_nobody_works_on_the_stream_while_another_records(vae, monkeypatch, what):
    """What is enqueued on it then would become part of the graph."""
    recording, go_on, done = threading.Event(), threading.Event(), threading.Event()
    decoder, other = vae.open_stream(), vae.open_stream()
    pictures(decoder, LATENTS[:, :2])
    if what != "open":
        pictures(other, LATENTS[:, :1])
    uses = {
        "decode": lambda: list(other.decode_video(LATENTS[:, 1:2])),
        "open": lambda: other.decode_video(LATENTS[:, 1:2]),
        "reset": other.reset,
        "close": other.close,
    }

    def record(call: Callable[..., Any], latents: torch.Tensor) -> Any:
        recording.set()
        assert go_on.wait(30)
        return call(latents), lambda: None

    monkeypatch.setattr(RecordedCall, "record", staticmethod(record))
    monkeypatch.setattr(DecodeQueue, "hand_over", lambda self, result: result)

    def interfere() -> None:
        assert recording.wait(30)
        uses[what]()
        done.set()

    threads = [
        threading.Thread(target=pictures, args=(decoder, LATENTS[:, 2:3]), daemon=True),
        threading.Thread(target=interfere, daemon=True),
    ]
    for thread in threads:
        thread.start()
    assert recording.wait(30)
    assert not done.wait(0.05)
    go_on.set()
    assert done.wait(30)
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize("taken", [2, 1, 0])
def test_pinned_memory_goes_back_under_the_lock(vae, monkeypatch, taken: int) -> None:
    """torch makes an event then on the stream that it was used on: not in somebody's recording.
    With all pictures taken, some, or none."""
    empty, kept = torch.empty, []

    def watched(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        tensor = empty(*shape, **options)
        if pin_memory:
            weakref.finalize(tensor, lambda: kept.append(vae.queue._lock._is_owned()))
        return tensor

    decoder = vae.open_stream()
    monkeypatch.setattr(torch, "empty", watched)
    pieces = decoder.decode(LATENTS[:, :2])
    assert len([next(pieces) for _ in range(taken)]) == taken
    if taken == 2:
        assert next(pieces, None) is None
    pieces.close()
    assert kept == [True] * (4 if taken else 0)


def test_a_result_is_handed_over_under_the_lock(vae, monkeypatch) -> None:
    owned = []
    outside = SimpleNamespace(wait_stream=lambda _: owned.append(vae.queue._lock._is_owned()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: outside)
    vae.queue.hand_over(SimpleNamespace(record_stream=lambda _: None))
    assert owned == [True]
