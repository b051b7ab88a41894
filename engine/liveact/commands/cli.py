"""The command line. Bad input ends with exit code 2 and one line; a traceback is a bug."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from liveact.errors import DeviceError, InputError, LiveActError


class _Parser(argparse.ArgumentParser):
    """argparse prints two lines and exits with 2 already; one line is enough."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="liveact", description="LiveAct engine: portrait and speech to video.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, text, add_options in (
        ("generate", "a portrait and an audio file to an mp4", _generate),
        ("replay", "recorded inputs through one part of the model", _replay),
        ("demo-checkpoint", "write a tiny checkpoint of random weights", _demo_checkpoint),
        ("inspect", "sizes, parameters and memory of a checkpoint", _inspect),
        ("convert", "a checkpoint that loads without quantising anything", _convert),
        ("calibrate", "what fp8 costs each product; writes a policy file", _calibrate),
        ("doctor", "what is usable on this machine, and why not", None),
    ):
        command = commands.add_parser(name, help=text)
        if add_options is not None:
            add_options(command)
    return parser


# ----------------------------------------------------------------------- options of the commands


def _generate(p: argparse.ArgumentParser) -> None:
    _add_checkpoint(p)
    _add_wav2vec(p)
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
    _add_size(p)
    p.add_argument("--fps", type=float, default=20.0)
    p.add_argument("--seed", type=int, default=42)
    _add_model_options(p)
    _add_devices(p)
    p.add_argument("--vae-decode", default="streaming", help="streaming or windowed")
    p.add_argument("--trace", type=Path, help="write a Chrome JSON trace (ui.perfetto.dev)")
    p.add_argument("--out", type=Path, required=True, help="the mp4")


def _replay(p: argparse.ArgumentParser) -> None:
    p.add_argument("--part", required=True, help="dit, vae or encoders")
    _add_checkpoint(p)
    _add_wav2vec(p)
    p.add_argument("--inputs", type=Path, required=True, help="safetensors")
    _add_model_options(p)
    _add_devices(p)
    p.add_argument("--out", type=Path, required=True, help="safetensors")


def _demo_checkpoint(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=Path)
    p.add_argument("--seed", type=int, default=0)


def _inspect(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=Path)
    _add_wav2vec(p)
    _add_size(p)
    p.add_argument(
        "--precision", help="fp32, bf16, fp8 or a policy file; default: as converted, else fp32"
    )
    p.add_argument("--audio-guidance", type=float, default=1.0)


def _convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=Path)
    p.add_argument("--out", type=Path, required=True, help="directory; must not exist or be empty")
    p.add_argument("--precision", default="fp8", help="fp8 or a policy file (default fp8)")


def _calibrate(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=Path)
    p.add_argument("--out", type=Path, required=True, help="the policy, JSON")
    p.add_argument("--image", type=Path, help="default: random features")
    p.add_argument("--audio", type=Path, help="default: random features")
    p.add_argument("--prompt", help="default: random features")
    _add_wav2vec(p)
    _add_size(p)
    p.add_argument("--blocks", type=int, default=3, help="how many are measured (default 3)")
    p.add_argument(
        "--threshold", type=float, default=0.05, help="largest error for fp8 (default 0.05)"
    )
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--device", help="cpu or cuda:N; default: CUDA where usable, else cpu")


def _add_checkpoint(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--checkpoint", type=Path, required=True, help="directory in the released layout"
    )


def _add_wav2vec(p: argparse.ArgumentParser) -> None:
    p.add_argument("--wav2vec", type=Path, help="default: wav2vec in the checkpoint")


def _add_size(p: argparse.ArgumentParser) -> None:
    p.add_argument("--size", default="512x512", help="WIDTHxHEIGHT, multiples of 16")


def _add_devices(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", help="cpu or cuda:N; default: CUDA where usable, else cpu")
    p.add_argument("--vae-device", help="cpu or cuda:N of the VAE; default: where the DiT is")
    p.add_argument(
        "--precision",
        help="fp32, bf16, fp8 or a policy file; default: as converted, else fp32 on cpu, else fp8",
    )


def _add_model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--memory", default="sequential", help="sequential, sharded or mean (default sequential)"
    )
    p.add_argument(
        "--audio-guidance", type=float, default=1.0, help="1 for none; above, half as fast"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failure, 2 for bad input."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no ×, a file name
    try:
        options = _parser().parse_args(arguments)
        # Imported now: torch takes its time, and --help needs none of it.
        import_module(f"liveact.commands.{options.command.replace('-', '_')}").run(options)
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
