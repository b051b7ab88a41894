"""The DiT of a checkpoint directory: its configuration and its tensors, checked, not read."""

from __future__ import annotations

from pathlib import Path

import torch

from liveact import _core
from liveact.checkpoint.identify import other_names
from liveact.checkpoint.layout import DIT_CONFIG_FILE, DIT_STEM
from liveact.checkpoint.tensors import Tensors, check_tensors, open_tensors
from liveact.dit.precision import (
    PRODUCT_LINEARS,
    Precision,
    check_layers,
    converted_precision,
    format_of,
)
from liveact.errors import InputError
from liveact.files import read_json, read_size

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
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}


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
        found = other_names(tensors, name)
        raise InputError(f"{tensors.source}: DiT: expected tensor {name!r}, found {found}")
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
    tensors = open_tensors(directory, DIT_STEM)
    config = read_config(directory / DIT_CONFIG_FILE, tensors)
    expected = {name: tuple(shape) for name, shape in _core.expected_tensors(config).items()}
    narrow: set[str] = set()
    if converted_precision(directory) is not None:
        weights = product_weights(config.num_layers)
        narrow = {n for n in weights if n in tensors and tensors.dtype(n) == torch.float8_e4m3fn}
    wide = {name: shape for name, shape in expected.items() if name not in narrow}
    check_tensors(tensors, wide, {torch.bfloat16, torch.float32}, "DiT")
    scales = {f"{name}_scale": expected[name][:1] for name in narrow}
    check_tensors(tensors, scales, {torch.float32}, "DiT")
    check_tensors(tensors, expected | scales, set(DTYPE_NAMES), "DiT", ("blocks.",))
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
