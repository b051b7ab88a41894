"""The command line. Bad input ends with exit code 2 and one line; a traceback is a bug."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from liveact.errors import DeviceError, InputError, LiveActError


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and len(text) < 16):
        raise InputError(f"size: expected WIDTHxHEIGHT such as 512x512, got {text!r}")
    return int(width), int(height)


class _Parser(argparse.ArgumentParser):
    """argparse prints two lines and exits with 2 already; one line is enough."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(message)


def _add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=required, help="directory in the released layout"
    )


def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda:N; default: CUDA where usable, else cpu")
    parser.add_argument("--vae-device", help="the same for the VAE; default: the same device")
    parser.add_argument(
        "--precision",
        help="fp32, bf16, fp8 or a policy file; default: as converted, else fp32 on cpu, else fp8",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", default="sequential", help="sequential, sharded or mean (default sequential)"
    )
    parser.add_argument(
        "--audio-guidance", type=float, default=1.0, help="1 for none; above, half as fast"
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="liveact", description="LiveAct engine: portrait and speech to video.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    p = commands.add_parser("generate", help="a portrait and an audio file to an mp4")
    _add_checkpoint(p)
    p.add_argument("--wav2vec", type=Path, help="default: wav2vec in the checkpoint")
    p.add_argument("--image", type=Path, required=True)
    p.add_argument("--audio", type=Path, required=True, help="any file with a sound track")
    p.add_argument("--prompt", required=True)
    p.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="7-8:PROMPT",
        help="another prompt for these blocks; may be repeated",
    )
    p.add_argument("--size", default="512x512", help="WIDTHxHEIGHT, multiples of 16")
    p.add_argument("--fps", type=float, default=20.0)
    p.add_argument("--seed", type=int, default=42)
    _add_model_options(p)
    _add_devices(p)
    p.add_argument("--vae-decode", default="streaming", help="streaming or windowed")
    p.add_argument("--trace", type=Path, help="write a Chrome JSON trace (ui.perfetto.dev)")
    p.add_argument("--out", type=Path, required=True, help="the mp4")
    p.set_defaults(run=_generate)

    p = commands.add_parser("replay", help="recorded inputs through one part of the model")
    p.add_argument("--part", required=True, help="dit, vae or encoders")
    _add_checkpoint(p)
    p.add_argument("--wav2vec", type=Path, help="default: wav2vec in the checkpoint")
    p.add_argument("--inputs", type=Path, required=True, help="safetensors")
    _add_model_options(p)
    _add_devices(p)
    p.add_argument("--out", type=Path, required=True, help="safetensors")
    p.set_defaults(run=_replay)

    p = commands.add_parser("demo-checkpoint", help="write a tiny checkpoint of random weights")
    p.add_argument("directory", type=Path)
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=_demo_checkpoint)

    p = commands.add_parser("inspect", help="sizes, parameters and memory of a checkpoint")
    p.add_argument("directory", type=Path)
    p.add_argument("--size", default="512x512", help="WIDTHxHEIGHT, multiples of 16")
    p.add_argument(
        "--precision", help="fp32, bf16, fp8 or a policy file; default: as converted, else fp32"
    )
    p.add_argument("--audio-guidance", type=float, default=1.0)
    p.set_defaults(run=_inspect)

    p = commands.add_parser("convert", help="a checkpoint that loads without quantising anything")
    p.add_argument("directory", type=Path)
    p.add_argument("--out", type=Path, required=True, help="directory; must not exist or be empty")
    p.add_argument("--precision", default="fp8", help="fp8 or a policy file (default fp8)")
    p.set_defaults(run=_convert)

    p = commands.add_parser("calibrate", help="what fp8 costs each product; writes a policy file")
    p.add_argument("directory", type=Path)
    p.add_argument("--out", type=Path, required=True, help="the policy, JSON")
    p.add_argument("--image", type=Path, help="default: random features")
    p.add_argument("--audio", type=Path, help="default: random features")
    p.add_argument("--prompt", help="default: random features")
    p.add_argument("--wav2vec", type=Path, help="default: wav2vec in the checkpoint")
    p.add_argument("--size", default="512x512", help="WIDTHxHEIGHT, multiples of 16")
    p.add_argument("--blocks", type=int, default=3, help="how many are measured (default 3)")
    p.add_argument(
        "--threshold", type=float, default=0.05, help="largest error for fp8 (default 0.05)"
    )
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--device", help="cpu or cuda:N; default: CUDA where usable, else cpu")
    p.set_defaults(run=_calibrate)

    p = commands.add_parser("doctor", help="what is usable on this machine, and why not")
    p.set_defaults(run=_doctor)
    return parser


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected {', '.join(choices)}, got {value!r}")


def _check_output(out: Path, inputs: Sequence[Path]) -> None:
    """Refuses, before any work, what could not be written or would destroy an input."""
    if not out.parent.is_dir():
        raise InputError(f"{out}: expected the directory {out.parent} to exist")
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, found a directory")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out}: expected a directory that can be written, found {out.parent}")
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise InputError(f"{out}: expected an output other than the inputs, found one of them")


