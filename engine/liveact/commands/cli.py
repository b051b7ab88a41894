"""The command line. Bad input ends with exit code 2 and one line; a traceback is a bug."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType

from liveact import __version__
from liveact.commands.output import Output, standard_output
from liveact.errors import DeviceError, InputError, LiveActError

# What these print is all that they make; None: --help and --version.
PRINTING_COMMANDS = ("inspect", "doctor", "sdk", None)


class _Parser(argparse.ArgumentParser):
    """argparse prints two lines and exits with 2 already; one line is enough."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(message)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    commands = (
        ("generate", "a portrait and an audio file to a film", _generate, _GENERATE),
        ("demo", "a cartoon that talks, by the small model that comes along", _demo, _TALK),
        ("serve", "a portrait that listens and talks, in a browser", _serve, _SERVE),
        ("replay", "recorded inputs through one part of the model", _replay, _REPLAY),
        ("demo-checkpoint", "write a tiny checkpoint of random weights", _demo_checkpoint, _DEMO),
        ("inspect", "sizes, parameters and memory of a checkpoint", _inspect, _INSPECT),
        ("convert", "a checkpoint that loads without quantising anything", _convert, _CONVERT),
        ("calibrate", "what fp8 costs each product; writes a policy file", _calibrate, _CALIBRATE),
        ("doctor", "what is usable on this machine, and why not", None, _DOCTOR),
        ("sdk", "where the headers and libraries for C++ and C are", None, _SDK),
    )
    parser = _Parser(
        prog="liveact",
        description="LiveAct engine: portrait and speech to video.",
        epilog=_epilog(*(example for *_, example in commands)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"liveact {__version__}")
    choices = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for name, text, add_options, example in commands:
        command = choices.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_epilog(example),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if add_options is not None:
            add_options(command)
    return parser


def _epilog(*examples: str) -> str:
    return "".join(["examples:" if len(examples) > 1 else "example:", *examples])


_GENERATE = r"""
  liveact generate --checkpoint DIR --wav2vec WAV2VEC_DIR --image me.png --audio speech.wav \
      --prompt "A person is speaking." --size 512x512 --out me.mp4"""
_TALK = """
  liveact demo --speech my.wav --out my.mp4"""
_SERVE = """
  liveact serve --checkpoint DIR --portraits PORTRAITS_DIR"""
_REPLAY = """
  liveact replay --part dit --checkpoint DIR --inputs in.safetensors --out out.safetensors"""
_DEMO = """
  liveact demo-checkpoint demo/"""
_INSPECT = """
  liveact inspect DIR --size 720x416"""
_CONVERT = """
  liveact convert DIR --out FP8_DIR"""
_CALIBRATE = r"""
  liveact calibrate DIR --image me.png --audio speech.wav --prompt "A person is speaking." \
      --out policy.json"""
_DOCTOR = """
  liveact doctor"""
_SDK = """
  cmake -S . -B build -DCMAKE_PREFIX_PATH=$(liveact sdk)"""


# ----------------------------------------------------------------------- options of the commands


def _generate(p: argparse.ArgumentParser) -> None:
    _add_checkpoint(p)
    _add_wav2vec(p)
    p.add_argument("--image", type=Path, required=True)
    p.add_argument(
        "--audio", type=Path, required=True, help="any file with a sound track, or a pipe"
    )
    p.add_argument("--prompt", required=True)
    p.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="7-8:PROMPT",
        help="another prompt for these blocks; may be repeated",
    )
    _add_size(p)
    p.add_argument("--fps", type=_number, default=20.0)
    p.add_argument("--seed", type=_whole, default=42)
    _add_model_options(p)
    p.add_argument(
        "--slots",
        default="2/2/2/8",
        help="latent frames of reference, long-term and short-term memory and of a block "
        "(default 2/2/2/8); 2/2/2/6, 2/4/2/8 and 2/2/2/8 are 6/6, 8/8 and 6/8 of the paper",
    )
    _add_devices(p)
    p.add_argument("--vae-decode", default="streaming", help="streaming or windowed")
    p.add_argument("--trace", type=Path, help="write a Chrome JSON trace (ui.perfetto.dev)")
    p.add_argument("--out", type=Path, required=True, help="the film: .mp4, .m4v, .mov or .mkv")


def _demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("--speech", type=Path, help="any file with a sound track; default: bundled")
    p.add_argument("--portrait", type=Path, help="one of the model's family; default: bundled")
    p.add_argument("--prompt", default="A person is speaking.")
    p.add_argument("--out", type=Path, default=Path("demo.mp4"), help="the film (default demo.mp4)")


