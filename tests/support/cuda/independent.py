"""Kernels launched straight from the manifest, without our launcher: to compare the two.

What triton_kernels/README.md says of the ABI, stated a second time. `pack` and `grid_of` need no
GPU; `run` launches through NVIDIA's own Python bindings.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch

ELEMENTS = 1 << 22  # of every buffer: more than any index that SIZES lead to
_FRAME_ROWS, _FRAME_COLS, _FRAMES, _HEADS = 3, 4, 8, 2
_TOKENS = _FRAME_ROWS * _FRAME_COLS * _FRAMES
# A value for each scalar of any kernel, by its name: a block of 8 latent frames of 12 tokens after
# a context of 6. Numbers of rows are no multiple of a tile, so that edges are part of it.
SIZES: dict[str, int | float] = {
    "rows": _TOKENS + 1,
    "tokens": _TOKENS,
    "first_token": 0,
    "end_token": 128,
    "out_rows": _TOKENS,
    "lower_heads": _HEADS,
    "tap_channels": 128 * _HEADS,
    "all_heads": _HEADS,
    "size": 6144,
    "cols": 1280,
    "heads": _HEADS,
    "frames": _FRAMES,
    "kv_frames": _FRAMES,
    "frame_rows": _FRAME_ROWS * _FRAME_COLS,
    "frame_tokens": _FRAME_ROWS * _FRAME_COLS,
    "grid_cols": _FRAME_COLS,
    "first_position": 6,
    "context_tokens": 72,
    "current_tokens": _TOKENS,
    **dict.fromkeys(("v_stride", "context_v_stride", "current_v_stride"), 128),
    **dict.fromkeys(("context_stride", "current_stride"), 128),
    "first_slot": 6,
    "slot": 2,
    "target_slot": 3,
    **{f"source{i}": 2 + i for i in range(5)},
    "stride": 3 * 128 * _HEADS,
    "token_stride": 5,
    "tap_stride": 1,
    "text_tokens": 40,
    "text_keys": 39,
    "image_tokens": 17,
    "z_channels": 16,
    "y_channels": 20,
    "y_frames": 20,
    "y_first": 6,
    "channels": 16,
    "n": _FRAMES,
    "h": 2 * _FRAME_ROWS,
    "w": 2 * _FRAME_COLS,
    "height": 6,
    "width": 8,
    "eps": 1e-6,
    "guidance": 1.7,
    "sigma": 0.9375,
    "next_sigma": 0.8333,
    "pad_bias": 1.5,
}
_C_TYPES: dict[str, Any] = {"i32": ctypes.c_int32, "f32": ctypes.c_float}


def is_pointer(parameter: dict[str, Any]) -> bool:
    return bool(parameter["type"].startswith("*"))


def scalars(kernel: dict[str, Any]) -> dict[str, int | float]:
    return {p["name"]: SIZES[p["name"]] for p in kernel["parameters"] if not is_pointer(p)}


def pack(kernel: dict[str, Any], values: dict[str, int | float]) -> list[Any]:
    """The parameters of a launch as C values, in the order of the ABI, hidden ones included."""
    packed = [
        _C_TYPES.get(p["type"], ctypes.c_uint64)(values[p["name"]]) for p in kernel["parameters"]
    ]
    return packed + [ctypes.c_uint64(0) for _ in kernel["hidden_parameters"]]


def grid_of(kernel: dict[str, Any], values: dict[str, int | float]) -> tuple[int, ...]:
    def extent(factor: Any) -> int:
        if isinstance(factor, int):
            return factor
        return math.ceil(values[factor["parameter"]] / factor["divisor"])

    return tuple(math.prod(extent(factor) for factor in axis) for axis in kernel["grid"])


def buffers(kernel: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """A buffer of random numbers, none of them NaN, per pointer."""
    generator = torch.Generator().manual_seed(seed)

    def filled(name: str, kind: str) -> torch.Tensor:
        if kind in ("*f8", "*u8"):  # codes up to 0x77: 240
            return torch.randint(0, 0x78, (ELEMENTS,), generator=generator, dtype=torch.uint8)
        if kind == "*i32":
            return torch.ones(ELEMENTS, dtype=torch.int32)
        if kind == "*i64":  # counts of a barrier: a wait must find what it waits for
            return torch.full((ELEMENTS,), 2 if name == "arrived" else 1)
        values = torch.rand(ELEMENTS, generator=generator) - (0.5 if kind == "*bf16" else 0)
        return values.to(torch.bfloat16) if kind == "*bf16" else values  # fp32: also scales

    return {p["name"]: filled(p["name"], p["type"]) for p in kernel["parameters"] if is_pointer(p)}


def run(
    kernel: dict[str, Any],
    given: dict[str, torch.Tensor],
    launch: Callable[[dict[str, int | float]], None] | None = None,
) -> dict[str, torch.Tensor]:
    """What the buffers hold after one launch on the current context of device 0.

    launch: launches with the values by name; None: independently of our launcher. kernel: an entry
    of `liveact.device.kernels.load`. Raises RuntimeError with the driver's error.
    """
    from cuda.bindings import driver

    def check(result: tuple[Any, ...]) -> Any:
        if result[0] != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{kernel['name']}: {result[0]!r}")
        return result[1] if len(result) == 2 else result[1:]

    values = scalars(kernel)
    addresses: dict[str, int] = {}
    module = check(driver.cuModuleLoadData(kernel["cubin"]))
    try:
        for name, tensor in given.items():
            addresses[name] = int(check(driver.cuMemAlloc(tensor.nbytes)))
            check(driver.cuMemcpyHtoD(addresses[name], tensor.data_ptr(), tensor.nbytes))
        if launch is not None:
            launch(values | addresses)
        else:
            function = check(driver.cuModuleGetFunction(module, kernel["symbol"].encode()))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(function, attribute, kernel["shared_bytes"]))
            packed = pack(kernel, values | addresses)
            pointers = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
            block, shared = (kernel["threads"], 1, 1), kernel["shared_bytes"]
            grid = grid_of(kernel, values)
            parameters = ctypes.addressof(pointers)
            check(driver.cuLaunchKernel(function, *grid, *block, shared, 0, parameters, 0))
        check(driver.cuCtxSynchronize())
        results = {name: torch.empty_like(tensor) for name, tensor in given.items()}
        for name, tensor in results.items():
            check(driver.cuMemcpyDtoH(tensor.data_ptr(), addresses[name], tensor.nbytes))
        return results
    finally:
        for address in addresses.values():
            driver.cuMemFree(address)
        driver.cuModuleUnload(module)
