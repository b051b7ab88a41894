"""`liveact generate --device cuda:0` without a GPU, in a process of its own (TRITON_INTERPRET=1).

    python -m tests.support.cuda.interpreted_generate FAKE_LIBRARY KERNELS ARGUMENTS_OF_GENERATE...

The command line as a user has it, with the driver, cuBLASLt and the packaged kernels replaced by
those of interpreted_run.py. Prints which kernels ran, and how many graphs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import tests.support.kernels.interpreter as interpreter  # before any kernel
from liveact import _core
from liveact.commands import cli
from liveact.device import kernels
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.interpreted_run import _AnywhereInMemory, interpretable, run_kernel


def main() -> int:
    library, folder, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    interpreter._bounds = _AnywhereInMemory()
    interpreter.without_overflow_checks()
    fake = FakeCuda(Path(library))
    fake.set_hook(run_kernel)
    images = fake.images(interpretable(Path(folder)))
    open_cuda = _core.open_cuda

    def open_fake(index: int, images: list[_core.KernelImage], **_: str) -> _core.Device:
        return open_cuda(index, images, fake.path, fake.path)

    _core.open_cuda = open_fake
    _core.cuda_architecture = lambda index: "sm_90a"
    kernels.available = lambda directory=None: ["sm_90a"]
    kernels.load = lambda architecture, directory=None: images
    code = cli.main(["generate", "--device", "cuda:0", *arguments])
    log = fake.log()
    print("graphs", sum(line.startswith("cuGraphLaunch") for line in log))
    print(
        "launched", *sorted({line.split()[1] for line in log if line.startswith("cuLaunchKernel ")})
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
