"""The engine: one checkpoint loaded on its devices, and the sessions opened on it.

with Engine.load("ckpt/") as engine:
    with engine.open_session(image="me.png", prompt="A person is speaking.") as session:
        session.push_audio(pcm, 48_000)
        session.end_of_audio()
        for chunk in session:
            ...
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from cachetools import LRUCache, cachedmethod

from liveact import arguments
from liveact.audio.chain import SAMPLES_PER_FEATURE
from liveact.audio.front_end import AudioFrontEnd
from liveact.blocks import RELEASED_CLOCK, BlockClock, check_size, latent_size
from liveact.checkpoint.opened import OpenedCheckpoint, open_checkpoint
from liveact.device.devices import Devices, open_devices
from liveact.dit.dit import ROOM_FOR, Dit, MemoryPolicy
from liveact.dit.precision import PrecisionPolicy
from liveact.dit.weights import check_precision
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
from liveact.errors import InputError, LiveActError
from liveact.finite import NOT_FINITE, all_finite
from liveact.lifetime import Lifetime
from liveact.session import aio
from liveact.session.options import AudioMode, Portrait, SessionOptions
from liveact.session.session import Session
from liveact.session.stats import EngineStats
from liveact.session.timeline import Timeline
from liveact.session.workers import Pipeline, Workers
from liveact.vae.condition import condition_on
from liveact.vae.vae import Vae, VaeStream
from liveact.vae.windowed import WindowedVaeStream

IDLE_RATE_HZ = 48_000  # of the silence that comes before any sound
CACHED_PROMPTS = 64
CACHED_PICTURES = 16  # 6 MB each at 512×512
CACHED_SILENCES = 8  # one for each length of a block
SILENCE_FEATURES = 100  # heard before a silent block: 4 s, as of speech

# features [tokens, image_dim] of the image encoder, y [20, slots, h, w]
EncodedPicture = tuple[torch.Tensor, torch.Tensor]
# (component that is loaded next, bytes of the files loaded so far, bytes in all)
Progress = Callable[[str, int, int], None]

_log = logging.getLogger("liveact")


def _picture_key(
    _: Engine, picture: torch.Tensor, clock: BlockClock = RELEASED_CLOCK
) -> tuple[bytes, tuple[int, ...], BlockClock]:
    """What a picture is remembered by: pixels, shape, and the number of frames of its y."""
    return hashlib.sha256(picture.numpy().tobytes()).digest(), tuple(picture.shape), clock


@dataclass(frozen=True)
class _Networks:
    """What an engine lets go of when it is closed."""

    dit: Dit
    vae: Vae
    text_encoder: TextEncoder
    image_encoder: ImageEncoder
    audio_encoder: AudioEncoder


class SessionBytes(NamedTuple):
    """Memory that a session takes when it is opened, or at its first picture.

    Attributes:
        dit: on each device of the DiT.
        vae: on that of the VAE, but for what the CUDA graphs of a GPU work in.
    """

    dit: int
    vae: int


class Engine:
    """Weights and encoders; immutable but for caches of prompts and pictures. Any thread may open
    sessions.

    Use it as a context manager, or call `close`: that gives the memory of the weights back at once.

    Attributes:
        devices: what it runs on, and why.
    """

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
        self.devices = devices
        self._networks: _Networks | None = _Networks(
            dit, vae, text_encoder, image_encoder, audio_encoder
        )
        self._lifetime = Lifetime("engine")
        # Not the sessions: of one that was dropped the workers may still be at work.
        self._workers: weakref.WeakSet[Workers] = weakref.WeakSet()
        # Two threads may make the same entry at once; the first one is kept.
        self._lock = threading.Lock()
        self._loaded_s = time.monotonic()
        self._num_opened = 0
        self._prompts: LRUCache[object, torch.Tensor] = LRUCache(CACHED_PROMPTS)
        self._pictures: LRUCache[object, EncodedPicture] = LRUCache(CACHED_PICTURES)
        self._silences: LRUCache[object, torch.Tensor] = LRUCache(CACHED_SILENCES)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        device: str | Devices | None = None,
        vae_device: str | None = None,
        precision: str | Path | PrecisionPolicy | None = None,
        wav2vec: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        """Loads a checkpoint directory in the released layout. Every file is checked, by its names,
        shapes and dtypes, before any of them is loaded.

        An engine belongs to the process that loaded it. In a fork of it, which is what
        `multiprocessing` makes on Linux unless told otherwise, neither its threads nor its GPU
        exist, so everything raises LiveActError there: start processes with
        `multiprocessing.get_context("spawn")` and load in each.

        Args:
            directory: the checkpoint.
            device: `cpu` or `cuda:N` for the DiT and the encoders; `cuda:N,cuda:M` for two GPUs
                that denoise every block together (docs/parallel.md), with the encoders on the first
                one. None: CUDA where usable, else the CPU; of two GPUs what is expected to be
                fastest. `Engine.devices` says what was chosen and why. Or devices that are open
                already (`liveact.device.devices.open_devices`), which say the next two as well.
            vae_device: `cpu` or `cuda:N` for the VAE; None: where the DiT is, on the last one.
            precision: `fp32`, `bf16`, `fp8`, `auto`, a policy, or the file of one (`liveact
                calibrate`); None: what the checkpoint was converted to, else fp32 on the CPU, auto
                on CUDA. `Engine.dit.precision` says what `auto` became.
            wav2vec: the audio encoder's directory; None: `wav2vec` in the checkpoint.
            progress: told the component that comes next, the bytes of the files that are loaded and
                the bytes in all; at the end `ready` and all bytes. In the thread that called.

        Raises InputError for anything wrong with the files or arguments, DeviceError for the
        devices.
        """
        started_s = time.perf_counter()
        if progress is not None and not callable(progress):
            raise InputError(f"progress: expected a callable, found {progress!r:.80}")
        folder = arguments.path("directory", directory)
        audio_folder = None if wav2vec is None else arguments.path("wav2vec", wav2vec)
        wanted = _wanted_devices(device, vae_device, precision)
        opened = open_checkpoint(folder, audio_folder)
        devices = wanted if isinstance(wanted, Devices) else open_devices(*wanted, folder)
        check_precision(opened.dit, opened.dit_config, devices.precision, folder)
        engine = cls._load(opened, devices, progress or (lambda *_: None))
        _log.info("%s: %s; %.1f s", folder, devices.reason, time.perf_counter() - started_s)
        return engine

    @classmethod
    def _load(cls, opened: OpenedCheckpoint, devices: Devices, progress: Progress) -> Engine:
        sizes = {
            what: sum(file.stat().st_size for file in files)
            for what, files in opened.files().items()
        }
        total, encoder_device = sum(sizes.values()), devices.torch_device
        done = 0

        def begin(what: str) -> None:
            nonlocal done
            progress(what, done, total)
            done += sizes[what]

        # First what takes long to check: the tokenizer is read here.
        begin("text encoder")
        text_encoder = TextEncoder(opened.text, encoder_device)
        begin("image encoder")
        image_encoder = ImageEncoder(opened.image, encoder_device)
        begin("audio encoder")
        audio_encoder = AudioEncoder(opened.audio, encoder_device)
        begin("VAE")
        vae = opened.vae.fill(opened.vae_tensors, devices.vae_torch_device, devices.vae_launch)
        begin("DiT")
        shared = devices.vae_core in devices.cores
        decode_bytes = vae.stream_bytes(ROOM_FOR, dtype=torch.bfloat16) if shared else 0
        dit = Dit(
            devices.cores,
            opened.dit_config,
            opened.dit,
            devices.precision,
            beside_bytes=decode_bytes,
        )
        progress("ready", total, total)
        return cls(
            devices=devices,
            dit=dit,
            vae=vae,
            text_encoder=text_encoder,
            image_encoder=image_encoder,
            audio_encoder=audio_encoder,
        )

    def close(self) -> None:
        """Closes the sessions that are open on it, then frees the weights, on every device.

        Any thread, any number of times; returns when all that is done. Any use afterwards raises
        LiveActError. In a fork of the process it does nothing.
        """
        if not self._lifetime.process.is_here():
            return
        self._lifetime.end()
        with self._lock:
            workers = list(self._workers)
        for one in workers:
            one.close()
        with self._lock:
            networks, self._networks = self._networks, None
            self._prompts.clear()
            self._pictures.clear()
            self._silences.clear()
        if networks is None:
            return
        # A closed session that somebody holds still refers to them, so they are emptied.
        networks.dit.close()
        networks.vae.close()
        for encoder in (networks.text_encoder, networks.image_encoder, networks.audio_encoder):
            encoder.close()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        _log.info("engine closed")

    def stats(self) -> EngineStats:
        """Sessions, memory and caches at this moment. Raises LiveActError once it is closed."""
        dit = self._open().dit
        with self._lock:
            prompts, pictures, opened = len(self._prompts), len(self._pictures), self._num_opened
            workers = list(self._workers)
        open_ones = [one for one in workers if not one.is_closed]
        sessions = sorted((w.stats for w in open_ones), key=lambda found: -found.age_s)
        return EngineStats(
            sessions=tuple(sessions),
            sessions_opened=opened,
            device_bytes=sum(device.allocated_bytes for device in dit.devices),
            cached_prompts=prompts,
            cached_pictures=pictures,
            age_s=time.monotonic() - self._loaded_s,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def dit(self) -> Dit:
        """The DiT. Raises LiveActError once the engine is closed."""
        return self._open().dit

    @property
    def vae(self) -> Vae:
        """The VAE. Raises LiveActError once the engine is closed."""
        return self._open().vae

    def _open(self) -> _Networks:
        self._lifetime.process.check()
        if (networks := self._networks) is None:
            raise LiveActError("engine: expected an open one, found a closed one")
        return networks

    def session_bytes(self, size: tuple[int, int]) -> SessionBytes:
        """What a session of pictures (width, height) would take, with the options of `open_session`
        as they are without being given. Raises InputError."""
        networks, (width, height) = self._open(), arguments.size("size", size)
        check_size(width, height)
        latent = latent_size((width, height))
        on_gpu = self.devices.vae_core is not None
        return SessionBytes(
            networks.dit.stream_bytes(latent, networks.image_encoder.tokens),
            networks.vae.stream_bytes(latent, dtype=torch.bfloat16 if on_gpu else torch.float32),
        )

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """[tokens, text_dim]; the last prompts are kept. Raises InputError."""
        with self._lifetime.use():
            return self._encode_prompt(arguments.text("prompt", prompt))

    @cachedmethod(attrgetter("_prompts"), lock=attrgetter("_lock"))
    def _encode_prompt(self, prompt: str) -> torch.Tensor:
        networks = self._open()
        text = networks.text_encoder.encode(prompt, int(networks.dit.config.text_len))
        return _finite("text encoder", text)

    def encode_picture(
        self, picture: torch.Tensor, clock: BlockClock = RELEASED_CLOCK
    ) -> EncodedPicture:
        """picture [3, H, W] in [−1, 1]; the results for the last pictures are kept. Raises
        InputError."""
        if not isinstance(picture, torch.Tensor) or not isinstance(clock, BlockClock):
            raise InputError(
                "picture, clock: expected a tensor and a BlockClock, "
                f"found {type(picture).__name__} and {type(clock).__name__}"
            )
        with self._lifetime.use():
            return self._encode_picture(picture, clock)

    @cachedmethod(attrgetter("_pictures"), key=_picture_key, lock=attrgetter("_lock"))
    def _encode_picture(self, picture: torch.Tensor, clock: BlockClock) -> EncodedPicture:
        networks = self._open()
        features = networks.image_encoder.encode(picture[None])[0]
        y = condition_on(networks.vae, picture, clock)
        return _finite("image encoder", features), _finite("VAE encoder", y)

    @cachedmethod(attrgetter("_silences"), lock=attrgetter("_lock"))
    def silence_features(self, rows: int) -> torch.Tensor:
        """What the audio encoder makes of silence: the last `rows` features of a long one, [rows,
        layers, hidden]."""
        features = rows + SILENCE_FEATURES
        samples = torch.zeros(features * SAMPLES_PER_FEATURE)
        found = self._open().audio_encoder.encode(samples, features)[-rows:]
        return _finite("audio encoder", found)

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
        sampler: Literal["renoise", "euler"] = "renoise",
        vae_decode: Literal["streaming", "windowed"] = "streaming",
        audio_mode: AudioMode = "stream",
        idle: Literal["wait", "silence"] = "wait",
        max_backlog_s: float | None = None,
        sample_rate: int | None = None,
        channels: int | None = None,
        trace: str | Path | None = None,
    ) -> Session:
        """A session: one portrait that speaks what is pushed.

        Args:
            image: file name, Pillow image, or uint8 [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA
                (transparent parts show white); scaled to cover `size` and centre-cropped.
            prompt: what the person does.
            size: width and height of the video, multiples of 16.
            fps: frames per second the video is played at, 1 to 100.
            seed: of the noise, 64 bits; equal seeds give equal videos where everything else is
                equal too, the number of threads included (docs/benchmarks.md).
            memory: `sequential`, `sharded` or `mean`, or a MemoryPolicy.
            audio_guidance: 1 for none; above, the strength of the speech (half as fast).
            sampler: from step to step; `renoise` of the released generator, or `euler` of the
                released demo (docs/model.md).
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

        Raises InputError before anything is allocated, DeviceError where the memory does not
        suffice, LiveActError once the engine is closed.
        """
        with self._lifetime.use():
            options = SessionOptions.check(
                image=image,
                prompt=prompt,
                size=size,
                fps=fps,
                seed=seed,
                memory=memory,
                audio_guidance=audio_guidance,
                sampler=sampler,
                vae_decode=vae_decode,
                audio_mode=audio_mode,
                idle=idle,
                max_backlog_s=max_backlog_s,
                sample_rate=sample_rate,
                channels=channels,
                trace=trace,
            )
            return self._open_session(options)

    async def aopen_session(self, **options: Any) -> Session:
        """`open_session`, with the same arguments, for an event loop, which it never holds up. A
        session is closed again where the caller is cancelled meanwhile."""
        return await aio.opened(functools.partial(self.open_session, **options))

    def _open_session(self, options: SessionOptions) -> Session:
        text = self.encode_prompt(options.prompt)
        networks = self._open()
        audio_encoder, output = networks.audio_encoder, options.output
        if options.idles:
            output.settle(IDLE_RATE_HZ, 1)
        with ExitStack() as undo:  # an exception would keep the frame, and so the memory, alive
            timeline = Timeline(options.trace)
            undo.callback(timeline.close)
            stream = networks.dit.open_stream(
                options.latent_size,
                options.policy,
                options.audio_guidance,
                networks.image_encoder.tokens,
                options.sampler,
            )
            undo.callback(stream.close)
            stream.set_image(*self.encode_picture(options.picture, stream.clock))
            undo.pop_all()
        pipeline = Pipeline(
            stream=stream,
            decoder=(WindowedVaeStream if options.windowed else VaeStream)(networks.vae),
            open_audio=lambda: AudioFrontEnd(
                audio_encoder, options.fps, stream.clock, mode=options.mode, output=output
            ),
            output=output,
            silence=self.silence_features,
            encode_prompt=self.encode_prompt,
            fps=options.fps,
            noise=torch.Generator().manual_seed(options.seed),
            timeline=timeline,
        )
        session = Session(pipeline, text, max_backlog_s=options.max_backlog_s, idles=options.idles)
        with self._lock:
            self._workers.add(session.workers)
            self._num_opened += 1
        height, width = options.picture.shape[1:]
        _log.info("%s opened: %d×%d at %g fps", session, width, height, float(options.fps))
        return session


def _wanted_devices(
    device: object, vae_device: object, precision: object
) -> Devices | tuple[str | None, str | None, str | Path | PrecisionPolicy | None]:
    """The arguments of `Engine.load`, each of its type. Raises InputError."""
    if isinstance(device, Devices):
        if (vae_device, precision) != (None, None):
            raise InputError(
                "vae_device, precision: expected None beside opened devices, found "
                f"{vae_device!r:.80}, {precision!r:.80}"
            )
        return device
    if precision is not None and not isinstance(precision, PrecisionPolicy | Path):
        precision = arguments.text("precision", precision)
    return (
        None if device is None else arguments.text("device", device),
        None if vae_device is None else arguments.text("vae_device", vae_device),
        precision,
    )


def _finite(what: str, result: torch.Tensor) -> torch.Tensor:
    if not all_finite(result):
        raise InputError(
            f"{what}: expected finite numbers, found {NOT_FINITE} (are its weights damaged?)"
        )
    return result
