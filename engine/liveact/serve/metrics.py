"""What an operator's dashboards read: Prometheus metrics, a registry for each server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from liveact.session.chunk import BlockTimings
from liveact.session.pacing import Frame

LATENCIES_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
STAGES_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.4, 5.0)

# name, what it is, [(labels, value)]
Gauge = tuple[str, str, list[tuple[dict[str, str], float]]]


class Metrics:
    """Counters and histograms that the server writes; `watch` adds what is read when asked for."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = self.registry
        self.opened = Counter("liveact_sessions_opened", "Sessions that were opened.", registry=of)
        self.refused = Counter(
            "liveact_sessions_refused", "Sessions that were refused.", ["reason"], registry=of
        )
        self.closed = Counter(
            "liveact_sessions_closed", "Sessions that were closed.", ["reason"], registry=of
        )
        self.blocks = Counter("liveact_blocks", "Blocks of which all was shown.", registry=of)
        self.block_seconds = Histogram(
            "liveact_block_seconds",
            "Time of a block, by stage.",
            ["stage"],
            buckets=STAGES_S,
            registry=of,
        )
        self.frames = Counter(
            "liveact_frames", "Frames handed out: speech, idle, repeated.", ["kind"], registry=of
        )
        self.underruns = Counter(
            "liveact_underruns",
            "Pictures that stood still for lack of the next.",
            registry=of,
        )
        self.first_frame = self._latency(
            "liveact_first_frame_seconds", "From the request of a session to its first frame."
        )
        self.speech_to_frame = self._latency(
            "liveact_speech_to_frame_seconds",
            "From the first sound of an utterance to its first frame.",
        )
        self.interrupt = self._latency(
            "liveact_interrupt_seconds", "From an interruption to the first frame without speech."
        )

    def _latency(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=LATENCIES_S, registry=self.registry)

    def shown(self, frame: Frame) -> None:
        """A frame was handed out."""
        kind = "repeated" if frame.repeated else "speech" if frame.speech else "idle"
        self.frames.labels(kind).inc()
        if frame.timings is not None:
            self._block(frame.timings)

    def _block(self, timings: BlockTimings) -> None:
        self.blocks.inc()
        stages = (
            ("wait", timings.wait_ms),
            ("audio", timings.audio_ms),
            ("denoise", timings.denoise_ms),
            ("decode", timings.decode_ms),
        )
        for stage, duration_ms in stages:
            self.block_seconds.labels(stage).observe(duration_ms / 1000)

    def watch(self, read: Callable[[], Iterable[Gauge]]) -> None:
        """Gauges that are read whenever the metrics are."""
        self.registry.register(_Gauges(read))

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self._read = read

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, text, values in self._read():
            labels = sorted({label for found, _ in values for label in found})
            family = GaugeMetricFamily(name, text, labels=labels)
            for found, value in values:
                family.add_metric([found[label] for label in labels], value)
            yield family


class Gpus:
    """Memory and utilisation of the GPUs of this machine, where nvidia-ml-py and a driver are."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        with contextlib.suppress(Exception):  # no package, no driver, no GPU: nothing to tell
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            self._nvml = nvml

    def gauges(self) -> Iterator[Gauge]:
        """What they say at this moment; a GPU that does not answer is left out."""
        used: list[tuple[dict[str, str], float]] = []
        total: list[tuple[dict[str, str], float]] = []
        busy: list[tuple[dict[str, str], float]] = []
        for index, handle in enumerate(self._handles):
            with contextlib.suppress(self._nvml.NVMLError):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                rates = self._nvml.nvmlDeviceGetUtilizationRates(handle)
                label = {"gpu": str(index)}
                used.append((label, memory.used))
                total.append((label, memory.total))
                busy.append((label, rates.gpu / 100))
        if used:
            yield "liveact_gpu_memory_used_bytes", "Of a GPU, by all processes.", used
            yield "liveact_gpu_memory_total_bytes", "Of a GPU.", total
            yield "liveact_gpu_utilization_ratio", "Of a GPU, 0 to 1.", busy
