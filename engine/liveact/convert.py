"""`liveact convert`: a checkpoint whose DiT needs no quantisation when it is loaded.

What comes out is a directory in the released layout. Of a product that runs in fp8 the weight
`X.weight` is F8_E4M3 and `X.weight_scale` (F32 [n], one per output channel) lies beside it, made by
the same code that a model quantises with when it is loaded, so results are the same bit for bit.
Everything else keeps its bytes: norms, biases and modulation go into what is derived from the three
timesteps, which a model still computes. `_converted` in config.json says what was done and has the
SHA-256 of every file of weights.

One tensor is in memory at a time. The directory appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from liveact import _core
from liveact.checkpoint.tensors import SAFETENSORS_DTYPES, Tensors, read_json
from liveact.dit.dit import WEIGHTS_STEM, check_precision, open_weights, product_weights
from liveact.dit.precision import (
    CONVERTED_KEY,
    CONVERTED_VERSION,
    Precision,
    PrecisionPolicy,
    converted_precision,
    format_of,
)
from liveact.errors import InputError

SHARD_BYTES = 4 * 10**9
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_CORE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

# (bytes written, bytes in all), after every tensor.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Entry:
    """A tensor of the result. source: the tensor it is made of; narrow: by quantising it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str
    narrow: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Conversion:
    """What was done. Bytes of the DiT; files: other than the DiT's."""

    precision: Precision
    bytes_before: int
    bytes_after: int
    shards: int
    linked: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.precision}, DiT {self.bytes_before / 1e9:.3f} → {self.bytes_after / 1e9:.3f} GB"
            f" in {self.shards} shard(s); other files: {len(self.linked)} hard-linked,"
            f" {len(self.copied)} copied"
        )


