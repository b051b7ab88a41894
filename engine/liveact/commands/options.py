"""What several commands check of their options before anything large is loaded."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from liveact import _core
from liveact.blocks import Slots
from liveact.errors import InputError
from liveact.files import output_target


def parse_size(text: str) -> tuple[int, int]:
    """`512x512`, also with `X`, `×` or `*` → (width, height). Raises InputError."""
    match = re.fullmatch(r"([0-9]{1,7})[xX×*]([0-9]{1,7})", text)  # not \d: digits are ASCII
    if match is None:
        raise InputError(f"size: expected WIDTHxHEIGHT such as 512x512, found {text!r:.80}")
    return int(match[1]), int(match[2])


def parse_slots(text: str, memory: str) -> Slots:
    """`2/2/2/8`: latent frames of reference, long-term and short-term memory and of a block. Raises
    InputError, also for counts that do not go together in a memory of this kind."""
    match = re.fullmatch(r"([0-9]{1,3})/([0-9]{1,3})/([0-9]{1,3})/([0-9]{1,3})", text)
    if match is None:
        raise InputError(
            "slots: expected REFERENCE/LONG_TERM/SHORT_TERM/CURRENT such as 2/2/2/8, "
            f"found {text!r:.80}"
        )
    slots = Slots(*map(int, match.groups()))
    _core.check_slots(slots, memory)
    return slots


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises InputError for a value that is none of `choices`."""
    if value not in choices:
        raise InputError(f"{name}: expected {', '.join(choices)}, found {value!r}")


def check_output(out: Path, others: Sequence[Path]) -> None:
    """Refuses, before any work, what could not be written, is no regular file and would be lost, or
    is one of `others`, the inputs and other outputs."""
    target = output_target(out)
    folder = target.parent if out.is_symlink() else out.parent
    if not folder.is_dir():
        raise InputError(f"{out}: expected the directory {folder} to exist")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{out}: expected a directory that can be written, found {folder}")
    for other in others:
        same = os.path.realpath(other) == str(target)
        if same or (target.exists() and other.exists() and target.samefile(other)):
            raise InputError(f"{out}: expected a file of its own, found that of another option")


def on_terminal() -> bool:
    """Whether somebody watches the output."""
    return sys.stdout.isatty()
