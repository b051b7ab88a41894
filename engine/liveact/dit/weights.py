"""The DiT of a checkpoint directory, which the runtime opens and checks, as Python uses it."""

from __future__ import annotations

from pathlib import Path

import torch

from liveact import _core
from liveact.checkpoint.tensors import Tensors
from liveact.dit.precision import PRODUCT_LINEARS, Precision, check_layers, format_of
from liveact.errors import InputError

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}


def product_weights(num_layers: int) -> dict[str, tuple[int, str]]:
    """Name of every weight that a precision is about → its layer and product."""
    return {
        f"blocks.{layer}.{linear}.weight": (layer, product)
        for layer in range(num_layers)
        for product, linears in PRODUCT_LINEARS.items()
        for linear in linears
    }


def open_weights(directory: Path) -> tuple[_core.ModelConfig, Tensors]:
    """The DiT of a checkpoint directory, as released or converted; touches no data.

    Weights in fp8 are believed only where config.json says that they were converted: scales of
    other makers mean other things. Raises InputError naming the file and tensor.
    """
    config, files = _core.open_dit(directory)
    return config, Tensors(files)


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
