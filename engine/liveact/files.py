"""Files that a user hands over or gets: read with one clear error, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liveact.errors import InputError


def one_line(error: BaseException) -> str:
    """What a library's exception says, as one line of at most 200 characters: the reason alone of
    errors of the system, else the type and the message."""
    reason = getattr(error, "strerror", None)
    text = " ".join(str(reason or error).split())
    return (text if reason else f"{type(error).__name__}: {text}")[:200]


def require_file(path: Path | str) -> Path:
    """`path`, which must be a file; else InputError."""
    path = Path(path)
    if not path.is_file():
        found = "something else" if path.exists() else "nothing"
        raise InputError(f"{path}: expected a file, found {found}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `InputError` if it is missing, unreadable or not an object."""
    path = require_file(path)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, found {one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_size(config: Mapping[str, Any], key: str, path: Path, *, at_most: int) -> int:
    """The integer `config[key]`, which must lie in 1..at_most; `path` is named in the error.

    The upper bound is what keeps a configuration from asking for a model of 10⁹ layers.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
        raise InputError(f"{path}: expected {key} to be in 1..{at_most}, found {value!r}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file in UTF-8, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def output_target(path: Path) -> Path:
    """The file that is made or replaced by writing `path`: where it leads, if it is a link.

    Raises InputError where something is there that is no regular file and would be lost.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # nothing there, or a link that leads nowhere yet
        return Path(os.path.realpath(path))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: expected a file, found {one_line(error)}"
        ) from error
    if not stat.S_ISREG(mode):
        found = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise InputError(f"{path}: cannot be written: expected a file, found {found}")
    return Path(os.path.realpath(path))


def partial_name(path: Path) -> Path:
    """A new name beside `path` for what will become `path` when it is complete.

    Not the process number: in a container it is 1 again after a crash. Of a long name only the
    beginning: a name has at most 255 bytes, of which a letter may take four.
    """
    return path.with_name(f".{path.name[:50]}.partial-{secrets.token_hex(4)}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end of the scope; nothing stays of it after
    an error. InputError where the system refuses, or `path` is no file that may be replaced: `path`
    is named, not the name in between."""
    target = output_target(path)
    partial = partial_name(target)
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """An empty directory to fill, which becomes `path` at the end of the scope, in the place of
    what `path` was; nothing stays of it after an error. InputError as `whole_file`."""
    partial = partial_name(path)
    replaced = partial_name(path)
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
            _swap(partial, path, replaced)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {one_line(error)}") from error


def _swap(new: Path, path: Path, replaced: Path) -> None:
    """`new` becomes `path`; what `path` was goes, but only after that."""
    if path.exists():
        path.rename(replaced)
    try:
        new.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
