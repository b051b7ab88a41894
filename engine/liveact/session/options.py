"""What a session is opened with, checked before anything is loaded or allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from liveact import _core, arguments
from liveact.audio.chain import SoundFormat
from liveact.audio.front_end import MAX_RATE_HZ, MIN_RATE_HZ
from liveact.audio.samples import MAX_CHANNELS
from liveact.blocks import MAX_FPS, MIN_FPS, BlockClock, Slots, check_size, exact_fps, latent_size
from liveact.dit.dit import COMPRESS_AXES, MEMORIES, SAMPLERS, VALUE_FILTERS, MemoryPolicy
from liveact.errors import InputError
from liveact.media.image import fit_image, read_image
from liveact.session.state import least_backlog_s

VAE_DECODES = ("streaming", "windowed")
IDLES = ("wait", "silence")
AUDIO_MODES = ("stream", "whole")
BACKLOG_S = 3.0  # of audio that wait to be used, unless a session is opened with another limit
MAX_SLOTS = 1024  # no layout is believed to have more

AudioMode = Literal["stream", "whole"]
Portrait = str | Path | Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """The arguments of `Engine.open_session`, of the right types and within their bounds.

    Attributes:
        picture: [3, H, W] in [−1, 1].
        output: of the sound; 0 for what is taken over from the first audio.
        max_backlog_s: inf for no limit.
    """

    picture: torch.Tensor
    prompt: str
    fps: Fraction
    seed: int
    policy: MemoryPolicy
    audio_guidance: float
    sampler: str
    windowed: bool
    mode: AudioMode
    idles: bool
    max_backlog_s: float
    output: SoundFormat
    trace: Path | None

    @classmethod
    def check(
        cls,
        *,
        image: object,
        prompt: object,
        size: object,
        fps: object,
        seed: object,
        memory: object,
        audio_guidance: object,
        sampler: object,
        vae_decode: object,
        audio_mode: object,
        idle: object,
        max_backlog_s: object,
        sample_rate: object,
        channels: object,
        trace: object,
    ) -> SessionOptions:
        """Raises InputError; the portrait, which takes longest, is read last."""
        width, height = arguments.size("size", size)
        check_size(width, height)
        rate = exact_fps(arguments.number("fps", fps, MIN_FPS, MAX_FPS))
        policy = _memory_policy(memory)
        mode = cast(AudioMode, arguments.choice("audio_mode", audio_mode, AUDIO_MODES))
        return cls(
            fps=rate,
            policy=policy,
            mode=mode,
            prompt=arguments.text("prompt", prompt),
            seed=arguments.whole_number("seed", seed),
            audio_guidance=float(arguments.number("audio_guidance", audio_guidance, 1, 100)),
            sampler=arguments.choice("sampler", sampler, SAMPLERS),
            windowed=arguments.choice("vae_decode", vae_decode, VAE_DECODES) == "windowed",
            idles=arguments.choice("idle", idle, IDLES) == "silence",
            max_backlog_s=_backlog_s(max_backlog_s, BlockClock(Slots(*policy.slots)), rate, mode),
            output=_sound_format(sample_rate, channels),
            trace=None if trace is None else arguments.path("trace", trace),
            picture=_picture(image, (width, height)),
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        height, width = self.picture.shape[1:]
        return latent_size((width, height))


def _picture(image: object, size: tuple[int, int]) -> torch.Tensor:
    if isinstance(image, str | Path):
        return read_image(arguments.path("image", image), size)
    return fit_image(image, size)


def _memory_policy(memory: object) -> MemoryPolicy:
    """A policy of the right types and names, with slots that go together. Raises InputError."""
    if not isinstance(memory, MemoryPolicy):
        return MemoryPolicy(arguments.choice("memory", memory, MEMORIES))
    arguments.choice("memory", memory.memory, MEMORIES)
    arguments.choice("compress_axis", memory.compress_axis, COMPRESS_AXES)
    arguments.choice("value_filter", memory.value_filter, VALUE_FILTERS)
    if not isinstance(memory.slots, tuple) or len(memory.slots) != 4:
        raise InputError(f"slots: expected a tuple of four, found {memory.slots!r:.80}")
    for count in memory.slots:
        arguments.whole_number("slots", count, 0, MAX_SLOTS)
    _core.check_slots(memory.slots, memory.memory)
    return memory


def _sound_format(sample_rate: object, channels: object) -> SoundFormat:
    rate_hz = count = 0
    if sample_rate is not None:
        rate_hz = arguments.whole_number("sample_rate", sample_rate, MIN_RATE_HZ, MAX_RATE_HZ)
    if channels is not None:
        count = arguments.whole_number("channels", channels, 1, MAX_CHANNELS)
    return SoundFormat(rate_hz, count)


def _backlog_s(given: object, clock: BlockClock, rate: Fraction, mode: AudioMode) -> float:
    least_s = least_backlog_s(clock, rate)
    if given is None:
        return math.inf if mode == "whole" else max(BACKLOG_S, 1.5 * least_s)
    if given == math.inf:
        return math.inf
    return float(arguments.number("max_backlog_s", given, least_s, 1e9))
