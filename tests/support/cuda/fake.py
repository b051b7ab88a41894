"""The stand-in for libcuda and libcublasLt, and its controls."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.builds import fake_cuda_library

KERNEL_MS = 0.25  # what the device's clock says that a kernel took

# kernel name, addresses of its parameters, grid
HOOK = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
)


INTERRUPTION = ctypes.CFUNCTYPE(None)


class FakeCuda:
    """One copy of the library (its state is per copy), as the runtime and the test see it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.fake_log.restype = ctypes.c_char_p
        self._library.fake_live_allocations.restype = ctypes.c_long
        self._library.fake_live_events.restype = ctypes.c_long
        self._library.fake_seal.restype = ctypes.c_void_p
        self._library.fake_contents.restype = ctypes.c_char_p
        self._library.fake_busy_frees.restype = ctypes.c_long
        self._hook: Any = None
        self._interruptions: list[Any] = []

    @classmethod
    def copy_into(cls, folder: Path) -> FakeCuda:
        """A copy of its own: what a test sets or breaks is of no concern to another."""
        path = folder / "libfake_cuda.so"
        shutil.copy(fake_cuda_library(), path)
        return cls(path)

    def images(self, kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The kernels with their names as cubins, and their parameters declared."""
        for kernel in kernels:
            letters = "".join(
                "p" if p["type"][0] == "*" else "i" if p["type"] == "i32" else "f"
                for p in kernel["parameters"]
            )
            self._library.fake_declare(kernel["name"].encode(), letters.encode())
        return [{**kernel, "cubin": kernel["name"].encode() + b"\0"} for kernel in kernels]

    def log(self) -> list[str]:
        """The calls since the last `clear`, a line each."""
        return list(self._library.fake_log().decode().splitlines())

    def clear(self) -> None:
        self._library.fake_clear()

    def fail(self, call: str, code: int) -> None:
        """The next `call` returns this code; `cuLaunchKernel NAME` means a kernel."""
        self._library.fake_fail(call.encode(), code)

    def live_allocations(self) -> int:
        return int(self._library.fake_live_allocations())

    def live_events(self) -> int:
        return int(self._library.fake_live_events())

    def seal(self, address: int, num_bytes: int) -> int:
        """The address of a copy that only copies of this driver may read, as device memory."""
        size = ctypes.c_size_t(num_bytes)
        return int(self._library.fake_seal(ctypes.c_void_p(address), size))

    def contents(self) -> list[str]:
        """A hash of each live allocation, sorted."""
        return list(self._library.fake_contents().decode().split())

    def set_free_memory(self, num_bytes: int = 2**40) -> None:
        self._library.fake_free_memory(ctypes.c_size_t(num_bytes))

    def set_algorithms(self, ms: list[float]) -> None:
        """What cuBLASLt suggests: algorithm i takes ms[(i + N // 16) % len(ms)] for N outputs."""
        self._library.fake_algorithms((ctypes.c_double * len(ms))(*ms), len(ms))

    def set_hook(self, hook: Callable[..., None]) -> None:
        """Runs for every launch, also of a graph."""
        self._hook = HOOK(hook)
        self._library.fake_hook(self._hook)

    def set_kernel_ms(self, kernel: str, ms: float) -> None:
        """How long this kernel takes; others take KERNEL_MS."""
        self._library.fake_kernel_ms(kernel.encode(), ctypes.c_double(ms))

    def separate_residuals(self, separate: bool = True) -> None:
        """Whether cuBLASLt refuses fp8 products with a bias and beta = 1 when they run."""
        self._library.fake_separate_residuals(int(separate))

    def interrupt(self, call: str, action: Callable[[], None]) -> None:
        """In the middle of the next `call` this happens; `cuLaunchKernel NAME` means a kernel."""
        self._interruptions.append(INTERRUPTION(action))
        self._library.fake_interrupt(call.encode(), self._interruptions[-1])

    def busy_frees(self) -> int:
        """How often memory was freed while work was under way that nobody had waited for."""
        return int(self._library.fake_busy_frees())
