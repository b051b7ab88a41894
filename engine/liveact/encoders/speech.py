"""The speech encoder: wav2vec2 in a Hugging Face directory, all layers kept.

It differs from plain wav2vec2 in one place: the convolutional features (about 50 per second) are
interpolated to the rate of the video (25 per second) before the transformer sees them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize

from liveact.checkpoint.layout import (
    WAV2VEC_CONFIG_FILE,
    WAV2VEC_PREPROCESSOR_FILE,
    WAV2VEC_WEIGHTS_FILES,
)
from liveact.checkpoint.tensors import (
    FLOATS,
    TensorSource,
    assign_tensors,
    check_tensors,
    load_pth,
    open_tensor_file,
)
from liveact.errors import InputError
from liveact.files import read_json, read_size

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

SAMPLE_RATE_HZ = 16_000

# A checkpoint with a head on top keeps the encoder under this name.
_PREFIX = "wav2vec2."
# The factors of the weight-normalised convolution, as today's and as older torch names them.
_FACTOR_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


class AudioEncoder:
    """16 kHz speech → features per video frame. Stateless; may be shared between threads."""

    def __init__(self, model: Wav2Vec2Model, normalize: bool) -> None:
        self._model = model
        self._normalize = normalize
        self._receptive_field = _receptive_field(model.config)  # samples

    @classmethod
    def load(
        cls,
        wav2vec_dir: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> AudioEncoder:
        """Loads a wav2vec2 directory: configuration, preprocessor configuration, weights.

        Raises:
            InputError: a file is missing or not what was expected.
        """
        wav2vec_dir = Path(wav2vec_dir)
        normalize = _read_normalize(wav2vec_dir / WAV2VEC_PREPROCESSOR_FILE)
        model = _build_model(wav2vec_dir / WAV2VEC_CONFIG_FILE)
        tensors = _open_weights(wav2vec_dir)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: _found_name(name, tensors) for name in shapes}
        expected = {found[name]: shape for name, shape in shapes.items()}
        prefixes = ("encoder.layers.", f"{_PREFIX}encoder.layers.")
        check_tensors(tensors, expected, FLOATS, "audio encoder", prefixes)
        assign_tensors(model, {name: tensors[found[name]] for name in shapes}, device, dtype)
        # The product of the two factors, once and not at every call.
        parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
        model.requires_grad_(False)
        return cls(model, normalize)

    @property
    def num_layers(self) -> int:
        """Transformer layers, each of which gives a feature; 12 in the released model."""
        return int(self._model.config.num_hidden_layers)

    @property
    def hidden(self) -> int:
        """Width of a feature; 768 in the released model."""
        return int(self._model.config.hidden_size)

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
        if waveform.shape[0] < self._receptive_field:
            raise InputError(
                f"samples: expected at least {self._receptive_field} at {SAMPLE_RATE_HZ} Hz, "
                f"found {waveform.shape[0]}"
            )
        if num_features < 1:
            raise InputError(f"num_features: expected 1 or more, found {num_features}")
        if self._normalize:
            waveform = _zero_mean_unit_variance(waveform)
        model = self._model
        waveform = waveform.to(device=model.device, dtype=model.dtype)
        features = model.feature_extractor(waveform[None])  # [1, conv_dim, about n / 320]
        features = F.interpolate(features, size=num_features, mode="linear", align_corners=True)
        hidden, _ = model.feature_projection(features.transpose(1, 2))
        return torch.stack(self._layer_outputs(hidden), dim=2)[0]

    def _layer_outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [1, t, hidden] → the output of each layer, [1, t, hidden].

        Spelled out, because `transformers` records layer outputs with hooks on the shared model.
        """
        encoder = self._model.encoder
        x = encoder.layer_norm(x + encoder.pos_conv_embed(x))
        outputs = []
        for layer in encoder.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


def _zero_mean_unit_variance(waveform: torch.Tensor) -> torch.Tensor:
    """waveform [n] → [n] float32; the 1e-7 on the variance is part of the released model."""
    wide = waveform.double()
    variance, mean = torch.var_mean(wide, correction=0)
    return ((wide - mean) / torch.sqrt(variance + 1e-7)).float()


def _receptive_field(config: Wav2Vec2Config) -> int:
    """Samples that one convolutional feature is computed from."""
    samples, stride = 1, 1
    for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples += (kernel - 1) * stride
        stride *= step
    return samples


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


def _build_model(path: Path) -> Wav2Vec2Model:
    """The model that a configuration describes, on the meta device."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    values = read_json(path)
    read_size(values, "num_hidden_layers", path, at_most=256)
    read_size(values, "hidden_size", path, at_most=2**16)
    if values.get("do_stable_layer_norm", False) is not False:
        found = values["do_stable_layer_norm"]
        raise InputError(f"{path}: expected do_stable_layer_norm false, found {found!r}")
    # Masking is for training; without it there is no tensor for it either.
    values |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "attn_implementation": "sdpa"}
    try:
        config = Wav2Vec2Config(**values)
        with torch.device("meta"):
            return Wav2Vec2Model(config)
    # A configuration that contradicts itself fails anywhere in the constructors.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: expected a wav2vec2 configuration, found {text}") from error


def _open_weights(directory: Path) -> TensorSource:
    """The tensors of a directory, safetensors before a pickle if both are there."""
    present = [name for name in WAV2VEC_WEIGHTS_FILES if (directory / name).exists()]
    if not present:
        raise InputError(
            f"{directory}: expected {' or '.join(WAV2VEC_WEIGHTS_FILES)}, found neither"
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
