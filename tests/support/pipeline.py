"""What the tests of the pipeline share: the demo checkpoint, sound, a guard against hanging."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from liveact.checkpoint.demo import write_demo_checkpoint

T = TypeVar("T")

# For processes of their own; see below.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}

# The networks here are tiny: a second thread gains nothing, and where other processes use the
# cores, waiting for it was measured to make the tests ten times slower.
torch.set_num_threads(1)


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def demo_checkpoint() -> Path:
    """A demo checkpoint, made once for all tests; not to be written to."""
    return write_demo_checkpoint(Path(_temporary_directory().name) / "demo")


def speech(seconds: float, rate_hz: int = 16_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise with the rise and fall of syllables: float32 [n, channels]; the channels differ."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate_hz)
    loudness = 0.2 + 0.2 * np.sin(2 * np.pi * 4 * np.arange(count) / rate_hz)
    return (loudness[:, None] * rng.standard_normal((count, channels))).clip(-1, 1).astype("f4")


def write_wav(path: Path, samples: np.ndarray, rate_hz: int = 16_000) -> Path:
    """samples float [n, channels] as 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


class Background:
    """A call in a thread of its own, whose result or exception is fetched with a time limit."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            torch.set_num_threads(1)  # for OpenMP this is a setting of each thread
            try:
                self._result = function(*arguments, **options)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="test", daemon=True)
        self._thread.start()

    def running(self, for_s: float = 0.0) -> bool:
        self._thread.join(for_s)
        return self._thread.is_alive()

    def result(self, timeout_s: float = 30.0) -> Any:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still running after {timeout_s} s: it hangs"
        if self._error is not None:
            raise self._error
        return self._result


def in_time(function: Callable[..., T], *arguments: Any, timeout_s: float = 30.0) -> T:
    """The result of a call that must not take longer."""
    result: T = Background(function, *arguments).result(timeout_s)
    return result
