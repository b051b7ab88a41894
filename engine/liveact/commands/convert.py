"""`liveact convert`: a checkpoint whose DiT needs no quantisation when it is loaded.

What comes out is a directory in the released layout. Of a product that runs in fp8 the weight
`X.weight` is F8_E4M3 and `X.weight_scale` (F32 [n], one per output channel) lies beside it, made by
the same code that a model quantises with when it is loaded, so results are the same bit for bit.
Everything else keeps its bytes: norms, biases and modulation go into what is derived from the three
timesteps, which a model still computes. `_converted` in config.json says what was done and has the
SHA-256 of every file of weights.

One shard is in memory at a time. The directory appears complete or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import save_file

from liveact import _core
from liveact.checkpoint.layout import DIT_CONFIG_FILE, DIT_STEM
from liveact.checkpoint.tensors import Tensors
from liveact.commands.options import on_terminal
from liveact.dit.precision import (
    AUTO,
    CONVERTED_KEY,
    CONVERTED_VERSION,
    Precision,
    PrecisionPolicy,
    converted_precision,
    format_of,
    read_precision,
)
from liveact.dit.weights import DTYPE_NAMES, check_precision, open_weights, product_weights
from liveact.errors import InputError
from liveact.files import one_line, read_json, whole_directory, write_json
from liveact.finite import NOT_FINITE, all_finite

SHARD_BYTES = 10**9

# (bytes written, bytes in all), after every tensor.
Report = Callable[[int, int], None]


def run(options: argparse.Namespace) -> None:
    """Converts with a progress bar and says what was done."""
    precision = read_precision(options.precision)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not on_terminal()) as bar:
        task = bar.add_task("", total=None)
        result = convert(
            options.directory,
            options.out,
            precision,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{options.out}: {result}")


@dataclass(frozen=True)
class _Source:
    """A tensor of the checkpoint and what becomes of it. narrow: codes and scales, in fp8."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    narrow: bool

    @property
    def num_bytes(self) -> int:
        """In the result."""
        if self.narrow:
            return math.prod(self.shape) + torch.float32.itemsize * self.shape[0]
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Conversion:
    """What was done.

    Attributes:
        precision: what it was converted to.
        bytes_before: of the DiT's tensors.
        bytes_after: of the DiT's tensors.
        shards: files that they are in.
        linked: other files that are hard links.
        copied: other files that are copies.
    """

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
    precision: Precision = AUTO,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Report | None = None,
) -> Conversion:
    """Writes `out`, which must not exist or be empty.

    Args:
        checkpoint: a directory in the released layout, not converted yet.
        precision: `fp8`, `auto`, or a policy; products that are or may be in bf16 keep the stored
            weights.
        shard_bytes: where a file of weights ends.
        progress: told the bytes done and the bytes in all, after every tensor.

    Raises InputError for a bad checkpoint, a precision with nothing to convert to, an `out` that is
    in use or in the checkpoint, too little space on the disk, or a file that cannot be written.
    """
    if precision in ("fp32", "bf16"):
        raise InputError(
            f"precision: expected auto, fp8 or a policy file to convert to, found {precision}"
        )
    if converted_precision(checkpoint) is not None:
        raise InputError(f"{checkpoint}: expected a checkpoint as released, found a converted one")
    config, tensors = open_weights(checkpoint)
    check_precision(tensors, config, precision, checkpoint)
    target = out.resolve()
    _check_target(target, checkpoint.resolve())
    shards = list(_plan(tensors, config, precision, shard_bytes))
    others = _other_files(checkpoint, tensors)
    with whole_directory(target) as partial:
        _check_space(target.parent, shards, others)
        result = _write_weights(partial, checkpoint, tensors, precision, shards, progress)
        for name, source in others.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (result.linked if _link(source, partial / name) else result.copied).append(name)
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
) -> Iterator[list[_Source]]:
    """The tensors of each shard: as many as fit."""
    products = product_weights(config.num_layers)
    shard: list[_Source] = []
    for name in tensors:
        narrow = name in products and format_of(precision, *products[name]) == "fp8"
        source = _Source(name, tensors.shape(name), tensors.dtype(name), narrow)
        if shard and sum(s.num_bytes for s in shard) + source.num_bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(source)
    yield shard


def _write_weights(
    directory: Path,
    checkpoint: Path,
    tensors: Tensors,
    precision: Precision,
    shards: list[list[_Source]],
    progress: Report | None,
) -> Conversion:
    """All shards, their index and config.json."""
    total = sum(source.num_bytes for shard in shards for source in shard)
    before = sum(math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors)
    done = 0
    shard_of: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"{DIT_STEM}-{number:05}-of-{len(shards):05}.safetensors"
        written: dict[str, torch.Tensor] = {}
        _check_finite(shard, tensors)
        for source in shard:
            written |= _converted(source, tensors)
            done += source.num_bytes
            if progress is not None:
                progress(done, total)
        hashes[file_name] = _write_shard(directory / file_name, written)
        shard_of |= dict.fromkeys(written, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    write_json(directory / f"{DIT_STEM}.safetensors.index.json", index)
    record = {
        "version": CONVERTED_VERSION,
        "by": f"liveact-engine {version('liveact-engine')}",
        "precision": precision.to_json() if isinstance(precision, PrecisionPolicy) else precision,
        "sha256": hashes,
    }
    config = read_json(checkpoint / DIT_CONFIG_FILE)
    write_json(directory / DIT_CONFIG_FILE, config | {CONVERTED_KEY: record})
    return Conversion(precision, before, total, len(shards))


def _check_finite(shard: list[_Source], tensors: Tensors) -> None:
    """Raises InputError for a tensor with a NaN or an infinity.

    All of a shard at once: small results between the large arrays keep the allocator from giving
    their memory back, 8 MB for 40 layers of the demo's size.
    """
    for name in (source.name for source in shard):
        if not all_finite(tensors[name]):
            raise InputError(
                f"{tensors.file_of(name)}: DiT: tensor {name!r}: expected finite values, "
                f"found {NOT_FINITE}"
            )


def _converted(source: _Source, tensors: Tensors) -> dict[str, torch.Tensor]:
    """What a tensor becomes: itself, or codes and scales."""
    tensor = tensors[source.name]
    if not source.narrow:
        return {source.name: tensor}
    codes, scale = _core.quantize_weight(
        tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], list(tensor.shape)
    )
    return {
        source.name: torch.from_numpy(codes).view(torch.float8_e4m3fn),
        f"{source.name}_scale": torch.from_numpy(scale),
    }


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """One safetensors file; returns its SHA-256."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # also where the system refuses
        raise InputError(f"{path.name}: cannot be written: {one_line(error)}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------- other files


def _other_files(checkpoint: Path, tensors: Tensors) -> dict[str, Path]:
    """Every file but the DiT's and hidden ones: name in the checkpoint → the file itself."""
    own = {tensors.file_of(name).name for name in tensors} | {DIT_CONFIG_FILE, tensors.source.name}
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


def _check_space(parent: Path, shards: list[list[_Source]], others: dict[str, Path]) -> None:
    """Refuses what would fill the disk. Other files take space where they cannot be linked."""
    device = parent.stat().st_dev
    copied = [f.stat() for f in others.values()]
    needed = sum(stat.st_size for stat in copied if stat.st_dev != device)
    for shard in shards:
        needed += sum(source.num_bytes + 256 for source in shard)  # 256: its line in the header
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
