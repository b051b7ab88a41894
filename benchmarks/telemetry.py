"""What a GPU did while something was measured on it: clocks, power, temperature, throttling.

A thread asks NVML (package nvidia-ml-py) a few times a second; NVML does not touch the GPU's
queues, so nothing that is measured waits for it.
"""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any

import torch

from benchmarks import spread
from liveact.device.devices import parse_devices

PERIOD_S = 0.2
FIELDS: dict[str, Any] = {
    "name": str,
    "driver": str,
    "power_cap_w": float,
    "max_sm_mhz": int,
    "max_memory_mhz": int,
    "sm_mhz": spread.FIELDS,
    "memory_mhz": spread.FIELDS,
    "power_w": spread.FIELDS,
    "temperature_c": spread.FIELDS,
    "throttle_reasons": dict,  # name -> share of the samples
}
# Bits of nvmlDeviceGetCurrentClocksEventReasons; idle and application clocks are no throttling.
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class Telemetry:
    """Use it as a context manager round what is measured. `nvml` is for tests.

    device: `cpu`, `cuda:N`, or None for the CUDA device that a benchmark would choose. Raises
    InputError for another.
    """

    def __init__(self, device: str | None, nvml: Any = None) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._samples: list[tuple[int, int, float, int, int]] = []
        self._nvml = nvml
        self._missing = "the device is the CPU"
        name = parse_devices(device or "cuda")[0]
        if name == "cpu":
            return
        index = int(name.removeprefix("cuda:"))
        if nvml is None:
            if not torch.cuda.is_available():
                self._missing = f"torch {torch.__version__} finds no CUDA device"
                return
            try:
                self._nvml = import_module("pynvml")
            except ImportError:
                self._missing = "the package nvidia-ml-py is not installed"
                return
        try:
            self._nvml.nvmlInit()
            self._handle = self._find(index) if nvml is None else nvml.nvmlDeviceGetHandleByIndex(0)
            self._card = self._describe()
            self._sample()
        except Exception as error:  # NVML's, which are no class of ours to name
            self._missing = f"NVML: {error}"
        else:
            self._missing = ""

    def _find(self, index: int) -> Any:
        """By UUID: NVML does not know CUDA_VISIBLE_DEVICES, its indices are not those of CUDA."""
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        return self._nvml.nvmlDeviceGetHandleByUUID("GPU-" + uuid.removeprefix("GPU-"))

    def __enter__(self) -> Telemetry:
        if not self._missing:
            self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._sample()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        nvml, handle = self._nvml, self._handle
        self._samples.append(
            (
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            )
        )

    def _describe(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle
        return {
            "name": _text(nvml.nvmlDeviceGetName(handle)),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "power_cap_w": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
            "max_sm_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "max_memory_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
        }

    def summary(self) -> dict[str, Any]:
        """FIELDS, or {"missing": why there is nothing}."""
        if self._missing:
            return {"missing": self._missing}
        sm, memory, power, temperature, reasons = (
            list(c) for c in zip(*self._samples, strict=True)
        )
        return self._card | {
            "sm_mhz": spread.spread(sm),
            "memory_mhz": spread.spread(memory),
            "power_w": spread.spread(power),
            "temperature_c": spread.spread(temperature),
            "throttle_reasons": {
                name: share
                for bit, name in REASONS.items()
                if (share := sum(1 for r in reasons if r & bit) / len(reasons))
            },
        }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
