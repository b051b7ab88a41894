"""The Wan 2.1 video autoencoder: 4×8×8 stride, 16 latent channels, causal in time.

`Vae` holds the weights (shared, immutable), `VaeStream` one session's decoder. Every convolution
that reaches back in time keeps the last input frames it has seen in a `CausalState`, so a video
that arrives piece by piece gives the same result as the whole video at once, in memory that does
not depend on its length.

On a CPU everything is fp32. On a GPU the encoder is fp32 and the decoder bf16, with our kernels
between the convolutions and each call of the decoder as one CUDA graph.

Widths and the number of levels and blocks come from the tensors of the checkpoint, so the
released model (base width 96) and a small one load alike.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from liveact.blocks import SPATIAL_STRIDE, TEMPORAL_STRIDE
from liveact.checkpoint.tensors import FLOATS, PthTensors, assign_tensors, check_tensors, load_pth
from liveact.errors import InputError
from liveact.vae.layers import Decoder, Downsample, Encoder, ResidualBlock, Upsample
from liveact.vae.ops import KernelOps, Launch, TorchOps, without_tf32
from liveact.vae.queue import DecodeQueue
from liveact.vae.state import EncoderState
from liveact.vae.stream import LATENT_CHANNELS, VaeStream
from liveact.vae.windowed import WindowedVaeStream

_MAX_CHANNELS = 2**14  # no width beyond this is believed; the released model has 384

# Normalised latent = (latent − mean) / std, per channel.
# fmt: off
_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on

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


class Vae(nn.Module):
    """The autoencoder of one checkpoint on one device: immutable, shared by all streams.

    Attributes:
        encoder, decoder: the networks.
        decoder_ops: what the decoder runs on.
        queue: the CUDA stream that decoders take turns on; None on a CPU.
    """

    _mean: torch.Tensor  # [1, 16, 1, 1, 1]
    _std: torch.Tensor  # [1, 16, 1, 1, 1]

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.to_moments = nn.Conv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.from_latent = nn.Conv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self._ops = TorchOps(torch.float32)
        self.decoder_ops = self._ops
        self.queue: DecodeQueue | None = None
        # On the CPU even while the modules are built on the meta device: no checkpoint has these.
        for name, values in (("_mean", _LATENT_MEAN), ("_std", _LATENT_STD)):
            constant = torch.tensor(values, device="cpu").view(1, -1, 1, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        launch: Launch | None = None,
    ) -> Vae:
        """Loads `Wan2.1_VAE.pth`; `InputError` if it is not a complete VAE of this family.

        launch: how the decoder's kernels are launched (`liveact.device.kernels.launcher`); None:
        decode in fp32 with the ops of torch.
        """
        return cls.from_tensors(load_pth(Path(path)), device, launch)

    @classmethod
    def from_tensors(
        cls, tensors: PthTensors, device: torch.device | str, launch: Launch | None = None
    ) -> Vae:
        """The VAE of tensors with the released names, its sizes read off their shapes."""
        with torch.device("meta"):
            levels = _read_levels(tensors, "encoder.conv1.weight", "encoder.downsamples")
            encoder = Encoder(3, 2 * LATENT_CHANNELS, *levels)
            levels = _read_levels(tensors, "decoder.conv1.weight", "decoder.upsamples")
            decoder = Decoder(LATENT_CHANNELS, 3, *levels)
            vae = cls(encoder, decoder)
        shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
        released = {name: _released_name(name) for name in shapes}
        expected = {released[name]: shape for name, shape in shapes.items()}
        check_tensors(tensors, expected, FLOATS, "VAE", ("encoder.", "decoder."))
        found = {name: tensors[released[name]] for name in shapes}
        assign_tensors(vae, found, device, torch.float32)
        vae = vae.to(device)
        if launch is not None:
            vae.decoder_ops = KernelOps(launch)
        if vae.device.type == "cuda":
            vae.queue = DecodeQueue(vae.device)
        return vae

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._mean.device

    @property
    def base_width(self) -> int:
        """Channels of the decoder at full resolution; 96 in the released model."""
        return int(self.decoder.conv_out.weight.shape[1])

    @property
    def parameter_count(self) -> int:
        """Number of parameters of encoder and decoder; 126.9 million in the released model."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Encodes a video into normalised latents (the mean of the posterior).

        Args:
            video: [1, 3, T, H, W] in [−1, 1]; T = 1 + 4·k, H and W multiples of 8.

        Returns:
            [1, 16, 1 + k, H/8, W/8], float32.
        """
        shape = tuple(video.shape)
        if (
            len(shape) != 5
            or shape[:2] != (1, 3)
            or shape[2] % TEMPORAL_STRIDE != 1
            or any(size < 1 or size % SPATIAL_STRIDE for size in shape[3:])
        ):
            raise InputError(
                "video: expected [1, 3, 1 + 4·k, H, W] with H and W multiples of "
                f"{SPATIAL_STRIDE}, found {list(shape)}"
            )
        frames = video[0].permute(1, 2, 3, 0).to(self._mean)  # [T, H, W, 3]
        state = EncoderState(self._ops)
        state.allocate(self.encoder.plan(TEMPORAL_STRIDE, *shape[3:]), frames.device)
        with without_tf32():  # what a session starts from stays with it
            moments = [
                self.encoder(part.contiguous(), state)
                for part in (frames[:1], *frames[1:].split(TEMPORAL_STRIDE))
                if len(part)
            ]
        mean = self._ops.linear(self.to_moments, torch.cat(moments))[..., :LATENT_CHANNELS]
        latents = mean.permute(3, 0, 1, 2).unsqueeze(0)  # [1, 16, 1 + k, H/8, W/8]
        return ((latents - self._mean) / self._std).contiguous()

    def open_stream(self, frames_per_call: int = 1, *, windowed: bool = False) -> VaeStream:
        """The decoder of a new session.

        Args:
            frames_per_call: latent frames that go through the decoder at a time. More make larger
                convolutions, and the first frames of a block later.
            windowed: decode as the released pipeline does (`WindowedVaeStream`), one latent frame
                at a time.

        Raises InputError.
        """
        return WindowedVaeStream(self) if windowed else VaeStream(self, frames_per_call)

    def stream_bytes(
        self,
        latent_size: tuple[int, int],
        frames_per_call: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Memory of a stream in bytes: what stays between calls, but for what the CUDA graphs of a
        GPU work in."""
        plan = self.decoder.plan(frames_per_call, *latent_size)
        return dtype.itemsize * sum(math.prod(use.shape) for use in plan)

    def decoder_input(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [16, t, h, w], normalised → frames [t, h, w, 16] that the decoder takes."""
        frames = latents.to(self._mean) * self._std[0] + self._mean[0]
        frames = frames.permute(1, 2, 3, 0).contiguous()
        return self._ops.linear(self.from_latent, frames)


def _released_name(name: str) -> str:
    """The released name of one of our parameters."""
    for ours, released in _RELEASED_NAMES.items():
        name = name.replace(ours, released)
    return name


def _read_levels(tensors: PthTensors, conv_in: str, prefix: str) -> tuple[int, nn.ModuleList]:
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
        found = "none of this name" if shape is None else f"shape {list(shape)}"
        raise InputError(
            f"{tensors.source}: VAE: expected tensor {name!r} of shape "
            f"[2..{_MAX_CHANNELS}, _, _, _, _], found {found}"
        )
    return shape[0]
