r"""The CUDA backend end to end without a GPU, in a process of its own (TRITON_INTERPRET=1).

    python -m tests.support.cuda.interpreted_run \
        FAKE_LIBRARY KERNELS PRECISION BLOCKS GUIDANCE cpu|two OUT

A tiny DiT runs on the real runtime, launcher, manifest and graphs; the fake driver does the copies
and products, and hands every launch to Triton's interpreter with the addresses it was given. Writes
the velocities of the CUDA backend and, beside it, of the CPU backend in the same precision and in
fp32 (`cpu`) or of the CUDA backend on two devices, whose queues take turns as drawn (`two`).
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import tests.support.kernels.interpreter as interpreter  # before any kernel
from liveact import _core
from liveact.dit.dit import Dit, MemoryPolicy
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import AUDIO_DIM, IMAGE_DIM, core_config, random_weights
from tests.support.kernels.manifest import read_manifest
from triton_kernels.registry import all_specs

# F = 4 tokens per latent frame: no multiple of 5 or of any tile, and few rows, which is what the
# interpreter's time goes by.
LATENT = (4, 4)
TYPES = {
    "*f8": torch.float8_e4m3fn,
    "*bf16": torch.bfloat16,
    "*f32": torch.float32,
    "*i32": torch.int32,
    "*i64": torch.int64,
}


class _AnywhereInMemory:
    """The runtime's buffers are raw addresses, so there are no tensors to stay inside of."""

    def check(self, *_: object) -> None:
        pass


def _tensor_at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that starts at an address; only its pointer is used. Null: one nobody reads."""
    if not address:
        return torch.zeros(1, dtype=dtype)
    memory = (ctypes.c_uint8 * 16).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


def run_kernel(name: bytes, parameters: list[int], x: int, y: int, z: int) -> None:
    """What the fake driver calls for a launch."""
    try:
        spec = all_specs()[name.decode()]
        arguments: dict[str, object] = {}
        for i, (parameter, promised) in enumerate(spec.parameters.items()):
            kind = promised.split(":")[0]
            if kind in TYPES:
                address = ctypes.c_uint64.from_address(parameters[i]).value
                arguments[parameter] = _tensor_at(address, TYPES[kind])
            elif kind == "i32":
                arguments[parameter] = ctypes.c_int32.from_address(parameters[i]).value
            else:
                arguments[parameter] = ctypes.c_float.from_address(parameters[i]).value
        tiles = spec.launch_for("sm_90a").constexprs
        spec.function[(x, y, z)](**arguments, **spec.constexprs, **tiles)
    except BaseException:  # an exception cannot pass through the C frames above
        traceback.print_exc()
        os._exit(1)


def interpretable(folder: Path) -> list[dict[str, Any]]:
    """The compiled kernels but for those in Gluon, which the interpreter does not know;
    tests/kernels/attention/test_attention_gpu.py compares those with the others."""
    known = read_manifest("sm_90a", folder)
    return [kernel for kernel in known if not all_specs()[kernel["name"]].is_gluon]


def velocities(
    devices: Sequence[_core.Device], precision: str, blocks: int, guidance: float
) -> dict[str, torch.Tensor]:
    """`velocity.B` [3, 16, n, h, w] of every block, and the context of the last step."""
    generator = torch.Generator().manual_seed(0)
    stream = Dit(devices, core_config(1), random_weights(1), precision).open_stream(
        LATENT, MemoryPolicy(), guidance, 2
    )
    stream.set_image(
        torch.randn(2, IMAGE_DIM, generator=generator),
        torch.randn(20, 14, *LATENT, generator=generator),
    )
    stream.set_prompt(torch.randn(3, 64, generator=generator))
    results = {}
    for block in range(blocks):
        n = stream.frames_of_next_block
        noise = torch.randn(3, 16, n, *LATENT, generator=generator)
        audio = torch.randn(stream.audio_rows_of_next_block, AUDIO_DIM, generator=generator)
        found = np.zeros((3, 16, n, *LATENT), np.float32)
        stream.denoise(noise[0], noise[1:], audio, velocities=found)
        results[f"velocity.{block}"] = torch.from_numpy(found)
        print(f"{[d.name for d in devices]} {precision}: block {block}", flush=True)
    results["context_k"], results["context_v"] = stream.export_context(2, 0)
    return results


def main() -> None:
    library, folder, precision, blocks, guidance, beside, out = sys.argv[1:]
    torch.set_num_threads(1)
    interpreter._bounds = _AnywhereInMemory()
    interpreter.without_overflow_checks()
    fake = FakeCuda(Path(library))
    fake.set_hook(run_kernel)
    images = fake.images(interpretable(Path(folder)))
    cuda = [_core.open_cuda(index, images, fake.path, fake.path) for index in (0, 1)]
    compared = {"cpu": ([_core.open_cpu()], precision), "fp32": ([_core.open_cpu()], "fp32")}
    if beside == "two":
        fake.interleave(1)
        compared = {"two": (cuda, precision)}
    results = {}
    for label, (devices, chosen) in {"cuda": (cuda[:1], precision), **compared}.items():
        for name, tensor in velocities(devices, chosen, int(blocks), float(guidance)).items():
            results[f"{label}.{name}"] = tensor.contiguous()
    launched = {line.split()[1] for line in fake.log() if line.startswith("cuLaunchKernel ")}
    graphs = sum(line.startswith("cuGraphLaunch") for line in fake.log())
    save_file(results, out, metadata={"launched": ",".join(launched), "graphs": str(graphs)})


if __name__ == "__main__":
    main()
