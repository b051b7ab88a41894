"""The speech encoder: wav2vec2 in a Hugging Face directory, all layers kept.

It differs from plain wav2vec2 in one place: the convolutional features (about 50 per second) are
interpolated to the rate of the video (25 per second) before the transformer sees them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from liveact import _core
from liveact.checkpoint.layout import (
    WAV2VEC_CONFIG_FILE,
    WAV2VEC_PREPROCESSOR_FILE,
    WAV2VEC_WEIGHTS_FILES,
)
from liveact.checkpoint.tensors import (
    FLOATS,
    TensorSource,
    check_tensors,
    load_pth,
    open_tensor_file,
)
from liveact.encoders.weights import Weights, attention
from liveact.errors import InputError
from liveact.files import read_json, read_size

SAMPLE_RATE_HZ = 16_000

# What chinese-wav2vec2-base has where its configuration says nothing.
_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "layer_norm_eps": 1e-5,
}
# What it is and any other one therefore has to be.
_FIXED = {
    "conv_bias": False,
    "do_stable_layer_norm": False,
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "hidden_act": "gelu",
}
_GROUP_NORM_EPS = 1e-5

# A checkpoint with a head on top keeps the encoder under this name.
_PREFIX = "wav2vec2."
_POSITIONS = "encoder.pos_conv_embed.conv"
# The factors of the weight-normalised convolution, as today's and as older torch names them.
_FACTOR_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


class AudioSizes(NamedTuple):
    """Sizes of the encoder."""

    hidden: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    position_taps: int
    position_groups: int
    conv_dim: tuple[int, ...]
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    eps: float

    @property
    def receptive_field(self) -> int:
        """Samples that one convolutional feature is computed from."""
        samples, stride = 1, 1
        for kernel, step in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples += (kernel - 1) * stride
            stride *= step
        return samples


class AudioWeights(NamedTuple):
    """What `open_audio_encoder` found.

    Attributes:
        names: what each tensor of `shapes` is called in the file.
        normalize: whether speech is brought to zero mean and unit variance.
    """

    sizes: AudioSizes
    tensors: TensorSource
    names: dict[str, str]
    normalize: bool


def open_audio_encoder(wav2vec_dir: Path | str) -> AudioWeights:
    """Configurations and mapped weights of a wav2vec2 directory, checked; reads no weights.

    Raises:
        InputError: a file is missing or not what was expected.
    """
    wav2vec_dir = Path(wav2vec_dir)
    normalize = _read_normalize(wav2vec_dir / WAV2VEC_PREPROCESSOR_FILE)
    sizes = _read_sizes(wav2vec_dir / WAV2VEC_CONFIG_FILE)
    tensors = _open_weights(wav2vec_dir)
    expected = shapes(sizes)
    names = {name: _found_name(name, tensors) for name in expected}
    prefixes = ("encoder.layers.", f"{_PREFIX}encoder.layers.")
    found = {names[name]: shape for name, shape in expected.items()}
    check_tensors(tensors, found, FLOATS, "audio encoder", prefixes)
    return AudioWeights(sizes, tensors, names, normalize)


class AudioEncoder:
    """16 kHz speech → features per video frame. Stateless; may be shared between threads."""

    def __init__(
        self,
        opened: AudioWeights,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reads the weights that `open_audio_encoder` found."""
        self.sizes, self._normalize = opened.sizes, opened.normalize
        wanted = {name: opened.tensors[found] for name, found in opened.names.items()}
        self.weights = Weights(wanted, device, dtype)
        # The product of the two factors, once and not at every call.
        gain, direction = (self.weights.pop(f"{_POSITIONS}.{name}") for name in _FACTOR_NAMES)
        length = direction.norm(dim=(0, 1), keepdim=True)
        self.weights[f"{_POSITIONS}.weight"] = direction * (gain / length)

    @classmethod
    def load(
        cls,
        wav2vec_dir: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> AudioEncoder:
        """`open_audio_encoder`, then the weights."""
        return cls(open_audio_encoder(wav2vec_dir), device, dtype)

    def close(self) -> None:
        """Frees the weights; nothing may be called afterwards."""
        self.weights.clear()

    @property
    def num_layers(self) -> int:
        """Transformer layers, each of which gives a feature; 12 in the released model."""
        return self.sizes.num_layers

    @property
    def hidden(self) -> int:
        """Width of a feature; 768 in the released model."""
        return self.sizes.hidden

    @torch.no_grad()
    def encode(
        self, samples: npt.NDArray[np.float32] | torch.Tensor, num_features: int
    ) -> torch.Tensor:
        """The features of a stretch of speech.

        Args:
            samples: [n] float at 16 kHz, n ≥ 400 in the released model. Brought to zero mean and
                unit variance here if the checkpoint asks for it, so gain does not matter then.
            num_features: how many features to spread over the stretch, first and last at its
                ends; ⌊seconds · 25⌋ in the released pipeline.

        Returns:
            [num_features, num_layers, hidden] on the device and in the dtype of the encoder: the
            output of every transformer layer.
        """
        waveform = torch.as_tensor(samples)
        if waveform.dim() != 1 or not waveform.is_floating_point():
            raise InputError(
                f"samples: expected [n] float, found {list(waveform.shape)} {waveform.dtype}"
            )
        if waveform.shape[0] < self.sizes.receptive_field:
            raise InputError(
                f"samples: expected at least {self.sizes.receptive_field} at {SAMPLE_RATE_HZ} Hz, "
                f"found {waveform.shape[0]}"
            )
        if num_features < 1:
            raise InputError(f"num_features: expected 1 or more, found {num_features}")
        if self._normalize:
            waveform = _zero_mean_unit_variance(waveform)
        x = self._convolve(waveform.to(self.weights.device, self.weights.dtype))
        x = F.interpolate(x, size=num_features, mode="linear", align_corners=True)
        return torch.stack(self._layer_outputs(x.transpose(1, 2)), dim=2)[0]

    def _convolve(self, waveform: torch.Tensor) -> torch.Tensor:
        """waveform [n] → [1, conv_dim, about n / 320]."""
        weights, x = self.weights, waveform[None, None]
        for index, stride in enumerate(self.sizes.conv_stride):
            name = f"feature_extractor.conv_layers.{index}"
            x = F.conv1d(x, weights[f"{name}.conv.weight"], stride=stride)
            if index == 0:
                norm = f"{name}.layer_norm"
                gain, bias = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
                x = F.group_norm(x, x.shape[1], gain, bias, _GROUP_NORM_EPS)
            x = F.gelu(x)
        return x

    def _layer_outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [1, t, conv_dim] → the output of each layer, [1, t, hidden]."""
        weights, sizes = self.weights, self.sizes
        x = weights.layer_norm("feature_projection.layer_norm", x, sizes.eps)
        x = weights.linear("feature_projection.projection", x)
        positions = F.conv1d(
            x.transpose(1, 2),
            weights[f"{_POSITIONS}.weight"],
            weights[f"{_POSITIONS}.bias"],
            padding=sizes.position_taps // 2,
            groups=sizes.position_groups,
        )[..., : x.shape[1]]  # one more than there are features for an even number of taps
        x = x + F.gelu(positions).transpose(1, 2)
        x = weights.layer_norm("encoder.layer_norm", x, sizes.eps)
        outputs = []
        for layer in range(sizes.num_layers):
            x = self._layer(f"encoder.layers.{layer}", x)
            outputs.append(x)
        return outputs

    def _layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [1, t, hidden] → same shape."""
        weights, sizes = self.weights, self.sizes
        q, k, v = (weights.linear(f"{name}.attention.{part}_proj", x) for part in "qkv")
        heard = attention(q, k, v, sizes.num_heads)
        x = x + weights.linear(f"{name}.attention.out_proj", heard)
        x = weights.layer_norm(f"{name}.layer_norm", x, sizes.eps)
        h = F.gelu(weights.linear(f"{name}.feed_forward.intermediate_dense", x))
        x = x + weights.linear(f"{name}.feed_forward.output_dense", h)
        return weights.layer_norm(f"{name}.final_layer_norm", x, sizes.eps)


def _zero_mean_unit_variance(waveform: torch.Tensor) -> torch.Tensor:
    """waveform [n] → [n] float32; the 1e-7 on the variance is part of the released model."""
    wide = waveform.double()
    variance, mean = torch.var_mean(wide, correction=0)
    return ((wide - mean) / torch.sqrt(variance + 1e-7)).float()


def shapes(sizes: AudioSizes) -> dict[str, tuple[int, ...]]:
    """Name, as today's `transformers` writes it → shape of every tensor of the encoder."""
    hidden, ffn, last = sizes.hidden, sizes.dim_ffn, sizes.conv_dim[-1]
    found: dict[str, tuple[int, ...]] = {}
    norms = {"feature_extractor.conv_layers.0.layer_norm": sizes.conv_dim[0]}
    norms |= {"feature_projection.layer_norm": last, "encoder.layer_norm": hidden}
    linears = {"feature_projection.projection": (hidden, last)}
    fan_in = 1
    for index, (out, kernel) in enumerate(zip(sizes.conv_dim, sizes.conv_kernel, strict=True)):
        found[f"feature_extractor.conv_layers.{index}.conv.weight"] = (out, fan_in, kernel)
        fan_in = out
    gain, direction = (f"{_POSITIONS}.{name}" for name in _FACTOR_NAMES)
    found[gain] = (1, 1, sizes.position_taps)
    found[direction] = (hidden, hidden // sizes.position_groups, sizes.position_taps)
    found[f"{_POSITIONS}.bias"] = (hidden,)
    for layer in range(sizes.num_layers):
        name = f"encoder.layers.{layer}"
        norms |= {f"{name}.layer_norm": hidden, f"{name}.final_layer_norm": hidden}
        for part in ("q", "k", "v", "out"):
            linears[f"{name}.attention.{part}_proj"] = (hidden, hidden)
        linears[f"{name}.feed_forward.intermediate_dense"] = (ffn, hidden)
        linears[f"{name}.feed_forward.output_dense"] = (hidden, ffn)
    for name, width in norms.items():
        found |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def _read_sizes(path: Path) -> AudioSizes:
    """The sizes in a wav2vec2 configuration."""
    config = _BASE | read_json(path)
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise InputError(f"{path}: expected {key} {value!r}, found {config[key]!r:.80}")
    eps = config["layer_norm_eps"]
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise InputError(f"{path}: expected layer_norm_eps to be from 0 to 1, found {eps!r:.80}")
    sizes = AudioSizes(
        hidden=read_size(config, "hidden_size", path, at_most=2**16),
        dim_ffn=read_size(config, "intermediate_size", path, at_most=2**20),
        num_heads=read_size(config, "num_attention_heads", path, at_most=1024),
        num_layers=read_size(config, "num_hidden_layers", path, at_most=256),
        position_taps=read_size(config, "num_conv_pos_embeddings", path, at_most=2**12),
        position_groups=read_size(config, "num_conv_pos_embedding_groups", path, at_most=2**12),
        conv_dim=_read_list(config, "conv_dim", path, at_most=2**14),
        conv_kernel=_read_list(config, "conv_kernel", path, at_most=2**10),
        conv_stride=_read_list(config, "conv_stride", path, at_most=2**10),
        eps=float(eps),
    )
    if sizes.hidden % sizes.num_heads or sizes.hidden % sizes.position_groups:
        raise InputError(
            f"{path}: expected hidden_size divisible by num_attention_heads and "
            f"num_conv_pos_embedding_groups, found {sizes.hidden}, {sizes.num_heads} and "
            f"{sizes.position_groups}"
        )
    if not len(sizes.conv_dim) == len(sizes.conv_kernel) == len(sizes.conv_stride):
        raise InputError(
            f"{path}: expected conv_dim, conv_kernel and conv_stride of one length, found "
            f"{len(sizes.conv_dim)}, {len(sizes.conv_kernel)} and {len(sizes.conv_stride)}"
        )
    return sizes


def _read_list(config: dict[str, Any], key: str, path: Path, *, at_most: int) -> tuple[int, ...]:
    values = config[key]
    if not isinstance(values, list) or not 1 <= len(values) <= 64:
        raise InputError(f"{path}: expected {key} to be a list of 1 to 64, found {values!r:.80}")
    return tuple(read_size({key: value}, key, path, at_most=at_most) for value in values)


def _read_normalize(path: Path) -> bool:
    """`do_normalize` of a preprocessor configuration, which must be one for 16 kHz."""
    config = read_json(path)
    rate = config.get("sampling_rate", SAMPLE_RATE_HZ)
    if rate != SAMPLE_RATE_HZ:
        raise InputError(f"{path}: expected sampling_rate {SAMPLE_RATE_HZ}, found {rate!r}")
    normalize = config.get("do_normalize", True)
    if not isinstance(normalize, bool):
        raise InputError(f"{path}: expected do_normalize true or false, found {normalize!r}")
    return normalize


def _open_weights(directory: Path) -> TensorSource:
    """The tensors of a directory, safetensors before a pickle if both are there."""
    present = [name for name in WAV2VEC_WEIGHTS_FILES if (directory / name).exists()]
    if not present:
        instead = _core.other_files(directory, "", "torch")
        raise InputError(
            f"{directory}: expected {' or '.join(WAV2VEC_WEIGHTS_FILES)}, found neither{instead}"
        )
    path = directory / present[0]
    return open_tensor_file(path) if path.suffix == ".safetensors" else load_pth(path)


def _found_name(name: str, tensors: TensorSource) -> str:
    """What a parameter is called in the file: with or without prefix, factors old or new."""
    older = name
    for new, old in _FACTOR_NAMES.items():
        older = older.replace(new, old)
    for candidate in (name, older, _PREFIX + name, _PREFIX + older):
        if candidate in tensors:
            return candidate
    return name
