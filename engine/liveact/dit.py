"""The DiT from a checkpoint directory: opening its files and handing them to the C++ runtime.

`Dit` holds the weights (shared, immutable), `DitStream` one session's state. Tensors stay where
the safetensors library mapped them; the CPU backend reads bf16 weights in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liveact import _core
from liveact.checkpoint import Tensors, check_tensors, open_tensors, read_json, read_size
from liveact.errors import InputError
from liveact.precision import PRECISIONS as PRECISIONS  # benchmarks take the names from here
from liveact.precision import (
    PRODUCT_LINEARS,
    Precision,
    check_layers,
    converted_precision,
    core_precision,
    format_of,
)

STEPS = 3
WEIGHTS_STEM = "diffusion_pytorch_model"
RELEASED_SLOTS = (2, 2, 2, 8)  # reference, long-term, short-term, current
MEMORIES = ("sequential", "sharded", "mean")
COMPRESS_AXES = ("token", "frame")
VALUE_FILTERS = ("key", "own")

# config.json key -> value that this engine is written for; another value is refused.
_FIXED = {
    "model_type": "i2v",
    "patch_size": [1, 2, 2],
    "qk_norm": True,
    "cross_attn_norm": True,
    "audio_window": 5,
    "vae_scale": 4,
    "norm_input_visual": True,
    "norm_output_audio": True,
}
# config.json key -> the largest value that is believed, far above any model, so that a wrong one is
# refused and not allocated.
_SIZES = {
    "dim": 2**16,
    "ffn_dim": 2**18,
    "num_heads": 2**10,
    "num_layers": 2**10,
    "in_dim": 2**10,
    "out_dim": 2**10,
    "text_dim": 2**16,
    "text_len": 2**13,
    "freq_dim": 2**16,
    "intermediate_dim": 2**16,
    "output_dim": 2**16,
    "context_tokens": 2**10,
}
_DEFAULTED = ("freq_dim", "text_len")  # may be missing
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}


def product_weights(num_layers: int) -> dict[str, tuple[int, str]]:
    """Name of every weight that a precision is about → its layer and product."""
    return {
        f"blocks.{layer}.{linear}.weight": (layer, product)
        for layer in range(num_layers)
        for product, linears in PRODUCT_LINEARS.items()
        for linear in linears
    }


def read_config(path: Path, tensors: Tensors) -> _core.ModelConfig:
    """Sizes of the DiT from `config.json`; the two that are not in it follow from tensor shapes.

    Raises InputError for a key that is missing, of the wrong type or not supported.
    """
    raw = read_json(path)
    for key, expected in _FIXED.items():
        if key in raw and raw[key] != expected:
            raise InputError(f"{path}: expected {key} to be {expected!r}, found {raw[key]!r}")
    config = _core.ModelConfig()
    for key, at_most in _SIZES.items():
        if key not in raw and key not in _DEFAULTED:
            raise InputError(f"{path}: expected the key {key}, found none")
        if key in raw:
            setattr(config, key, read_size(raw, key, path, at_most=at_most))
    eps = raw.get("eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise InputError(f"{path}: expected eps to be a number from 0 to 1, found {eps!r:.80}")
    config.eps = float(eps)
    config.image_dim = _columns(tensors, "img_emb.proj.1.weight", 1)
    config.audio_dim = _columns(tensors, "audio_proj.proj1_vf.weight", 8)
    try:
        config.check()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def _columns(tensors: Tensors, name: str, windows: int) -> int:
    if name not in tensors:
        raise InputError(f"{tensors.source}: expected tensor {name}, found none")
    shape = tensors.shape(name)
    if len(shape) != 2 or shape[1] == 0 or shape[1] % windows:
        raise InputError(
            f"{tensors.file_of(name)}: expected {name} to be a matrix whose columns are a "
            f"multiple of {windows}, found {list(shape)}"
        )
    return int(shape[1]) // windows


def open_weights(directory: Path) -> tuple[_core.ModelConfig, Tensors]:
    """The DiT of a checkpoint directory, as released or converted; touches no data.

    Weights in fp8 are believed only where config.json says that they were converted: scales of
    other makers mean other things. Raises InputError naming the file and tensor.
    """
    tensors = open_tensors(directory, WEIGHTS_STEM)
    config = read_config(directory / "config.json", tensors)
    expected = {name: tuple(shape) for name, shape in _core.expected_tensors(config).items()}
    narrow: set[str] = set()
    if converted_precision(directory) is not None:
        weights = product_weights(config.num_layers)
        narrow = {n for n in weights if n in tensors and tensors.dtype(n) == torch.float8_e4m3fn}
    wide = {name: shape for name, shape in expected.items() if name not in narrow}
    check_tensors(tensors, wide, {torch.bfloat16, torch.float32}, "DiT")
    scales = {f"{name}_scale": expected[name][:1] for name in narrow}
    check_tensors(tensors, scales, {torch.float32}, "DiT")
    check_tensors(tensors, expected | scales, set(_DTYPE_NAMES), "DiT", ("blocks.",))
    return config, tensors


def check_precision(
    tensors: Tensors, config: _core.ModelConfig, precision: Precision, directory: Path
) -> None:
    """Raises InputError for a policy of another size, or one wider than converted weights are."""
    check_layers(precision, config.num_layers)
    for name, (layer, product) in product_weights(config.num_layers).items():
        wanted = format_of(precision, layer, product)
        if tensors.dtype(name) == torch.float8_e4m3fn and wanted != "fp8":
            raise InputError(
                f"{directory}: expected a precision with fp8 for {product} of layer {layer}, as "
                f"its weights were converted, found {wanted} (use the original checkpoint for that)"
            )


@dataclass(frozen=True)
class MemoryPolicy:
    """How the context of a session is made; the names are those of model-spec's tables."""

    memory: str = "sequential"
    compress_axis: str = "token"
    value_filter: str = "key"
    slots: tuple[int, int, int, int] = RELEASED_SLOTS