def convert(
    checkpoint: Path,
    out: Path,
    precision: Precision = "fp8",
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Writes `out`, which must not exist or be empty.

    Args:
        checkpoint: a directory in the released layout, not converted yet.
        precision: `fp8`, or a policy; its products in bf16 keep the stored weights.
        shard_bytes: where a file of weights ends.

    Raises InputError for a bad checkpoint, a precision with nothing to convert to, an `out` that is
    in use or in the checkpoint, too little room on the disk, or a file that cannot be written.
    """
    if isinstance(precision, str) and precision != "fp8":
        raise InputError(f"precision: expected fp8 or a policy file to convert to, got {precision}")
    if converted_precision(checkpoint) is not None:
        raise InputError(f"{checkpoint}: expected a checkpoint as released, found a converted one")
    config, tensors = open_weights(checkpoint)
    check_precision(tensors, config, precision, checkpoint)
    target = out.resolve()
    _check_target(target, checkpoint.resolve())
    shards = list(_plan(tensors, config, precision, shard_bytes))
    others = _other_files(checkpoint, tensors)
    try:
        _check_room(target.parent, shards, others)
        partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        try:
            result = _write(partial, checkpoint, tensors, precision, shards, others, progress)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error
    return result


def _check_target(target: Path, checkpoint: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        found = "other files in it" if target.is_dir() else "a file"
        raise InputError(f"{target}: expected nothing or an empty directory, found {found}")
    if not target.parent.is_dir():
        raise InputError(f"{target}: expected the directory {target.parent} to exist")
    if target.is_relative_to(checkpoint):
        raise InputError(f"{target}: expected a directory outside of the checkpoint {checkpoint}")


# ------------------------------------------------------------------------------------ weights


def _plan(
    tensors: Tensors, config: _core.ModelConfig, precision: Precision, shard_bytes: int
) -> Iterator[list[_Entry]]:
    """The tensors of each shard: as many as fit, a weight and its scale in one."""
    products = product_weights(config.num_layers)
    shard: list[_Entry] = []
    for name in tensors:
        shape, dtype = tensors.shape(name), tensors.dtype(name)
        if name in products and format_of(precision, *products[name]) == "fp8":
            entries = [
                _Entry(f"{name}_scale", torch.float32, shape[:1], name, narrow=True),
                _Entry(name, torch.float8_e4m3fn, shape, name, narrow=True),
            ]
        else:
            entries = [_Entry(name, dtype, shape, name)]
        size = sum(entry.num_bytes for entry in shard + entries)
        if shard and size > shard_bytes:
            yield shard
            shard = []
        shard += entries
    yield shard


def _write_shard(
    path: Path, entries: list[_Entry], tensors: Tensors, wrote: Callable[[int], None]
) -> str:
    """One safetensors file, tensor by tensor; returns its SHA-256."""
    # Wide formats first, so that every tensor is aligned to its element.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with path.open("w+b") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for entry in entries:
            _write_tensor(file, entry, header, start, tensors)
            wrote(entry.num_bytes)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensor(
    file: IO[bytes], entry: _Entry, header: dict[str, Any], start: int, tensors: Tensors
) -> None:
    """A weight that is quantised is written together with its scale, when the weight's turn is."""

    def put(name: str, data: Any) -> None:
        file.seek(start + header[name]["data_offsets"][0])
        file.write(data)

    if not entry.narrow:
        put(entry.name, tensors[entry.name].flatten().view(torch.uint8).numpy().data)
    elif entry.name == entry.source:
        weight = tensors[entry.source]
        codes, scale = _core.quantize_weight(
            weight.data_ptr(), _CORE_NAMES[weight.dtype], list(weight.shape)
        )
        put(entry.name, codes.data)
        put(f"{entry.name}_scale", scale.data)


def _write(
    directory: Path,
    checkpoint: Path,
    tensors: Tensors,
    precision: Precision,
    shards: list[list[_Entry]],
    others: dict[str, Path],
    progress: Progress | None,
) -> Conversion:
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    before = sum(math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors)
    written = 0

    def wrote(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        if progress is not None:
            progress(written, total)

    count = len(shards)
    names = [f"{WEIGHTS_STEM}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    hashes = {
        name: _write_shard(directory / name, shard, tensors, wrote)
        for name, shard in zip(names, shards, strict=True)
    }
    shard_of = {e.name: n for n, shard in zip(names, shards, strict=True) for e in shard}
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    _write_json(directory / f"{WEIGHTS_STEM}.safetensors.index.json", index)
    record = {
        "version": CONVERTED_VERSION,
        "by": f"liveact-engine {version('liveact-engine')}",
        "precision": precision.to_json() if isinstance(precision, PrecisionPolicy) else precision,
        "sha256": hashes,
    }
    config = read_json(checkpoint / "config.json")
    _write_json(directory / "config.json", config | {CONVERTED_KEY: record})
    result = Conversion(precision, before, total, len(shards))
    for name, source in others.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (result.linked if _link(source, directory / name) else result.copied).append(name)
    return result


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------- other files


def _other_files(checkpoint: Path, tensors: Tensors) -> dict[str, Path]:
    """Every file but the DiT's and hidden ones: name in the checkpoint → the file itself."""
    own = {tensors.file_of(name).name for name in tensors} | {"config.json", tensors.source.name}
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    # Links are followed, as a download cache is made of them; each directory once.
    for folder, directories, files in os.walk(checkpoint, followlinks=True):
        here = Path(folder)
        if here.resolve() in seen:
            directories.clear()
            continue
        seen.add(here.resolve())
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or (here == checkpoint and name in own):
                continue
            found[(here / name).relative_to(checkpoint).as_posix()] = (here / name).resolve()
    return found


def _check_room(parent: Path, shards: list[list[_Entry]], others: dict[str, Path]) -> None:
    """Refuses what would fill the disk. Other files take room where they cannot be linked."""
    device = parent.stat().st_dev
    copied = [f.stat() for f in others.values()]
    needed = sum(stat.st_size for stat in copied if stat.st_dev != device)
    for shard in shards:
        needed += sum(entry.num_bytes + 256 for entry in shard)  # 256: its line in the header
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"{parent}: expected {needed / 1e9:.3g} GB of free space for the converted checkpoint, "
            f"found {free / 1e9:.3g} GB"
        )


def _link(source: Path, target: Path) -> bool:
    """A hard link, or a copy where the file system has none; whether it is a link."""
    try:
        os.link(source, target)
        return True
    except OSError:
        shutil.copyfile(source, target)
        return False
