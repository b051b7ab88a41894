"""The engine: one checkpoint loaded on its devices, and the sessions opened on it.

engine = Engine.load("ckpt/")
with engine.open_session(image="me.png", prompt="A person is speaking.") as session:
    session.push_audio(pcm, 48_000)
    session.end_of_audio()
    for chunk in session:
        ...
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from liveact.audio.front_end import AudioFrontEnd, exact_fps
from liveact.device.devices import Devices, open_devices
from liveact.dit.dit import MEMORIES, Dit, MemoryPolicy
from liveact.dit.precision import PRECISIONS, PrecisionPolicy
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
from liveact.errors import InputError
from liveact.media import check_size, fit_image, read_image
from liveact.session.session import Session
from liveact.session.timeline import Timeline
from liveact.vae.vae import SPATIAL_STRIDE, StreamingDecoder, WanVAE, WindowedDecoder

VAE_DECODES = ("streaming", "windowed")
VAE_FILE = "Wan2.1_VAE.pth"
WAV2VEC_DIRECTORY = "wav2vec"
CONDITION_FRAMES = 53  # video frames that y is encoded from: the image, then 52 frames of zeros
_CACHED_PROMPTS = 64
_CACHED_PICTURES = 16  # 6 MB each at 512×512

Portrait = str | Path | npt.NDArray[np.uint8]
# features [tokens, image_dim] of the image encoder, y [20, 14, h, w]
EncodedPicture = tuple[torch.Tensor, torch.Tensor]


K = TypeVar("K")
V = TypeVar("V")


class _Recent(Generic[K, V]):
    """What was made last, up to a number of entries. Any thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The entry of `key`, made now if it is not there."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        value = make()
        with self._lock:
            value = self._entries.setdefault(key, value)  # the first of two threads wins
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value