class Dit:
    """The weights of a DiT on one device."""

    def __init__(
        self,
        device: _core.Device,
        config: _core.ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        precision: Precision = "fp32",
    ) -> None:
        self.device = device
        self.precision = precision
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
            name: (tensor.data_ptr(), _DTYPE_NAMES[tensor.dtype], list(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.model = _core.Model(device, config, described, core_precision(precision))

    @property
    def config(self) -> _core.ModelConfig:
        return self.model.config

    @classmethod
    def load(cls, directory: Path, device: _core.Device, precision: Precision = "fp32") -> Dit:
        """Opens `config.json` and the weight files of a checkpoint directory.

        Raises InputError naming the file and tensor before anything large is allocated.
        """
        config, tensors = open_weights(directory)
        check_precision(tensors, config, precision, directory)
        return cls(device, config, tensors, precision)

    def open_stream(
        self,
        latent_size: tuple[int, int],
        policy: MemoryPolicy = MemoryPolicy(),
        audio_guidance: float = 1.0,
        image_tokens: int = 257,
    ) -> DitStream:
        """A new session's state. `latent_size` is (h, w) = picture (height, width) / 8."""
        return DitStream(self, latent_size, policy, audio_guidance, image_tokens)


class DitStream:
    """One session on a Dit. One thread at a time, except `cancel`."""

    def __init__(
        self,
        dit: Dit,
        latent_size: tuple[int, int],
        policy: MemoryPolicy,
        audio_guidance: float,
        image_tokens: int,
    ) -> None:
        self._dit = dit
        self.latent_size = latent_size
        self._stream: Any = _core.Stream(
            dit.model,
            *latent_size,
            policy.slots,
            policy.memory,
            policy.compress_axis,
            policy.value_filter,
            audio_guidance,
            image_tokens,
        )

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
    def device_bytes(self) -> int:
        return int(self._stream.device_bytes)

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
        renoise: torch.Tensor,
        audio: torch.Tensor,
        *,
        velocities: np.ndarray[Any, np.dtype[np.float32]] | None = None,
    ) -> torch.Tensor:
        """The next block.

        noise [16, n, h, w]; renoise [2, 16, n, h, w]; audio [rows, layers, hidden] or
        [rows, audio_dim] with `audio_rows_of_next_block` rows. Returns the latent [16, n, h, w]
        fp32. Raises SessionError after `cancel` or when the result is not finite.
        """
        rows = _f32(audio.reshape(audio.shape[0], -1))
        return torch.from_numpy(self._call("denoise", _f32(noise), _f32(renoise), rows, velocities))

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


def audio_rows(features: torch.Tensor, block: int, frames: int) -> torch.Tensor:
    """The rows of whole-clip features [S, …] that `block` (of `frames` latent frames) needs.

    Block 0 starts at video frame 0, later ones of 4·frames video frames follow one another; every
    latent frame looks two features back and two ahead; indices clamp to the clip.
    """
    if block == 0:
        first, count = -2, 4 * frames + 1
    else:
        first, count = 4 * frames * (block - 1) + 19, 4 * frames + 4
    index = torch.arange(first, first + count).clamp(0, features.shape[0] - 1)
    return features[index]
