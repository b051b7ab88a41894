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
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from liveact.blocks import SPATIAL_STRIDE, TEMPORAL_STRIDE
from liveact.checkpoint.tensors import FLOATS, PthTensors, assign_tensors, check_tensors, load_pth
from liveact.errors import InputError, LiveActError
from liveact.vae.layers import Decoder, Encoder
from liveact.vae.ops import KernelOps, Launch, Pending, TorchOps, without_tf32
from liveact.vae.queue import DecodeQueue, RecordedCall, check_finite
from liveact.vae.state import CausalState, EncoderState
from liveact.vae.weights import read_levels, released_name

LATENT_CHANNELS = 16
MAX_FRAMES_PER_CALL = 8

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
        return cls.outline(tensors).fill(tensors, device, launch)

    @classmethod
    def outline(cls, tensors: PthTensors) -> Vae:
        """The VAE that tensors describe, checked and without weights: on the meta device."""
        with torch.device("meta"):
            levels = read_levels(tensors, "encoder.conv1.weight", "encoder.downsamples")
            encoder = Encoder(3, 2 * LATENT_CHANNELS, *levels)
            levels = read_levels(tensors, "decoder.conv1.weight", "decoder.upsamples")
            decoder = Decoder(LATENT_CHANNELS, 3, *levels)
            vae = cls(encoder, decoder)
        shapes = {released_name(name): tuple(t.shape) for name, t in vae.state_dict().items()}
        check_tensors(tensors, shapes, FLOATS, "VAE", ("encoder.", "decoder."))
        return vae

    def fill(
        self, tensors: PthTensors, device: torch.device | str, launch: Launch | None = None
    ) -> Vae:
        """Gives an `outline` of the same tensors its weights; returns it."""
        found = {name: tensors[released_name(name)] for name in self.state_dict()}
        assign_tensors(self, found, device, torch.float32)
        vae = self.to(device)
        if launch is not None:
            vae.decoder_ops = KernelOps(launch)
        if vae.device.type == "cuda":
            vae.queue = DecodeQueue(vae.device)
        return vae

    def close(self) -> None:
        """Frees the weights once the streams are closed; nothing may be called afterwards."""
        self._ops.release()
        self.decoder_ops.release()
        self.to("meta")

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

    def open_stream(self, frames_per_call: int = 1) -> VaeStream:
        """The decoder of a new session.

        frames_per_call: latent frames that go through the decoder at a time. More make larger
        convolutions, and the first frames of a block later. Raises InputError.
        """
        return VaeStream(self, frames_per_call)

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


