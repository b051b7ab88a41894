"""`liveact generate`: a portrait and an audio file in, a film out, with a table per block."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from liveact.blocks import BlockClock, check_size, exact_fps
from liveact.commands.options import (
    check_choice,
    check_output,
    on_terminal,
    parse_size,
    parse_slots,
)
from liveact.commands.report import BlockRow, Report, table
from liveact.device.devices import Devices, open_devices
from liveact.dit.dit import MEMORIES, SAMPLERS, MemoryPolicy
from liveact.dit.precision import AUTO
from liveact.engine import Engine
from liveact.errors import InputError, SessionError
from liveact.media.image import read_image
from liveact.media.mp4 import Mp4Writer, container_of
from liveact.media.sound import AudioFile, open_audio
from liveact.session.options import VAE_DECODES
from liveact.session.session import Session

WHOLE_CLIP_S = 60.0  # clips up to this length are encoded whole, exactly as in the released code


def run(options: argparse.Namespace) -> None:
    """Makes the video."""
    make_film(options, None)


def make_film(options: argparse.Namespace, mode: Literal["stream", "whole"] | None) -> None:
    """Makes the video. Everything that can be refused is, before anything large is loaded.

    mode: how the audio is encoded; None: by the length of the clip (`audio_mode`).
    """
    size = parse_size(options.size)
    check_size(*size)
    fps = exact_fps(options.fps)
    edits = [Edit.parse(text) for text in options.edit]
    check_choice("memory", options.memory, MEMORIES)
    clock = BlockClock(parse_slots(options.slots, options.memory))
    check_choice("sampler", options.sampler, SAMPLERS)
    check_choice("vae-decode", options.vae_decode, VAE_DECODES)
    check_output(options.out, [options.image, options.audio])
    container_of(options.out)
    if options.trace is not None:
        check_output(options.trace, [options.image, options.audio, options.out])
    devices = open_devices(
        options.device, options.vae_device, options.precision, options.checkpoint
    )
    read_image(options.image, size)
    audio = open_audio(options.audio)
    mode = audio_mode(audio) if mode is None else mode
    print(f"device: {devices.reason}; audio encoded as {mode}")
    for line in unreached(edits, audio, fps, clock):
        print(line)
    with _load(options, devices) as engine, _open_session(engine, options, size, mode) as session:
        if devices.precision == AUTO:
            print(f"precision: {engine.dit.precision}")
        for edit in edits:
            session.set_prompt(edit.prompt, edit.first, edit.last)
        rows = write_video(session, audio, options.out, size, sys.stdout)
    Console().print(table(rows))
    frames = sum(row.frames for row in rows)
    print(f"{options.out}: {frames} frames, {float(frames / session.fps):.2f} s")


def _load(options: argparse.Namespace, devices: Devices) -> Engine:
    """The engine, with a bar on a terminal."""
    columns = (TextColumn("loading {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not on_terminal(), transient=True) as bar:
        task = bar.add_task("", total=None)
        return Engine.load(
            options.checkpoint,
            device=devices,
            wav2vec=options.wav2vec,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )


def _open_session(
    engine: Engine,
    options: argparse.Namespace,
    size: tuple[int, int],
    mode: Literal["stream", "whole"],
) -> Session:
    return engine.open_session(
        image=options.image,
        prompt=options.prompt,
        size=size,
        fps=options.fps,
        seed=options.seed,
        memory=MemoryPolicy(options.memory, slots=parse_slots(options.slots, options.memory)),
        audio_guidance=options.audio_guidance,
        sampler=options.sampler,
        vae_decode=options.vae_decode,
        audio_mode=mode,
        trace=options.trace,
    )


@dataclass(frozen=True)
class Edit:
    """Blocks first..last are made with another prompt."""

    first: int
    last: int
    prompt: str

    @classmethod
    def parse(cls, text: str) -> Edit:
        """From `7-8:laughing` or `7:laughing`. Raises InputError."""
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?:\s*(\S.*)", text, re.DOTALL)
        if match is None:
            raise InputError(
                f"edit: expected FIRST-LAST:PROMPT such as 7-8:laughing, found {text!r:.80}"
            )
        first, last, prompt = int(match[1]), int(match[2] or match[1]), match[3].rstrip()
        if last < first:
            raise InputError(f"edit: expected first block <= last block, found {text!r:.80}")
        return cls(first, last, prompt)


def unreached(edits: list[Edit], audio: AudioFile, fps: Fraction, clock: BlockClock) -> list[str]:
    """A line for each edit that begins after the last block, where the length is known."""
    if audio.duration_s is None:
        return []
    count = clock.num_blocks(math.ceil(audio.duration_s * fps))
    return [
        f"edit of block {edit.first}: never reached, {audio.path} makes {count} blocks"
        for edit in edits
        if edit.first >= count
    ]


def audio_mode(audio: AudioFile) -> Literal["stream", "whole"]:
    """`whole` for short clips, by what is decoded: the length that a file announces may lie."""
    return "whole" if audio.read_ahead(WHOLE_CLIP_S) else "stream"


def write_video(
    session: Session, audio: AudioFile, out: Path, size: tuple[int, int], terminal: TextIO
) -> list[BlockRow]:
    """Feeds the audio file, writes what comes out; returns the table.

    `out` appears only when it is complete. An error of the file, the session or the disk ends
    everything and is raised.
    """
    errors: list[BaseException] = []
    started_s = time.perf_counter()
    feeder = threading.Thread(target=_feed, args=(session, audio, errors), daemon=True)
    feeder.start()
    rows: list[BlockRow] = []
    try:
        first = next(session)
        rate_hz, channels = first.sample_rate_hz, first.pcm.shape[1]
        writer = Mp4Writer(out, *size, session.fps, rate_hz, channels, audio.layout)
        expected = (
            session.clock.num_blocks(math.ceil(audio.duration_s * session.fps))
            if audio.duration_s
            else None
        )
        with writer, Report(terminal, expected, started_s) as report:
            for chunk in itertools.chain([first], session):
                writer.write(chunk.frames, chunk.pcm)
                report.add(chunk, session.fps, rows)
    except SessionError as error:
        if errors:
            raise _named(errors[0], audio) from None
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise _named(cause, audio) from None
    except StopIteration:
        raise InputError(f"{audio.path}: expected audio to make a block of, found none") from None
    finally:
        session.close()
        # A pipe may never give another byte, nor end.
        feeder.join(None if audio.path.is_file() else 1.0)
    return rows


def _named(error: BaseException, audio: AudioFile) -> BaseException:
    """Bad input, with the file that it came from: a session knows samples only."""
    if isinstance(error, InputError) and str(audio.path) not in str(error):
        return InputError(f"{audio.path}: {error}")
    return error


def _feed(session: Session, audio: AudioFile, errors: list[BaseException]) -> None:
    try:
        for piece in audio:
            session.push_audio(piece, audio.sample_rate_hz, timeout_s=None)
        session.end_of_audio()
    except SessionError:
        pass  # the session's own error reaches whoever iterates over it
    except BaseException as error:  # whatever it is, who waits for chunks must not wait on
        errors.append(error)
        session.close()