def _generate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from liveact.audio.front_end import exact_fps
    from liveact.device.devices import open_devices
    from liveact.engine import VAE_DECODES, Engine
    from liveact.generate import Edit, audio_mode, table, unreached, write_video
    from liveact.media import check_size, open_audio, read_image

    # Everything that can be refused is, before anything large is loaded.
    size = _size(options.size)
    check_size(*size)
    fps = exact_fps(options.fps)
    edits = [Edit.parse(text) for text in options.edit]
    _check_choice("memory", options.memory, ("sequential", "sharded", "mean"))
    _check_choice("vae-decode", options.vae_decode, VAE_DECODES)
    for out in (options.out, options.trace):
        if out is not None:
            _check_output(out, [options.image, options.audio])
    devices = open_devices(
        options.device, options.vae_device, options.precision, options.checkpoint
    )
    read_image(options.image, size)
    audio = open_audio(options.audio)
    mode = audio_mode(audio)
    print(f"device: {devices.reason}; audio encoded as {mode}")
    for line in unreached(edits, audio, fps):
        print(line)
    engine = Engine.load(
        options.checkpoint,
        device=options.device,
        vae_device=options.vae_device,
        precision=options.precision,
        wav2vec=options.wav2vec,
    )
    session = engine.open_session(
        image=options.image,
        prompt=options.prompt,
        size=size,
        fps=options.fps,
        seed=options.seed,
        memory=options.memory,
        audio_guidance=options.audio_guidance,
        vae_decode=options.vae_decode,
        audio_mode=mode,
        trace=options.trace,
    )
    with session:
        for edit in edits:
            session.set_prompt(edit.prompt, edit.first, edit.last)
        rows = write_video(session, audio, options.out, size, sys.stdout)
    console = Console()
    console.print(table(rows))
    frames = sum(row.frames for row in rows)
    print(f"{options.out}: {frames} frames, {float(frames / session.fps):.2f} s")


def _replay(options: argparse.Namespace) -> None:
    from liveact.device.devices import open_devices
    from liveact.dit.dit import MEMORIES, MemoryPolicy
    from liveact.replay import PARTS, replay

    _check_choice("part", options.part, PARTS)
    _check_choice("memory", options.memory, MEMORIES)
    _check_output(options.out, [options.inputs])
    devices = open_devices(
        options.device, options.vae_device, options.precision, options.checkpoint
    )
    print(f"device: {devices.reason}")
    results = replay(
        options.part,
        options.checkpoint,
        options.inputs,
        options.out,
        devices=devices,
        policy=MemoryPolicy(options.memory),
        audio_guidance=options.audio_guidance,
        wav2vec=options.wav2vec,
    )
    print(f"{options.out}: {len(results)} tensors")


def _demo_checkpoint(options: argparse.Namespace) -> None:
    from liveact.checkpoint.demo import write_demo_checkpoint

    directory = write_demo_checkpoint(options.directory, options.seed)
    print(f"{directory}: a tiny checkpoint of random weights; the picture will be texture")


def _inspect(options: argparse.Namespace) -> None:
    from rich.console import Console

    from liveact.inspection import inspect_checkpoint

    size = _size(options.size)
    Console().print(
        inspect_checkpoint(options.directory, size, options.precision, options.audio_guidance)
    )


def _convert(options: argparse.Namespace) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from liveact.convert import convert
    from liveact.dit.precision import read_precision

    precision = read_precision(options.precision)
    bar = Progress(BarColumn(), DownloadColumn(), TimeRemainingColumn(), disable=not _terminal())
    with bar:
        task = bar.add_task("", total=None)
        result = convert(
            options.directory,
            options.out,
            precision,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{options.out}: {result}")


def _calibrate(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from liveact.calibrate import calibrate, check_arguments, conditioning, tables, write_policy
    from liveact.device.devices import open_devices
    from liveact.dit.dit import open_weights

    size = _size(options.size)
    check_arguments(size, options.blocks, options.threshold)
    inputs = [path for path in (options.image, options.audio) if path is not None]
    _check_output(options.out, inputs)
    devices = open_devices(options.device, None, "bf16")
    config, _ = open_weights(options.directory)
    given = conditioning(
        options.directory,
        config,
        size,
        options.blocks,
        options.seed,
        prompt=options.prompt,
        image=options.image,
        audio=options.audio,
        wav2vec=options.wav2vec,
    )
    print(f"device: {devices.name}; {given.origin}")
    with Progress(disable=not _terminal()) as bar:
        task = bar.add_task("blocks", total=None)
        result = calibrate(
            options.directory,
            devices.core,
            given,
            threshold=options.threshold,
            seed=options.seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    write_policy(options.out, result.policy)
    Console().print(tables(result))
    print(f"{options.out}: {result.policy}")


def _terminal() -> bool:
    return sys.stdout.isatty()


def _doctor(options: argparse.Namespace) -> None:
    from rich.console import Console

    from liveact.inspection import doctor

    Console().print(doctor())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failure, 2 for bad input."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no ×, a file name
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
        return 0
    except (InputError, DeviceError) as error:
        print(f"liveact: {_one_line(error)}", file=sys.stderr)
        return 2
    except LiveActError as error:
        print(f"liveact: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("liveact: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