def _serve(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--checkpoint", type=Path, help="directory in the released layout; default: bundled"
    )
    _add_wav2vec(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    p.add_argument("--port", type=_whole, default=8080, help="0 for a free one (default 8080)")
    p.add_argument("--max-sessions", type=_whole, default=1, help="open at a time (default 1)")
    p.add_argument("--token-file", type=Path, help="what clients must bear; default: nothing")
    p.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="of pages that may use it, besides its own; may be repeated",
    )
    p.add_argument("--portraits", type=Path, help="directory of pictures, offered by name")
    p.add_argument("--prompts", type=Path, help="JSON of names and prompts that the page offers")
    p.add_argument("--size", help="WIDTHxHEIGHT of a session that names none (default 512x512)")
    p.add_argument("--fps", type=_number, default=20.0)
    p.add_argument(
        "--idle-s", type=_number, default=300.0, help="a session may hear nothing (default 300)"
    )
    p.add_argument("--total-s", type=_number, default=3600.0, help="a session lives (default 3600)")
    p.add_argument("--drain-s", type=_number, default=30.0, help="to finish speaking (default 30)")
    p.add_argument(
        "--ice-server",
        action="append",
        default=[],
        metavar="URL",
        help="STUN or TURN server for WebRTC; may be repeated",
    )
    _add_devices(p)


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
    p.add_argument("--seed", type=_whole, default=0)


def _inspect(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=Path)
    _add_wav2vec(p)
    _add_size(p)
    p.add_argument(
        "--precision",
        help="fp32, bf16, fp8, auto or a policy file; default: as converted, else fp32",
    )
    p.add_argument("--audio-guidance", type=_number, default=1.0)


def _convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=Path)
    p.add_argument("--out", type=Path, required=True, help="directory; must not exist or be empty")
    p.add_argument("--precision", default="auto", help="auto, fp8 or a policy file (default auto)")


def _calibrate(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=Path)
    p.add_argument("--out", type=Path, required=True, help="the policy, JSON")
    p.add_argument("--image", type=Path, help="default: random features")
    p.add_argument("--audio", type=Path, help="default: random features")
    p.add_argument("--prompt", help="default: random features")
    _add_wav2vec(p)
    _add_size(p)
    p.add_argument("--blocks", type=_whole, default=3, help="how many are measured (default 3)")
    p.add_argument(
        "--threshold", type=_number, default=0.05, help="largest error for fp8 (default 0.05)"
    )
    p.add_argument("--seed", type=_whole, default=42)
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
    p.add_argument(
        "--device",
        help="cpu, cuda:N, or cuda:N,cuda:M for two GPUs that denoise together; default: CUDA "
        "where usable (of two GPUs what `liveact doctor` says), else cpu",
    )
    p.add_argument("--vae-device", help="cpu or cuda:N of the VAE; default: where the DiT is, last")
    p.add_argument(
        "--precision",
        help="fp32, bf16, fp8, auto or a policy file; default: as converted, else fp32 on cpu, "
        "else auto",
    )


def _add_model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--memory", default="sequential", help="sequential, sharded or mean (default sequential)"
    )
    p.add_argument(
        "--audio-guidance", type=_number, default=1.0, help="1 for none; above, half as fast"
    )
    p.add_argument(
        "--sampler",
        default="renoise",
        help="renoise (default), or euler as in the demo of the released code",
    )


def _whole(text: str) -> int:
    """A whole number in ASCII digits; `int` takes those of any script, and `1_000`."""
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r:.80}")
    return int(text)


def _number(text: str) -> float:
    """A number in ASCII characters. What the range is, the command says."""
    try:
        if text.isascii() and "_" not in text:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number, found {text!r:.80}")


# ------------------------------------------------------------------------------------ running


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, 1 for a failure, 2 for bad input, 128 and
    the number of the signal that ended it."""
    with standard_output() as output, _signals_end_it() as received:
        try:
            message, code = _run(arguments, output)
        except BaseException as error:
            # NOTE: not always a KeyboardInterrupt. Raised in the middle of torch's unpickling it
            # was seen to come out as an AttributeError.
            if not received and not isinstance(error, KeyboardInterrupt):
                raise
            message, code = "", 1
            received = received or [signal.SIGINT]
        if code and received:
            message = "interrupted" if received[0] == signal.SIGINT else "terminated"
            code = 128 + received[0]
        if message:
            with contextlib.suppress(OSError):
                print("liveact:", " ".join(message.split()), file=sys.stderr)
        return code


def _run(arguments: Sequence[str] | None, output: Output) -> tuple[str, int]:
    """What to print where errors go, if anything, and the exit code."""
    command = None
    try:
        options = parser().parse_args(arguments)
        command = options.command
        # Imported now: torch takes its time, and --help needs none of it.
        import_module(f"liveact.commands.{command.replace('-', '_')}").run(options)
    except SystemExit:  # --help and --version
        pass
    except (InputError, DeviceError) as error:
        return str(error), 2
    except LiveActError as error:
        return str(error), 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return f"{error.filename}: expected a name, found {error.strerror}", 2
    output.flush()
    if output.lost is None or command not in PRINTING_COMMANDS:
        return "", 0
    if isinstance(output.lost, BrokenPipeError):  # whoever read it has seen enough
        return "", 1
    return f"standard output: cannot be written: {output.lost.strerror}", 1


@contextlib.contextmanager
def _signals_end_it() -> Iterator[list[int]]:
    """SIGTERM of a container or a service manager, and SIGHUP of a closed terminal, leave as little
    behind as Ctrl-C: all three raise KeyboardInterrupt. One that is ignored (as by nohup) or
    handled by somebody else stays so. Gives the numbers of those that came."""
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in numbers}
    ours = {n: h for n, h in before.items() if h in (signal.SIG_DFL, signal.default_int_handler)}
    try:
        for number in ours:
            signal.signal(number, end)
        yield received
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
