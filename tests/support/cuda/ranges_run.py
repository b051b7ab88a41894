"""Four blocks under a profiler, in a process of its own: NVTX looks for one once per process.

    python -m tests.support.cuda.ranges_run FAKE_LIBRARY KERNELS [PROFILER]

Prints as JSON which libraries were loaded by it, and what PROFILER (fake_nvtx.cpp) saw.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from liveact import _core
from tests.support.cuda.blocks import NUM_LAYERS, denoise, open_stream
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import random_weights
from tests.support.kernels.manifest import read_manifest


def libraries() -> set[str]:
    return {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}


def main() -> None:
    library, folder, *profilers = sys.argv[1:]
    fake = FakeCuda(Path(library))
    images = fake.images(read_manifest("sm_90a", Path(folder)))
    device = _core.open_cuda(0, images, fake.path, fake.path)
    before = libraries()
    stream = open_stream(device, random_weights(NUM_LAYERS))
    for _ in range(4):
        denoise(stream)
    result: dict[str, Any] = {"loaded": sorted(libraries() - before)}
    for path in profilers:
        profiler = ctypes.CDLL(path)
        for name in ("ranges", "other_domains"):
            function = getattr(profiler, "fake_nvtx_" + name)
            function.restype = ctypes.c_char_p
            result[name] = function().decode().splitlines()
        result["registered"] = profiler.fake_nvtx_registered()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