class Engine:
    """Weights and encoders; immutable but for caches of prompts and pictures. Any thread may open
    sessions."""

    def __init__(
        self,
        *,
        devices: Devices,
        dit: Dit,
        vae: WanVAE,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        audio_encoder: AudioEncoder,
    ) -> None:
        self.devices, self.dit, self.vae = devices, dit, vae
        self._text_encoder = text_encoder
        self._image_encoder = image_encoder
        self._audio_encoder = audio_encoder
        self._prompts: _Recent[str, torch.Tensor] = _Recent(_CACHED_PROMPTS)
        self._pictures: _Recent[bytes, tuple[torch.Tensor, torch.Tensor]] = _Recent(
            _CACHED_PICTURES
        )
        self._check_widths()

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        device: str | None = None,
        vae_device: str | None = None,
        precision: str | Path | PrecisionPolicy | None = None,
        wav2vec: str | Path | None = None,
    ) -> Engine:
        """Loads a checkpoint directory in the released layout.

        Args:
            directory: the checkpoint.
            device: `cpu` or `cuda:N` for the DiT and the encoders; None: CUDA where usable, else
                the CPU. `Engine.devices` says what was chosen and why.
            vae_device: the same for the VAE; None: where the DiT is.
            precision: `fp32`, `bf16`, `fp8`, a policy, or the file of one (`liveact calibrate`);
                None: what the checkpoint was converted to, else fp32 on the CPU, fp8 on CUDA.
            wav2vec: the audio encoder's directory; None: `wav2vec` in the checkpoint.

        Raises InputError for anything wrong with the files, DeviceError for the devices.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"{directory}: expected a checkpoint directory, found none")
        devices = open_devices(device, vae_device, precision, directory)
        encoder_device = devices.torch_device
        dit = Dit.load(directory, devices.core, devices.precision)
        return cls(
            devices=devices,
            dit=dit,
            vae=WanVAE.load(directory / VAE_FILE, devices.vae_torch_device, devices.vae_launch),
            text_encoder=TextEncoder.load(directory, encoder_device),
            image_encoder=ImageEncoder.load(directory, encoder_device),
            audio_encoder=AudioEncoder.load(
                wav2vec or directory / WAV2VEC_DIRECTORY, encoder_device
            ),
        )

    def _check_widths(self) -> None:
        """The networks of a checkpoint must fit together."""
        config = self.dit.config
        audio = self._audio_encoder
        for what, found, expected in (
            ("text encoder width", self._text_encoder.dim, config.text_dim),
            ("image encoder width", self._image_encoder.dim, config.image_dim),
            ("audio encoder layers × width", audio.num_layers * audio.hidden, config.audio_dim),
        ):
            if found != expected:
                raise InputError(f"{what}: expected {expected} as in the DiT, found {found}")

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """[tokens, text_dim]; the last prompts are kept."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # what a shell makes of bytes that are no UTF-8
            raise InputError(f"prompt: expected Unicode text, found {prompt!r:.80}") from error
        length = int(self.dit.config.text_len)
        return self._prompts.get(prompt, lambda: self._text_encoder.encode(prompt, length))

    def encode_picture(self, picture: torch.Tensor) -> EncodedPicture:
        """picture [3, H, W] in [−1, 1]; the results for the last pictures are kept."""
        digest = hashlib.sha256(picture.numpy().tobytes())
        digest.update(repr(tuple(picture.shape)).encode())

        def encode() -> EncodedPicture:
            return self._image_encoder.encode(picture[None])[0], condition_on(self.vae, picture)

        return self._pictures.get(digest.digest(), encode)

    def open_session(
        self,
        *,
        image: Portrait,
        prompt: str,
        size: tuple[int, int] = (512, 512),
        fps: float = 20,
        seed: int = 42,
        memory: str | MemoryPolicy = "sequential",
        audio_guidance: float = 1.0,
        vae_decode: str = "streaming",
        audio_mode: Literal["stream", "whole"] = "stream",
        trace: str | Path | None = None,
    ) -> Session:
        """A session: one portrait that speaks what is pushed.

        Args:
            image: file name, or uint8 [H, W, 3] RGB; scaled to cover `size` and centre-cropped.
            prompt: what the person does.
            size: width and height of the video, multiples of 16.
            fps: frames per second the video is played at, 1 to 100.
            seed: of the noise; equal seeds give equal videos.
            memory: `sequential`, `sharded` or `mean`, or a MemoryPolicy.
            audio_guidance: 1 for none; above, the strength of the speech (half as fast).
            vae_decode: `streaming`, or `windowed` as in the released code.
            audio_mode: `stream`, or `whole` (see liveact.audio.front_end; nothing comes out before
                `end_of_audio` then).
            trace: a file for a Chrome JSON trace of every stage.

        Raises InputError.
        """
        width, height = size
        check_size(width, height)
        rate = exact_fps(fps)
        policy = memory if isinstance(memory, MemoryPolicy) else MemoryPolicy(memory)
        _check_choice("memory", policy.memory, MEMORIES)
        _check_choice("vae_decode", vae_decode, VAE_DECODES)
        if not 1.0 <= audio_guidance <= 100.0:
            raise InputError(f"audio_guidance: expected 1 to 100, got {audio_guidance}")
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"seed: expected a 64-bit integer, got {seed}")
        picture = (
            fit_image(image, size) if isinstance(image, np.ndarray) else read_image(image, size)
        )
        text = self.encode_prompt(prompt)
        latent_size = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        stream = self.dit.open_stream(
            latent_size, policy, audio_guidance, self._image_encoder.tokens
        )
        stream.set_image(*self.encode_picture(picture))
        decoder = (StreamingDecoder if vae_decode == "streaming" else WindowedDecoder)(self.vae)
        return Session(
            stream=stream,
            decoder=decoder,
            text=text,
            encode_prompt=self.encode_prompt,
            open_audio=lambda: AudioFrontEnd(self._audio_encoder, rate, mode=audio_mode),
            fps=rate,
            seed=seed,
            timeline=Timeline(Path(trace) if trace is not None else None),
            latent_channels=int(self.dit.config.out_dim),
            audio_dim=int(self.dit.config.audio_dim),
        )


def condition_on(vae: WanVAE, picture: torch.Tensor) -> torch.Tensor:
    """picture [3, H, W] → y [20, 14, h, w]: the mask of the known frame, the encoded image."""
    video = torch.zeros(1, 3, CONDITION_FRAMES, *picture.shape[1:])
    video[0, :, 0] = picture
    encoded = vae.encode(video)[0].cpu()  # [16, 14, h, w]
    mask = torch.zeros(4, *encoded.shape[1:])
    mask[:, 0] = 1.0
    return torch.cat([mask, encoded])


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected {', '.join(choices)}, got {value!r}")


__all__ = ["PRECISIONS", "VAE_DECODES", "Engine"]
