"""What is compiled for tests: once per content, by whichever of the test processes comes first.

Results lie in build/tests under a hash of everything they are made from, so what is there is right,
and whoever needs the same at the same time waits for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import BUILT, REPOSITORY

HERE = Path(__file__).resolve().parent
NVIDIA_HEADERS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time, of this checkout."""
    folder = BUILT / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(*parts: Any) -> str:
    """Of values that JSON knows, and of the contents of files (paths)."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else json.dumps(part).encode()
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:24]


def cached(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The file NAME-KEY that `make(path)` writes, made only where it is missing.

    Those of other keys are removed: they were made from what is no more.
    """
    path = BUILT / f"{name}-{key}"
    if not path.exists():
        with locked(name):
            if not path.exists():  # another process may have made it meanwhile
                partial = path.with_name(f"{path.name}.partial")
                make(partial)
                for stale in BUILT.glob(f"{name}-*"):
                    if stale != partial:
                        stale.unlink()
                partial.rename(path)
    return path


def cached_json(name: str, key: str, make: Callable[[], Any]) -> Any:
    """What `make()` gave, as JSON keeps it."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(make()))

    return json.loads(cached(name, key, write).read_text())


def _headers(folders: Sequence[Path]) -> list[Path]:
    return [header for folder in folders for header in sorted(folder.rglob("*.h"))]


def shared_library(source: Path, flags: Sequence[str] = (), include: Sequence[Path] = ()) -> Path:
    """A C++ file as a shared library. include: folders of this repository."""
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags]
    command += [argument for folder in include for argument in ("-I", str(folder))]

    def make(path: Path) -> None:
        subprocess.run([*command, str(source), "-o", str(path)], check=True)

    return cached(source.stem, digest(command, source, *_headers(include)), make)


def fake_cuda_library() -> Path:
    source = HERE / "cuda" / "fake_cuda.cpp"
    return shared_library(source, ["-O2"], [REPOSITORY / "include", source.parent])


def fake_nvtx_library() -> Path:
    """Skips the test where the headers are not installed."""
    if not (NVIDIA_HEADERS / "nvtx3").is_dir():
        pytest.skip(
            f"the nvidia-nvtx package is not installed: expected {NVIDIA_HEADERS / 'nvtx3'}"
        )
    return shared_library(HERE / "cuda" / "fake_nvtx.cpp", ["-isystem", str(NVIDIA_HEADERS)])


def kernel_sources() -> str:
    """Hash of everything that any GPU kernel is compiled from."""
    triton = pytest.importorskip(
        "triton", reason="triton compiles the GPU kernels; it is not installed"
    )
    return digest(triton.__version__, *sorted((REPOSITORY / "triton_kernels").glob("*.py")))


def compiled_kernels() -> Path:
    """The GPU kernels compiled for sm_90a; only what changed is compiled again."""
    folder = REPOSITORY / "build" / "kernels"
    key = kernel_sources()
    manifest, stamp = folder / "sm_90a" / "manifest.json", BUILT / "kernels.stamp"
    with locked("kernels"):
        # The compiler says itself what is to be done, but takes seconds to say: nothing.
        known = manifest.exists() and stamp.exists()
        if not (known and stamp.read_text() == digest(key, manifest)):
            command = [sys.executable, "-m", "triton_kernels.compile", "--arch", "sm_90a"]
            subprocess.run(
                [*command, "--out", folder], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL
            )
            stamp.write_text(digest(key, manifest))
    return folder


def compilers() -> int:
    """Processes that compile at a time: a share of the cores where other workers use them too."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, (os.cpu_count() or 1) // workers)
