"""`python -m benchmarks NAME`: measures, prints a table, writes JSON.

A benchmark is a module of this package with

    add_arguments(parser)          its options beyond options.add_common
    measure(options) -> dict       the result: schema.FIELDS from `timed` to `weights`, and its own
    print_table(result, console)   the result as a reader wants it
    FIELDS                         what of its own a result has, see schema.py
    plot(result, path)             optional: makes --plot available
    verify(result)                 optional: raises LiveActError where the result is a failure

and a line in BENCHMARKS. The stamp of the machine and what the GPU did meanwhile are added here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report, schema
from benchmarks.machine import stamp
from benchmarks.options import add_common
from benchmarks.telemetry import Telemetry
from liveact.errors import DeviceError, InputError, LiveActError

BENCHMARKS = {
    "kernels": "every op by itself: time, rate, share of the hardware, peers",
    "block": "one denoised block in steady state, by stage, beside plain PyTorch",
    "plain": "one block of plain PyTorch alone, where it does not fit beside the engine",
    "vae": "the streaming decode of one block, beside the released way",
    "session": "live audio at real-time pace, as a viewer sees it; memory over hours",
    "latency": "speech to the first speaking frame, interruption to the last stale one",
    "conversation": "speech, silence and interruptions for an hour: nothing lost, flat memory",
    "serve": "a server: first frame, speech to frame, interruption, sessions a second, memory",
    "replicas": "two replicas on Ray Serve against one: frames a second, connections",
    "quality": "films of the small trained model: lips, prompts, drift, memory, formats",
    "profile": "a session for Nsight, and what instrumentation costs",
    "paper": "the paper's Tables 3 and 5 measured here beside the published; scaling",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; `module` is the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in BENCHMARKS.items():
        module = import_module(f"benchmarks.{name}")
        p = commands.add_parser(name, help=description, description=module.__doc__)
        add_common(p)
        if hasattr(module, "plot"):
            p.add_argument("--plot", type=Path, help="write a figure (PNG) here")
        module.add_arguments(p)
        p.set_defaults(module=module)
        if p.get_default("repeat") is None:
            p.set_defaults(repeat=3)
    p = commands.add_parser("report", help="tables and figures of what gpu.sh left in a folder")
    p.add_argument("out", type=Path)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures; the complete result, checked."""
    with Telemetry(options.device) as telemetry:
        body = options.module.measure(options)
    result = {
        "schema": schema.VERSION,
        "benchmark": options.command,
        "command": command,
        **body,
        "seed": options.seed,
        "repeat": options.repeat,
        "machine": stamp(),
        "gpu": None if body["device"] == "cpu" else telemetry.summary(),
    }
    schema.check(result, schema.FIELDS | options.module.FIELDS)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for a failure, 2 for bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        if options.command == "report":
            print(report.report(options.out))
            return 0
        result = run(options, " ".join(["python -m benchmarks", *given]))
        if options.json:  # first: a figure that fails must not cost the measurement
            options.json.write_text(schema.to_json(result))
        options.module.print_table(result, console)
        if getattr(options, "plot", None):
            options.module.plot(result, options.plot)
        if hasattr(options.module, "verify"):
            options.module.verify(result)
    except (InputError, DeviceError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except LiveActError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
