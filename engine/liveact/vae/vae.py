"""The Wan 2.1 video autoencoder: 4×8×8 stride, 16 latent channels, causal in time.

Every convolution that reaches back in time keeps the last input frames it has seen in a
`CausalState`, so a video that arrives piece by piece gives the same result as the whole video at
once, in memory that does not depend on its length. A state belongs to one stream; one `WanVAE`
serves any number of them.

- `WanVAE.encode` encodes a video: its first frame, then four frames at a time.
- `StreamingDecoder` decodes block after block with the state kept (the default of the engine).
- `WindowedDecoder` is the released way: each block starts afresh and re-decodes the 3 latent
  frames before it.

On a CPU everything is fp32. On a GPU the encoder is fp32 and the decoder bf16, with our kernels
between the convolutions and each call of the decoder as one CUDA graph.

Widths and the number of levels and blocks come from the tensors of the checkpoint, so the
released model (base width 96) and a small one load alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from liveact.checkpoint.tensors import FLOATS, PthTensors, assign_tensors, check_tensors, load_pth
from liveact.errors import InputError
from liveact.vae.layers import Decoder, Downsample, Encoder, ResidualBlock, Upsample
from liveact.vae.ops import KernelOps, Launch, Pending, TorchOps, without_tf32
from liveact.vae.state import EncoderState
from liveact.vae.stream import DecodeQueue, DecoderState

LATENT_CHANNELS = 16
TEMPORAL_STRIDE = 4  # video frames per latent frame; the first latent frame is 1 video frame
SPATIAL_STRIDE = 8
MAX_FRAMES_PER_CALL = 8
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


class WanVAE(nn.Module):
    """The autoencoder of one checkpoint: immutable, shared by all streams."""

    _mean: torch.Tensor  # [1, 16, 1, 1, 1]
    _std: torch.Tensor  # [1, 16, 1, 1, 1]

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.to_moments = nn.Conv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.from_latent = nn.Conv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self._ops = TorchOps(torch.float32)
        self._decoder_ops = self._ops
        self._queue: DecodeQueue | None = None
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
    ) -> WanVAE:
        """Loads `Wan2.1_VAE.pth`; `InputError` if it is not a complete VAE of this family.

        launch: how the decoder's kernels are launched (`liveact.device.kernels.launcher`); None:
        decode in fp32 with the ops of torch.
        """
        return cls.from_tensors(load_pth(Path(path)), device, launch)

    @classmethod
    def from_tensors(
        cls, tensors: PthTensors, device: torch.device | str, launch: Launch | None = None
    ) -> WanVAE:
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
            vae._decoder_ops = KernelOps(launch)
        if vae.device.type == "cuda":
            vae._queue = DecodeQueue(vae.device)
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

    def open_decoder(self, frames_per_call: int = 1) -> DecoderState:
        """The state of a new stream, for `decode`.

        frames_per_call: latent frames that go through the decoder at a time. More make larger
        convolutions, and the first frames of a block later.
        """
        if not 1 <= frames_per_call <= MAX_FRAMES_PER_CALL:
            raise InputError(
                f"frames_per_call: expected 1 to {MAX_FRAMES_PER_CALL}, got {frames_per_call}"
            )
        turn = nullcontext if self._queue is None else self._queue.turn
        return DecoderState(self._decoder_ops, self.decoder, frames_per_call, self.device, turn)

    def decoder_bytes(
        self,
        latent_size: tuple[int, int],
        frames_per_call: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Memory of a stream's state in bytes: what stays between calls, but for what the CUDA
        graphs of a GPU work in."""
        plan = self.decoder.plan(frames_per_call, *latent_size)
        return dtype.itemsize * sum(math.prod(use.shape) for use in plan)

    def decode(self, latents: torch.Tensor, state: DecoderState) -> Iterator[torch.Tensor]:
        """Decodes the next latent frames of a stream, call after call, as they are asked for.

        Splitting a sequence over several calls changes nothing. Abandoning the iterator leaves
        the stream after the last piece taken.

        Args:
            latents: [16, n, h, w], normalised; any format, layout and device.
            state: of `open_decoder`, moved on by each piece; used by one stream only.

        Returns:
            An iterator over pieces of video, [3, 4·t, 8·h, 8·w] float32 for t latent frames, not
            clamped to [−1, 1]; the first piece of a fresh state is [3, 1, 8·h, 8·w].

        Raises InputError for latents of another form or size than before, LiveActError after a call
        that failed.
        """
        self._enter(latents, state)
        return self._videos(latents, state)

    def _videos(self, latents: torch.Tensor, state: DecoderState) -> Iterator[torch.Tensor]:
        queue = self._queue
        for part in state.calls(latents):
            with nullcontext() if queue is None else queue.turn(part):
                video = self._decoder_ops.video(self._decode(part, state))
            yield video if queue is None else queue.hand_over(video)

    def decode_pictures(
        self, latents: torch.Tensor, state: DecoderState
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """As `decode`, in pictures ready to show; see `to_uint8`.

        On a GPU all calls are enqueued, each with its copy to the host behind it, before the first
        piece is waited for; an iterator abandoned then leaves the stream after all of them.

        Returns:
            An iterator over pieces, each [4·t, 8·h, 8·w, 3] uint8 RGB, the caller's to keep.
        """
        self._enter(latents, state)

        def call(part: torch.Tensor) -> torch.Tensor:
            return self._decoder_ops.pictures(self._decode(part, state))

        if self._queue is not None:
            return self._queue.decode(latents, state, call)
        return (call(part).numpy() for part in state.calls(latents))

    def _enter(self, latents: torch.Tensor, state: DecoderState) -> None:
        size = _latent_size(latents)
        if state.latent_size not in (None, size):
            raise InputError(
                f"latents: expected height and width {state.latent_size} as before, found {size}"
            )
        state.check_whole()
        if state.latent_size is None:
            state.open(size)

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, state: DecoderState) -> Pending:
        """latents [16, t, h, w] → what the last convolution leaves."""
        frames = latents.to(self._mean) * self._std[0] + self._mean[0]
        frames = frames.permute(1, 2, 3, 0).contiguous()  # [t, h, w, 16]
        return state.run(self._ops.linear(self.from_latent, frames))


