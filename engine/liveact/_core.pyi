"""Types of the extension module; what each thing does is said in include/ and bindings/.

Its errors are those of `liveact.errors`: DeviceError for a device that fails or lacks memory,
SessionError for a block that was cancelled or is not finite, InputError for everything else.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float32]

__version__: str

class Device:
    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def allocation_count(self) -> int: ...
    @property
    def free_bytes(self) -> int | None: ...
    @property
    def choices(self) -> dict[str, str]: ...

def open_cpu() -> Device: ...
def cuda_architecture(index: int, driver: str = "libcuda.so.1") -> str: ...
def cuda_versions(
    index: int, driver: str = "libcuda.so.1", cublaslt: str = "libcublasLt.so.13"
) -> dict[str, str]: ...
def open_cuda(
    index: int,
    kernels: list[dict[str, Any]],
    driver: str = "libcuda.so.1",
    cublaslt: str = "libcublasLt.so.13",
) -> Device: ...

class ModelConfig:
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_dim: int
    text_len: int
    freq_dim: int
    intermediate_dim: int
    output_dim: int
    context_tokens: int
    image_dim: int
    audio_dim: int
    eps: float
    def check(self) -> None: ...

def expected_tensors(config: ModelConfig) -> dict[str, list[int]]: ...
def launch(device: Device, name: str, stream: int, arguments: dict[str, Any]) -> None: ...
def products() -> list[str]: ...
def quantize_weight(
    address: int, dtype: str, shape: list[int]
) -> tuple[npt.NDArray[np.uint8], _Array]: ...
def check_slots(slots: tuple[int, int, int, int], memory: str) -> None: ...
def required_bytes(
    device: Device,
    config: ModelConfig,
    precision: str | dict[str, Any],
    stored: str,
    latent_height: int,
    latent_width: int,
    slots: tuple[int, int, int, int],
    audio_guidance: float,
    max_image_tokens: int,
) -> tuple[int, int]: ...

class Model:
    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        tensors: dict[str, tuple[int, str, list[int]]],
        precision: str | dict[str, Any],
    ) -> None: ...
    @property
    def config(self) -> ModelConfig: ...

class CalibrationDevice(Device):
    def __init__(self, device: Device) -> None: ...
    def watch(self, model: Model) -> None: ...
    def errors(self) -> list[dict[str, list[tuple[float, float]]]]: ...

class Stream:
    def __init__(
        self,
        model: Model,
        latent_height: int,
        latent_width: int,
        slots: tuple[int, int, int, int],
        memory: str,
        compress_axis: str,
        value_filter: str,
        audio_guidance: float,
        max_image_tokens: int,
        sampler: str,
    ) -> None: ...
    def set_prompt(self, text: _Array) -> None: ...
    def set_image(self, features: _Array, y: _Array) -> None: ...
    def denoise(
        self,
        noise: _Array,
        renoise: _Array | None,
        audio: _Array,
        velocities: _Array | None = None,
    ) -> _Array: ...
    def cancel(self) -> None: ...
    def export_context(self, step: int, layer: int) -> tuple[_Array, _Array]: ...
    @property
    def next_block(self) -> int: ...
    @property
    def frames_of_next_block(self) -> int: ...
    @property
    def audio_rows_of_next_block(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def timings(self) -> dict[str, Any]: ...