class VaeStream:
    """Decodes block after block of one session with all caches kept: exact, no seams, nothing
    twice. Made by `Vae.open_stream`, used by one thread at a time.

    Splitting the latents over several calls changes nothing.

    Attributes:
        frames_per_call: latent frames that go through the decoder at a time, after the first.
        latent_size: (h, w) of the stream; None before the first latents.
    """

    def __init__(self, vae: Vae, frames_per_call: int = 1) -> None:
        if not 1 <= frames_per_call <= MAX_FRAMES_PER_CALL:
            raise InputError(
                f"frames_per_call: expected 1 to {MAX_FRAMES_PER_CALL}, found {frames_per_call}"
            )
        self._vae = vae
        self.frames_per_call = frames_per_call
        self.latent_size: tuple[int, int] | None = None
        self._state = CausalState(vae.decoder_ops)
        self._recorded: dict[int, RecordedCall] = {}  # latent frames of a call → its CUDA graph
        self._in_call = False
        # [] fp32 on the device, at one address for the graphs: the sum of all numbers of all
        # pictures, finite as long as they are; and what it is made with. Fresh results would keep
        # an allocator from giving larger ones back (up to 1.9 MB in 40 blocks, now 1.2).
        self._total, self._scratch = torch.zeros(()), torch.zeros(())

    def decode(self, latents: torch.Tensor) -> Iterator[npt.NDArray[np.uint8]]:
        """The pictures of the next latent frames, call after call.

        On a CPU each call is made when its piece is asked for; abandoning the iterator leaves the
        stream after the last piece taken. On a GPU all calls are enqueued, each with its copy to
        the host behind it, before the first piece is waited for; an iterator abandoned then leaves
        the stream after all of them.

        Args:
            latents: [16, n, h, w], normalised; any format, layout and device.

        Returns:
            An iterator over pieces, each [4·t, 8·h, 8·w, 3] uint8 RGB for t latent frames, the
            caller's to keep; the very first piece of a video is one picture.

        Raises InputError for latents of another form or size than before, LiveActError after a call
        that failed; the iterator SessionError instead of a piece with a NaN or an infinity.
        """
        self._enter(latents)
        queue = self._vae.queue
        if queue is not None:
            return queue.decode(latents, self._calls, self._enqueue, self._total)
        return (self._checked_pictures(part) for part in self._calls(latents))

    def decode_video(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """The next latent frames as video before it is made of pictures.

        Returns:
            An iterator over pieces [3, 4·t, 8·h, 8·w] float32, not clamped to [−1, 1]; each call is
            made when its piece is asked for.

        Arguments and errors are those of `decode`.
        """
        self._enter(latents)
        return self._videos(latents)

    def reset(self) -> None:
        """The next latent frame is the first of a new video, which may be of another size."""
        self._state.started = self._in_call = False
        self.latent_size = None
        with self._turn():
            self._state.clear()
            self._total.zero_()

    def close(self) -> None:
        """Frees the memory. Latents may follow, of a new video."""
        self._free()
        self.reset()

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers, in bytes; the same from the first frame of a video on."""
        return self._state.size_bytes

    # ------------------------------------------------------------------------------ inside

    def _enter(self, latents: torch.Tensor) -> None:
        size = size_of(latents)
        if self.latent_size not in (None, size):
            raise InputError(
                f"latents: expected height and width {self.latent_size} as before, found {size}"
            )
        self._check_whole()
        if self.latent_size is None:
            self._open(size)

    def _open(self, latent_size: tuple[int, int]) -> None:
        """Allocates everything for latents of this size, unless it is there already."""
        plan = self._vae.decoder.plan(self.frames_per_call, *latent_size)
        if not self._state.fits(plan):
            self._free()  # first, so that the old buffers are not held beside the new ones
            with self._turn():
                self._state.allocate(plan, self._vae.device)
                device = self._vae.device
                self._total, self._scratch = (torch.zeros((), device=device) for _ in range(2))
        self.latent_size = latent_size

    def _free(self) -> None:
        with self._turn():
            self._recorded.clear()
            self._state.release()

    def _turn(self) -> AbstractContextManager[None]:
        """Where memory is made and changed: torch reuses it in the order of a CUDA stream."""
        return nullcontext() if self._vae.queue is None else self._vae.queue.turn()

    def _calls(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """latents [16, n, h, w] → the parts [16, t, h, w] of the decoder's calls; to be taken one
        by one, as each call has to know whether there was one before."""
        start = 0
        while start < latents.shape[1]:
            stop = start + (self.frames_per_call if self._state.started else 1)
            yield latents[:, start:stop]
            start = stop

    def _videos(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        queue, ops = self._vae.queue, self._vae.decoder_ops
        for part in self._calls(latents):
            with nullcontext() if queue is None else queue.turn(part):
                video = ops.video(self._run(part))
            yield video if queue is None else queue.hand_over(video)

    def _pictures(self, part: torch.Tensor) -> torch.Tensor:
        """part [16, t, h, w] → uint8 [4·t, 8·h, 8·w, 3]."""
        ops, result = self._vae.decoder_ops, self._run(part)
        ops.add_up(result, self._total, self._scratch)
        return ops.pictures(result)

    def _checked_pictures(self, part: torch.Tensor) -> npt.NDArray[np.uint8]:
        pictures = self._pictures(part).numpy()
        check_finite(self._total)
        return pictures

    def _enqueue(self, part: torch.Tensor) -> torch.Tensor:
        """`_pictures` on the current CUDA stream, as a graph where it repeats."""
        if not self._state.started:  # once per video, and not like the others
            return self._pictures(part)
        frames = part.shape[1]
        if frames not in self._recorded:
            buffer = torch.empty(part.shape, device=self._vae.device)
            self._recorded[frames] = RecordedCall(buffer)
        return self._recorded[frames](part, self._pictures)

    @torch.no_grad()
    def _run(self, part: torch.Tensor) -> Pending:
        """One call of the decoder: part [16, t, h, w] → what its last convolution leaves."""
        self._check_whole()
        self._in_call = True
        result: Pending = self._vae.decoder(self._vae.decoder_input(part), self._state)
        self._in_call = False
        return result

    def _check_whole(self) -> None:
        """Raises LiveActError after a call that failed half way: some convolutions remember its
        frames, the others those before."""
        if self._in_call:
            raise LiveActError("decoder: expected a reset after a failed call, found none")


def size_of(latents: torch.Tensor) -> tuple[int, int]:
    """(h, w) of latents [16, n, h, w]; InputError if they are not of this form."""
    if latents.dim() != 4 or latents.shape[0] != LATENT_CHANNELS or 0 in latents.shape:
        raise InputError(
            f"latents: expected [{LATENT_CHANNELS}, n, h, w], found {list(latents.shape)}"
        )
    return latents.shape[2], latents.shape[3]
