"""Launches compiled attention kernels through the CUDA driver, without torch's CUDA.

As the runtime does it: a module from a cubin, parameters in the order of the ABI, two null hidden
pointers at the end. `python -m tests.support.kernels.attention_gpu` times
the kernels at the released model's sizes; with names behind it only those.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from tests.support.kernels.attention_cases import HEAD_DIM, Segment, SelfAttention, make
from tests.support.kernels.attention_compile import SPECS, compile_kernel

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def _check(result: int, call: str) -> None:
    if result != 0:
        raise RuntimeError(f"{call}: CUDA driver error {result}")


@cache
def driver() -> Any:
    """libcuda with the context of device 0 current, or None where there is no device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if cuda.cuInit(0) != 0:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(cuda.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    _check(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    return cuda


def architecture() -> str | None:
    """The architecture to compile for, e.g. sm_90a; None without a device."""
    cuda = driver()
    if cuda is None:
        return None
    numbers = []
    for attribute in COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        _check(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0), "cuDeviceGetAttribute")
        numbers.append(value.value)
    major, minor = numbers
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@contextmanager
def on_device(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, int]]:
    """Copies of the tensors in device memory, as addresses; freed at the end."""
    cuda = driver()
    assert cuda is not None, "expected a CUDA device"
    addresses: dict[str, int] = {}
    try:
        for name, tensor in tensors.items():
            address = ctypes.c_uint64()
            size = max(tensor.nbytes, 16)  # a context without tokens has no bytes
            _check(cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)), "cuMemAlloc")
            addresses[name] = address.value
            host, nbytes = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
            if tensor.nbytes:
                _check(cuda.cuMemcpyHtoD_v2(address, host, nbytes), "cuMemcpyHtoD")
        yield addresses
    finally:
        for value in addresses.values():
            cuda.cuMemFree_v2(ctypes.c_uint64(value))


class Launcher:
    """A kernel with its arguments in place, ready to be launched repeatedly."""

    def __init__(self, name: str, arch: str, values: dict[str, Any]) -> None:
        """values: an address per pointer parameter, a number per scalar."""
        self._cuda = driver()
        assert self._cuda is not None, "expected a CUDA device"
        spec, self._kernel = SPECS[name], compile_kernel(name, arch)
        self._grid = spec.grid_for(values, arch)
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        image = ctypes.c_char_p(self._kernel.cubin)
        _check(self._cuda.cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
        symbol = self._kernel.symbol.encode()
        result = self._cuda.cuModuleGetFunction(ctypes.byref(self._function), module, symbol)
        _check(result, "cuModuleGetFunction")
        result = self._cuda.cuFuncSetAttribute(
            self._function, MAX_DYNAMIC_SHARED_BYTES, self._kernel.shared_bytes
        )
        _check(result, "cuFuncSetAttribute")
        c_types: dict[str, Any] = {"i32": ctypes.c_int32, "f32": ctypes.c_float}
        self._values = [c_types.get(p.type, ctypes.c_uint64)(values[p.name]) for p in spec.abi()]
        self._values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # the hidden parameters
        self._pointers = (ctypes.c_void_p * len(self._values))(
            *(ctypes.addressof(value) for value in self._values)
        )

    def launch(self) -> None:
        threads, shared = self._kernel.threads, self._kernel.shared_bytes
        result = self._cuda.cuLaunchKernel(
            self._function, *self._grid, threads, 1, 1, shared, None, self._pointers, None
        )
        _check(result, "cuLaunchKernel")

    def wait(self) -> None:
        _check(self._cuda.cuCtxSynchronize(), "cuCtxSynchronize")

    def time_ms(self, launches: int) -> float:
        """Mean time of a launch, by events around `launches` of them."""
        start, end, elapsed = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (start, end):
            _check(self._cuda.cuEventCreate(ctypes.byref(event), 0), "cuEventCreate")
        _check(self._cuda.cuEventRecord(start, None), "cuEventRecord")
        for _ in range(launches):
            self.launch()
        _check(self._cuda.cuEventRecord(end, None), "cuEventRecord")
        _check(self._cuda.cuEventSynchronize(end), "cuEventSynchronize")
        result = self._cuda.cuEventElapsedTime(ctypes.byref(elapsed), start, end)
        _check(result, "cuEventElapsedTime")
        return elapsed.value / launches


def run(name: str, arch: str, arguments: dict[str, Any]) -> torch.Tensor:
    """Launches once; returns `out`, NaN where the kernel wrote nothing. `out_scale` is written in
    place."""
    results = [arguments[name] for name in ("out", "out_scale")]
    for result in results:
        result.fill_(float("nan"))
    tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    with on_device(tensors) as addresses:
        launcher = Launcher(name, arch, arguments | addresses)
        launcher.launch()
        launcher.wait()
        for name, result in zip(("out", "out_scale"), results, strict=True):
            host, size = ctypes.c_void_p(result.data_ptr()), ctypes.c_size_t(result.nbytes)
            source = ctypes.c_uint64(addresses[name])
            _check(driver().cuMemcpyDtoH_v2(host, source, size), "cuMemcpyDtoH")
    out: torch.Tensor = arguments["out"]
    return out


DRAWN_HEADS = 4  # the others repeat them: one CPU thread quantises


def released_size(f8: bool, frame_tokens: int, heads: int = 40) -> SelfAttention:
    """A steady block of the released model: 8 latent frames of queries, 6 + 8 of keys."""
    generator = torch.Generator().manual_seed(0)
    drawn = min(heads, DRAWN_HEADS)

    def normal(frames: int) -> torch.Tensor:
        return torch.randn(drawn, frames * frame_tokens, HEAD_DIM, generator=generator)

    case = make(normal(8), (normal(6), normal(6)), (normal(8), normal(8)), f8)
    index = torch.arange(heads) % drawn

    def repeated(x: torch.Tensor) -> torch.Tensor:
        as_bytes = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
        return as_bytes[index].view(x.dtype)

    def segment(part: Segment) -> Segment:
        return Segment(repeated(part.k), repeated(part.v))

    context, current = segment(case.context), segment(case.current)
    q, q_scale = repeated(case.q), repeated(case.q_scale)
    k_scale, v_scale = repeated(case.k_scale), repeated(case.v_scale)
    return SelfAttention(q, q_scale, context, current, k_scale, v_scale)


def main() -> None:
    arch = architecture()
    if arch is None:
        raise SystemExit("expected a CUDA device, found none")
    known = [name for name in SPECS if name.startswith("self_attention")]
    names = sys.argv[1:] or known
    if unknown := set(names) - set(known):
        raise SystemExit(f"expected names of {known}, found {sorted(unknown)}")
    for frame_tokens in (1024, 1170):
        for name in names:
            arguments = released_size(".f8" in name, frame_tokens).arguments()
            tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor)}
            with on_device(tensors) as addresses:
                launcher = Launcher(name, arch, arguments | addresses)
                launcher.time_ms(5)  # clocks and caches settle
                times = sorted(launcher.time_ms(10) for _ in range(10))
            keys = arguments["context_tokens"] + arguments["current_tokens"]
            flop = 4 * arguments["tokens"] * keys * HEAD_DIM * arguments["heads"]
            median = statistics.median(times)
            spread = f"{times[0]:.3f} .. {times[-1]:.3f}"
            rate = f"{flop / median / 1e9:.0f} TFLOP/s"
            print(f"{name} F={frame_tokens}: median {median:.3f} ms ({spread}), {rate}")


if __name__ == "__main__":
    main()
