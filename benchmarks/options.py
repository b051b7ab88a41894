"""The command line options that benchmarks share, and the pictures and models they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from liveact.blocks import check_size
from liveact.dit.precision import PRECISIONS
from liveact.errors import InputError


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, found {text!r}")
    return int(text)


def picture_size(text: str) -> tuple[int, int]:
    """`512x512` → (width, height), as the engine takes it, for argparse."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal()) or len(text) > 15:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 512x512, found {text!r}")
    size = int(width), int(height)
    try:
        check_size(*size)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return size


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every benchmark takes. A benchmark that wants another default for `repeat` sets it."""
    parser.add_argument(
        "--device",
        help="cpu or cuda:N, or two with a comma between; default: CUDA where usable, else cpu",
    )
    parser.add_argument("--repeat", type=positive, help="how often; more gives narrower medians")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which DiT, on which picture, in which format."""
    parser.add_argument(
        "--size",
        type=picture_size,
        metavar="WxH",
        help="picture, multiples of 16; default: 512x512 on CUDA, 192x192 on the CPU",
    )
    parser.add_argument(
        "--precision",
        help=f"{', '.join(PRECISIONS)} or a policy file; default: fp32 on the CPU, auto on CUDA",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="directory in the released layout")
    weights.add_argument(
        "--random-weights",
        choices=("tiny", "middle", "released"),
        help="a model of this size; default: released on CUDA, middle on the CPU",
    )
