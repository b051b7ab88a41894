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
import math
import threading
from operator import attrgetter
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from cachetools import LRUCache, cachedmethod

from liveact.audio.chain import SAMPLES_PER_FEATURE, SoundFormat
from liveact.audio.front_end import AudioFrontEnd
from liveact.blocks import RELEASED_CLOCK, BlockClock, check_size, exact_fps, latent_size
from liveact.checkpoint.layout import VAE_FILE, WAV2VEC_DIRECTORY
from liveact.device.devices import Devices, open_devices
from liveact.dit.dit import MEMORIES, Dit, MemoryPolicy
from liveact.dit.precision import PrecisionPolicy
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
from liveact.errors import InputError
from liveact.media.image import fit_image, read_image
from liveact.session.session import Session
from liveact.session.state import least_backlog_s
from liveact.session.timeline import Timeline
from liveact.session.workers import Pipeline
from liveact.vae.condition import condition_on
from liveact.vae.vae import Vae, VaeStream
from liveact.vae.windowed import WindowedVaeStream

VAE_DECODES = ("streaming", "windowed")
IDLES = ("wait", "silence")
BACKLOG_S = 3.0  # of audio that wait to be used, unless a session is opened with another limit
IDLE_RATE_HZ = 48_000  # of the silence that comes before any sound
CACHED_PROMPTS = 64
CACHED_PICTURES = 16  # 6 MB each at 512×512
CACHED_SILENCES = 8  # one for each length of a block
SILENCE_FEATURES = 100  # heard before a silent block: 4 s, as of speech

Portrait = str | Path | npt.NDArray[np.uint8]
# features [tokens, image_dim] of the image encoder, y [20, slots, h, w]
EncodedPicture = tuple[torch.Tensor, torch.Tensor]


def _picture_key(
    _: Engine, picture: torch.Tensor, clock: BlockClock = RELEASED_CLOCK
) -> tuple[bytes, tuple[int, ...], BlockClock]:
    """What a picture is remembered by: pixels, shape, and the number of frames of its y."""
    return hashlib.sha256(picture.numpy().tobytes()).digest(), tuple(picture.shape), clock


class Engine:
    """Weights and encoders; immutable but for caches of prompts and pictures. Any thread may open
    sessions."""

    def __init__(
        self,
        *,
        devices: Devices,
        dit: Dit,
        vae: Vae,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        audio_encoder: AudioEncoder,
    ) -> None:
        self.devices, self.dit, self.vae = devices, dit, vae
        self._text_encoder = text_encoder
        self._image_encoder = image_encoder
        self._audio_encoder = audio_encoder
        # Two threads may make the same entry at once; the first one is kept.
        self._lock = threading.Lock()
        self._prompts: LRUCache[object, torch.Tensor] = LRUCache(CACHED_PROMPTS)
        self._pictures: LRUCache[object, EncodedPicture] = LRUCache(CACHED_PICTURES)
        self._silences: LRUCache[object, torch.Tensor] = LRUCache(CACHED_SILENCES)
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
            vae=Vae.load(directory / VAE_FILE, devices.vae_torch_device, devices.vae_launch),
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

    @cachedmethod(attrgetter("_prompts"), lock=attrgetter("_lock"))
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """[tokens, text_dim]; the last prompts are kept."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # what a shell makes of bytes that are no UTF-8
            raise InputError(f"prompt: expected Unicode text, found {prompt!r:.80}") from error
        return self._text_encoder.encode(prompt, int(self.dit.config.text_len))

    @cachedmethod(attrgetter("_pictures"), key=_picture_key, lock=attrgetter("_lock"))
    def encode_picture(
        self, picture: torch.Tensor, clock: BlockClock = RELEASED_CLOCK
    ) -> EncodedPicture:
        """picture [3, H, W] in [−1, 1]; the results for the last pictures are kept."""
        features = self._image_encoder.encode(picture[None])[0]
        return features, condition_on(self.vae, picture, clock)

    @cachedmethod(attrgetter("_silences"), lock=attrgetter("_lock"))
    def silence_features(self, rows: int) -> torch.Tensor:
        """What the audio encoder makes of silence: the last `rows` features of a long one, [rows,
        layers, hidden]."""
        features = rows + SILENCE_FEATURES
        samples = torch.zeros(features * SAMPLES_PER_FEATURE)
        return self._audio_encoder.encode(samples, features)[-rows:]

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
        idle: Literal["wait", "silence"] = "wait",
        max_backlog_s: float | None = None,
        sample_rate: int | None = None,
        channels: int | None = None,
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
                the end of an utterance then).
            idle: what happens while nobody speaks. `wait`: nothing. `silence`: the person goes on
                living, in blocks that are made just in time for a player that plays without a
                pause; what of them was not taken when speech arrives is dropped.
            max_backlog_s: how much audio may wait to be used; None: 3 s, more where blocks are
                longer; no limit in mode `whole`.
            sample_rate, channels: of the sound of the chunks; None: of the first audio (48 kHz,
                mono, where idling comes before it).
            trace: a file for a Chrome JSON trace of every stage.

        Raises InputError.
        """
        check_size(*size)
        rate = exact_fps(fps)
        output = SoundFormat(sample_rate or 0, channels or 0)
        policy = memory if isinstance(memory, MemoryPolicy) else MemoryPolicy(memory)
        for name, value, choices in (
            ("memory", policy.memory, MEMORIES),
            ("vae_decode", vae_decode, VAE_DECODES),
            ("idle", idle, IDLES),
        ):
            if value not in choices:
                raise InputError(f"{name}: expected {', '.join(choices)}, found {value!r}")
        if not 1.0 <= audio_guidance <= 100.0:
            raise InputError(f"audio_guidance: expected 1 to 100, found {audio_guidance}")
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"seed: expected a 64-bit integer, found {seed}")
        picture = (
            fit_image(image, size) if isinstance(image, np.ndarray) else read_image(image, size)
        )
        text = self.encode_prompt(prompt)
        stream = self.dit.open_stream(
            latent_size(size), policy, audio_guidance, self._image_encoder.tokens
        )
        stream.set_image(*self.encode_picture(picture, stream.clock))
        pipeline = Pipeline(
            stream=stream,
            decoder=(VaeStream if vae_decode == "streaming" else WindowedVaeStream)(self.vae),
            open_audio=lambda: AudioFrontEnd(
                self._audio_encoder, rate, stream.clock, mode=audio_mode, output=output
            ),
            output=output,
            silence=self.silence_features,
            encode_prompt=self.encode_prompt,
            fps=rate,
            noise=torch.Generator().manual_seed(seed),
            timeline=Timeline(Path(trace) if trace is not None else None),
        )
        least_s = least_backlog_s(stream.clock, rate)
        if max_backlog_s is None:
            max_backlog_s = math.inf if audio_mode == "whole" else max(BACKLOG_S, 1.5 * least_s)
        if not max_backlog_s >= least_s:
            raise InputError(
                f"max_backlog_s: expected {least_s:g} or more, found {max_backlog_s:g}"
            )
        if idle == "silence":
            output.settle(IDLE_RATE_HZ, 1)
        return Session(pipeline, text, max_backlog_s=max_backlog_s, idles=idle == "silence")
