"""The VAE of a checkpoint file: its sizes and the names of its tensors."""

from __future__ import annotations

from torch import nn

from liveact import _core
from liveact.blocks import SPATIAL_STRIDE, TEMPORAL_STRIDE
from liveact.checkpoint.tensors import PthTensors
from liveact.errors import InputError
from liveact.vae.layers import Downsample, ResidualBlock, Upsample

_MAX_CHANNELS = 2**14  # no width beyond this is believed; the released model has 384

# Parts of our module names → the released ones, replaced in this order (`conv1` of a residual
# block has to go before `conv_in` takes that name).
_RELEASED_NAMES = {
    ".norm1.": ".residual.0.",
    ".conv1.": ".residual.2.",
    ".norm2.": ".residual.3.",
    ".conv2.": ".residual.6.",
    ".resize.": ".resample.1.",
    ".conv_in.": ".conv1.",
    ".norm_out.": ".head.0.",
    ".conv_out.": ".head.2.",
    "to_moments.": "conv1.",
    "from_latent.": "conv2.",
}


def released_name(name: str) -> str:
    """The released name of one of our parameters."""
    for ours, released in _RELEASED_NAMES.items():
        name = name.replace(ours, released)
    return name


def read_levels(tensors: PthTensors, conv_in: str, prefix: str) -> tuple[int, nn.ModuleList]:
    """Width of the first convolution and the blocks under `prefix`, read off names and shapes.

    The sizes of the blocks that the names and shapes do not agree on are caught afterwards, when
    every shape is compared with the module built here.
    """
    width = first_width = _channels_out(tensors, conv_in)
    names = [name.removeprefix(prefix + ".") for name in tensors if name.startswith(prefix + ".")]
    count = len({name.split(".")[0] for name in names})
    levels = nn.ModuleList()
    resizes = temporal_resizes = 0
    for i in range(count):
        if any(name.startswith(f"{i}.resample.") for name in names):
            temporal = any(name.startswith(f"{i}.time_conv.") for name in names)
            down = prefix.startswith("encoder")
            levels.append((Downsample if down else Upsample)(width, temporal))
            width = width if down else width // 2
            resizes, temporal_resizes = resizes + 1, temporal_resizes + temporal
        else:
            channels = _channels_out(tensors, f"{prefix}.{i}.residual.2.weight")
            levels.append(ResidualBlock(width, channels))
            width = channels
    if (2**resizes, 2**temporal_resizes) != (SPATIAL_STRIDE, TEMPORAL_STRIDE):
        raise InputError(
            f"{tensors.source}: VAE: expected under '{prefix}.' a stride of {SPATIAL_STRIDE} in "
            f"space and {TEMPORAL_STRIDE} in time, found {2**resizes} and {2**temporal_resizes}"
        )
    return first_width, levels


def _channels_out(tensors: PthTensors, name: str) -> int:
    """Output channels of the 3D convolution whose weight has this name."""
    shape = tensors.shape(name) if name in tensors else None
    if shape is None or len(shape) != 5 or not 2 <= shape[0] <= _MAX_CHANNELS:
        found = _core.other_names(set(tensors), name) if shape is None else f"shape {list(shape)}"
        raise InputError(
            f"{tensors.source}: VAE: expected tensor {name!r} of shape "
            f"[2..{_MAX_CHANNELS}, _, _, _, _], found {found}"
        )
    return shape[0]
