"""The DiT from a checkpoint directory: opening its files and handing them to the C++ runtime.

`Dit` holds the weights (shared, immutable), `DitStream` one session's state. Tensors stay where
the safetensors library mapped them; the CPU backend reads bf16 weights in place.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liveact import _core
from liveact.blocks import RELEASED_SLOTS, BlockClock, Slots
from liveact.dit.precision import AUTO, Precision, auto_policy, core_precision
from liveact.dit.weights import DTYPE_NAMES, check_precision, open_weights
from liveact.errors import InputError

_log = logging.getLogger("liveact")

STEPS = 3
ROOM_FOR = (416 // 8, 720 // 8)  # latent size of the session that `auto` leaves memory for
IMAGE_TOKENS = 257
MEMORIES = ("sequential", "sharded", "mean")
COMPRESS_AXES = ("token", "frame")
VALUE_FILTERS = ("key", "own")
SAMPLERS = ("renoise", "euler")


@dataclass(frozen=True)
class MemoryPolicy:
    """How the context of a session is made (docs/model.md, "KV layout").

    Attributes:
        memory: which slots are made of which, one of MEMORIES.
        compress_axis: what the five taps run along, one of COMPRESS_AXES.
        value_filter: whose taps compress the values, one of VALUE_FILTERS.
        slots: latent frames in each part of the key/value layout.
    """

    memory: str = "sequential"
    compress_axis: str = "token"
    value_filter: str = "key"
    slots: tuple[int, int, int, int] = RELEASED_SLOTS


def auto_bytes(
    device: _core.Device, config: _core.ModelConfig, devices: int = 1
) -> tuple[int, int]:
    """Of the weights and of a session of 720×416 in `auto` where it need not save memory, on each
    of its devices."""
    precision = auto_policy(config.num_layers, "bf16").core()
    sizes = (*ROOM_FOR, RELEASED_SLOTS, 1.0, IMAGE_TOKENS)
    return _core.required_bytes(device, config, precision, "bf16", *sizes, devices)


def settled(
    precision: Precision,
    devices: Sequence[_core.Device],
    config: _core.ModelConfig,
    beside_bytes: int = 0,
) -> Precision:
    """`auto` as a policy for these devices, anything else as it is.

    bf16 where the weights, a session of 720×416 and `beside_bytes` fit into what is free, else fp8.
    """
    if precision != AUTO:
        return precision
    needed = sum(auto_bytes(devices[0], config, len(devices))) + beside_bytes
    free = [device.free_bytes for device in devices]
    fits = all(free_bytes is None or needed <= free_bytes for free_bytes in free)
    return auto_policy(config.num_layers, "bf16" if fits else "fp8")


class Dit:
    """The weights of a DiT on one device, or on each of two that share every block.

    precision: what the products run in; `auto` is a policy here. beside_bytes: memory of the device
        that somebody else will need, which `auto` leaves alone.
    """

    def __init__(
        self,
        devices: _core.Device | Sequence[_core.Device],
        config: _core.ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        precision: Precision = "fp32",
        beside_bytes: int = 0,
    ) -> None:
        self.devices = (devices,) if isinstance(devices, _core.Device) else tuple(devices)
        self._check_devices(config)
        self.precision = settled(precision, self.devices, config, beside_bytes)
        if precision == AUTO:
            _log.info("%s: %s", self.device.name, self.precision)
        # Kept alive: the runtime reads weights from this (mapped) memory.
        self._tensors = {name: tensors[name] for name in _core.expected_tensors(config)}
        narrow = [n for n, tensor in self._tensors.items() if tensor.dtype == torch.float8_e4m3fn]
        self._tensors |= {f"{name}_scale": tensors[f"{name}_scale"] for name in narrow}
        for tensor_device in {tensor.device for tensor in self._tensors.values()}:
            if tensor_device.type == "cuda":
                # The runtime does not know the stream that writes them. Not the whole device: other
                # sessions may be recording on it.
                torch.cuda.current_stream(tensor_device).synchronize()
        described = {
            name: (tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], list(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        wanted = core_precision(self.precision)
        self.models = _core.load_models(self.devices, config, described, wanted)
        if self.device.name != "cpu":  # a GPU has copies of all: nobody reads these again
            self._tensors = {}

    def _check_devices(self, config: _core.ModelConfig) -> None:
        """Raises InputError or DeviceError for two that cannot share a block, before anything large
        is loaded."""
        if len(self.devices) == 1:
            return
        if config.num_heads % 2:
            raise InputError(
                f"two devices: expected an even number of heads, found {config.num_heads}"
            )
        first, second = self.devices
        first.connect(second)
        second.connect(first)

    def on_first(self) -> Dit:
        """The same weights on the first device alone."""
        one = copy.copy(self)
        one.devices, one.models = self.devices[:1], self.models[:1]
        return one

    @property
    def device(self) -> _core.Device:
        """The first one."""
        return self.devices[0]

    @property
    def model(self) -> _core.Model:
        """On the first device."""
        return self.models[0]

    @property
    def config(self) -> _core.ModelConfig:
        return self.model.config

    @classmethod
    def load(
        cls,
        directory: Path,
        devices: _core.Device | Sequence[_core.Device],
        precision: Precision = "fp32",
    ) -> Dit:
        """Opens `config.json` and the weight files of a checkpoint directory.

        Raises InputError naming the file and tensor before anything large is allocated.
        """
        config, tensors = open_weights(directory)
        check_precision(tensors, config, precision, directory)
        return cls(devices, config, tensors, precision)

    def stream_bytes(self, latent_size: tuple[int, int], image_tokens: int = IMAGE_TOKENS) -> int:
        """Memory of a stream in bytes, on each device, with the other options of `open_stream` as
        they are without being given."""
        precision, count = core_precision(self.precision), len(self.devices)
        sizes = (*latent_size, RELEASED_SLOTS, 1.0, image_tokens)
        return _core.required_bytes(self.device, self.config, precision, "bf16", *sizes, count)[1]

    def close(self) -> None:
        """Frees the weights once the streams are closed; nothing may be called afterwards."""
        self.models = []
        self._tensors = {}

    def open_stream(
        self,
        latent_size: tuple[int, int],
        policy: MemoryPolicy = MemoryPolicy(),
        audio_guidance: float = 1.0,
        image_tokens: int = IMAGE_TOKENS,
        sampler: str = "renoise",
    ) -> DitStream:
        """A new session's state. `latent_size` is (h, w) = picture (height, width) / 8; `sampler`
        one of SAMPLERS: the released generator's, which draws fresh noise between the steps, or the
        released demo's plain Euler step."""
        return DitStream(self, latent_size, policy, audio_guidance, image_tokens, sampler)


