"""Installed trees of the runtime, programs that others build with them, and what they are fed."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from liveact import _core
from liveact.dit.dit import Dit
from tests.support.core_builds import RELEASE, build, run
from tests.support.paths import REPOSITORY
from tests.support.pipeline import demo_checkpoint

EMBED = REPOSITORY / "examples" / "embed"
PYTHON_BUILD = REPOSITORY / "build" / f"python-{sys.implementation.cache_tag}"
SIZE = 32  # of the picture
BLOCKS = 3
FILES = ("prompt", "portrait", "condition", "audio", "noise")


def install(prefix: Path, *, shared: bool) -> Path:
    """The runtime as a user installs it: the shared one of the Python build, or the static one."""
    if shared:
        run(["cmake", "--build", PYTHON_BUILD, "--target", "liveact"])
    else:
        build(RELEASE, "liveact")
    folder = PYTHON_BUILD if shared else RELEASE
    run(["cmake", "--install", folder, "--prefix", prefix, "--component", "sdk"])
    return prefix


@functools.cache
def shared_library() -> ctypes.CDLL:
    """The C interface in this process. Its copy of the runtime is not that of liveact._core."""
    run(["cmake", "--build", PYTHON_BUILD, "--target", "liveact"])
    library = ctypes.CDLL(str(PYTHON_BUILD / "libliveact.so"))
    for name in ("liveact_last_error", "liveact_version", "liveact_device_name"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("liveact_device_bytes", "liveact_stream_bytes"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def features() -> dict[str, list[torch.Tensor]]:
    """What encoders would make for BLOCKS blocks of the demo checkpoint, by the file's name."""
    dit = Dit.load(demo_checkpoint(), _core.open_cpu())
    config, side = dit.config, SIZE // 8
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    stream = dit.open_stream((side, side))
    clock = stream.clock
    noise, audio = [], []
    for block in range(BLOCKS):
        n = clock.latent_frames(block)
        noise.append(drawn(3, config.out_dim, n, side, side))
        audio.append(drawn(4 * n + (1 if block == 0 else 4), config.audio_dim))
    return {
        "prompt": [drawn(7, config.text_dim)],
        "portrait": [drawn(257, config.image_dim)],
        "condition": [drawn(config.in_dim - config.out_dim, 14, side, side)],
        "audio": audio,
        "noise": noise,
    }


def write_features(folder: Path, given: dict[str, list[torch.Tensor]]) -> Path:
    """The folder that examples/embed/embed.cpp describes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in given.items():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        flat.numpy().astype("<f4").tofile(folder / f"{name}.f32")
    return folder


def latents_of_python(given: dict[str, list[torch.Tensor]]) -> np.ndarray:
    """What Python makes of it, with the precision that a CPU has by default."""
    side = SIZE // 8
    stream = Dit.load(demo_checkpoint(), _core.open_cpu()).open_stream((side, side))
    stream.set_prompt(given["prompt"][0])
    stream.set_image(given["portrait"][0], given["condition"][0])
    blocks = [
        stream.denoise(noise[0], noise[1:], audio).flatten()
        for noise, audio in zip(given["noise"], given["audio"], strict=True)
    ]
    return torch.cat(blocks).numpy()


def embed(program: Path, folder: Path, *, library_path: Path | None = None) -> np.ndarray:
    """The latents that a consumer writes, with as many threads as this process has."""
    variables = {n: os.environ[n] for n in ("OMP_NUM_THREADS",) if n in os.environ}
    if library_path:
        variables["LD_LIBRARY_PATH"] = str(library_path)
    arguments = [demo_checkpoint(), folder, str(SIZE), str(SIZE), str(BLOCKS)]
    output = run([program, *arguments], **variables)
    assert output.startswith(f"cpu: {BLOCKS} blocks, "), output
    return np.fromfile(folder / "latents.f32", "<f4")


def pkg_config(prefix: Path, *arguments: str) -> list[str]:
    """What pkg-config says of the installed runtime."""
    where = {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    return run(["pkg-config", *arguments, "liveact"], **where).split()


def exported(library: Path) -> list[str]:
    """The names in the dynamic symbol table, sorted."""
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = {line.split()[0].partition("@")[0] for line in text.splitlines()}
    return sorted(name for name in names if not name.startswith("LIVEACT_0."))