def _latent_size(latents: torch.Tensor) -> tuple[int, int]:
    """(h, w) of latents [16, n, h, w]; `InputError` if they are not of this form."""
    if latents.dim() != 4 or latents.shape[0] != LATENT_CHANNELS or 0 in latents.shape:
        raise InputError(
            f"latents: expected [{LATENT_CHANNELS}, n, h, w], found {list(latents.shape)}"
        )
    return latents.shape[2], latents.shape[3]


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


# ----------------------------------------------------------------------------------- decoders


class StreamingDecoder:
    """Decodes block after block with all caches kept: exact, no seams, nothing twice."""

    def __init__(self, vae: WanVAE, frames_per_call: int = 1) -> None:
        self._vae = vae
        self.state = vae.open_decoder(frames_per_call)

    def decode_block(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """latents [16, n, h, w] → pieces [3, 4·t, H, W] (the very first: 1 frame), as decoded."""
        return self._vae.decode(latents, self.state)

    def decode_pictures(self, latents: torch.Tensor) -> Iterator[npt.NDArray[np.uint8]]:
        """latents [16, n, h, w] → pieces [4·t, H, W, 3] uint8 (the very first: 1 frame)."""
        return self._vae.decode_pictures(latents, self.state)

    def reset(self) -> None:
        """The next block is the first of a new video."""
        self.state.reset()

    def close(self) -> None:
        """As `reset`, and frees the memory."""
        self.state.close()


class WindowedDecoder:
    """Decodes as the released pipeline does: caches start afresh for every block, the 3 latent
    frames before it are decoded again and their 9 video frames dropped. 27 % more work for
    blocks of 8, and a seam; there for comparison."""

    CONTEXT = 3  # latent frames

    def __init__(self, vae: WanVAE) -> None:
        self._vae = vae
        self._state = vae.open_decoder()
        self._context: torch.Tensor | None = None  # [16, ≤ CONTEXT, h, w]

    def decode_block(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """latents [16, n, h, w] → n pieces [3, 4, H, W] (the very first: 1 frame), as decoded."""
        window, known = self._window(latents)
        return islice(self._vae.decode(window, self._state), known, None)

    def decode_pictures(self, latents: torch.Tensor) -> Iterator[npt.NDArray[np.uint8]]:
        """latents [16, n, h, w] → n pieces [4, H, W, 3] uint8 (the very first: 1 frame)."""
        window, known = self._window(latents)
        return islice(self._vae.decode_pictures(window, self._state), known, None)

    def _window(self, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The latents with those before them, and how many those are."""
        size = _latent_size(latents)
        context = latents[:, :0] if self._context is None else self._context
        if context.shape[2:] != size:
            raise InputError(
                f"latents: expected height and width {tuple(context.shape[2:])} as before, "
                f"found {size}"
            )
        self._state.reset()
        window = torch.cat([context, latents], dim=1)
        # Cloned: a view would keep the whole window alive.
        self._context = window[:, -self.CONTEXT :].clone()
        return window, context.shape[1]

    def reset(self) -> None:
        """The next block is the first of a new video."""
        self._context = None

    def close(self) -> None:
        """As `reset`, and frees the memory."""
        self.reset()
        self._state.close()


def to_uint8(frames: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Video frames as pictures: clamped to [−1, 1], mapped to 0..255, rounded half to even.

    Args:
        frames: [3, t, H, W], float, on any device; no NaN.

    Returns:
        [t, H, W, 3] uint8, contiguous, on the CPU.
    """
    if frames.dim() != 4 or frames.shape[0] != 3:
        raise InputError(f"frames: expected [3, t, H, W], found {list(frames.shape)}")
    scaled = (frames.float().clamp(-1.0, 1.0) + 1.0) * 127.5
    pictures = scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    return pictures.cpu().numpy()