class DitStream:
    """One session on a Dit. One thread at a time, except `cancel`."""

    def __init__(
        self,
        dit: Dit,
        latent_size: tuple[int, int],
        policy: MemoryPolicy,
        audio_guidance: float,
        image_tokens: int,
        sampler: str,
    ) -> None:
        self._dit = dit
        self.latent_size = latent_size
        self.sampler = sampler
        self.clock = BlockClock(Slots(*policy.slots))
        known = set(dit.device.choices)
        self._stream: Any = _core.Stream(
            dit.models,
            *latent_size,
            policy.slots,
            policy.memory,
            policy.compress_axis,
            policy.value_filter,
            audio_guidance,
            image_tokens,
            sampler,
        )
        for call, choice in dit.device.choices.items():
            if call not in known:
                _log.info("%s, %s: %s", dit.device.name, call, choice)

    @property
    def next_block(self) -> int:
        return int(self._stream.next_block)

    @property
    def frames_of_next_block(self) -> int:
        return int(self._stream.frames_of_next_block)

    @property
    def audio_rows_of_next_block(self) -> int:
        return int(self._stream.audio_rows_of_next_block)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(channels, n, h, w) of the next block's noise and latent."""
        channels = int(self._dit.config.out_dim)
        return channels, self.frames_of_next_block, *self.latent_size

    @property
    def audio_shape(self) -> tuple[int, int]:
        """(rows, audio_dim) of the next block's audio."""
        return self.audio_rows_of_next_block, int(self._dit.config.audio_dim)

    @property
    def device_bytes(self) -> int:
        """Memory of the stream, on all its devices; 0 once it is closed. Any thread."""
        stream = self._stream
        return 0 if stream is None else int(stream.device_bytes)

    @property
    def timings(self) -> dict[str, Any]:
        """Of the last block: `conditioning_ms`, `step_ms` (one per step)."""
        return dict(self._stream.timings)

    def set_prompt(self, text: torch.Tensor) -> None:
        """text [tokens, text_dim]: the prompt from the next block on."""
        self._call("set_prompt", _f32(text))

    def set_image(self, features: torch.Tensor, y: torch.Tensor) -> None:
        """features [tokens, image_dim]; y [in_dim − out_dim, frames, h, w]."""
        self._call("set_image", _f32(features), _f32(y))

    def denoise(
        self,
        noise: torch.Tensor,
        renoise: torch.Tensor | None,
        audio: torch.Tensor,
        *,
        velocities: np.ndarray[Any, np.dtype[np.float32]] | None = None,
    ) -> torch.Tensor:
        """The next block.

        noise [16, n, h, w]; renoise [2, 16, n, h, w], None with the sampler `euler`; audio
        [rows, layers, hidden] or [rows, audio_dim] with `audio_rows_of_next_block` rows. Returns
        the latent [16, n, h, w] fp32. Raises SessionError after `cancel` or when the result is not
        finite.
        """
        rows = _f32(audio.reshape(audio.shape[0], -1))
        fresh = None if renoise is None else _f32(renoise)
        return torch.from_numpy(self._call("denoise", _f32(noise), fresh, rows, velocities))

    def draw_noise(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noise and re-noising of the next block, as `denoise` takes them."""
        noise = torch.randn(self.latent_shape, generator=generator)
        if self.sampler == "euler":
            return noise, None
        fresh = (torch.randn(self.latent_shape, generator=generator) for _ in range(STEPS - 1))
        return noise, torch.stack([*fresh])

    def cancel(self) -> None:
        """Makes a running `denoise` raise at its next layer, for good. From any thread."""
        if (stream := self._stream) is not None:
            stream.cancel()

    def close(self) -> None:
        """Frees the device memory; nothing but `cancel` may be called afterwards."""
        self._stream = None

    def export_context(self, step: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (un-rotated) and values [context tokens, heads, head_dim] of the next block."""
        k, v = self._call("export_context", step, layer)
        return torch.from_numpy(k), torch.from_numpy(v)

    def _call(self, name: str, *arguments: Any) -> Any:
        # By name: a reference to the stream in the traceback of an error would outlive `close`.
        return getattr(self._stream, name)(*arguments)


def _f32(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()
