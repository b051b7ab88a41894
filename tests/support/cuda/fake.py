"""The stand-in for libcuda and libcublasLt, and its controls."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liveact import _core
from tests.support.builds import fake_cuda_library
from tests.support.kernels.manifest import write_named_kernels

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
        self._library.fake_trace.restype = ctypes.c_char_p
        self._library.fake_fault.restype = ctypes.c_char_p
        self._library.fake_waiting.restype = ctypes.c_long
        self._library.fake_calls.restype = ctypes.c_long
        self._library.fake_call.restype = ctypes.c_char_p
        self._library.fake_hung.restype = ctypes.c_long
        self._library.fake_digest.restype = ctypes.c_size_t
        self._library.fake_live.restype = ctypes.c_char_p
        self._hook: Any = None
        self._interruptions: list[Any] = []

    @classmethod
    def copy_into(cls, folder: Path) -> FakeCuda:
        """A copy of its own: what a test sets or breaks is of no concern to another."""
        path = folder / "libfake_cuda.so"
        shutil.copy(fake_cuda_library(), path)
        return cls(path)

    def images(self, kernels: list[dict[str, Any]]) -> list[_core.KernelImage]:
        """The kernels of a manifest with their names as cubins, their parameters declared."""
        for kernel in kernels:
            letters = "".join(
                "p" if p["type"][0] == "*" else "i" if p["type"] == "i32" else "f"
                for p in kernel["parameters"]
            )
            self._library.fake_declare(kernel["name"].encode(), letters.encode())
        with tempfile.TemporaryDirectory() as folder:
            write_named_kernels(Path(folder), kernels)
            return _core.load_kernels(Path(folder), "sm_90a")

    def log(self) -> list[str]:
        """The calls since the last `clear`, a line each."""
        return list(self._library.fake_log().decode().splitlines())

    def clear(self) -> None:
        self._library.fake_clear()

    def fail(self, call: str, code: int) -> None:
        """The next `call` returns this code; `cuLaunchKernel NAME` means a kernel."""
        self._library.fake_fail(call.encode(), code)

    def fail_after(self, calls: int, code: int) -> None:
        """The call after that many others returns this code; a negative number: none does."""
        self._library.fake_fail_after(ctypes.c_long(calls), code)

    def interrupt_after(self, calls: int, action: Callable[[], None]) -> None:
        """In the middle of the call after that many others this happens."""
        self._interruptions = [INTERRUPTION(action)]
        self._library.fake_interrupt_after(ctypes.c_long(calls), self._interruptions[-1])

    def lose_after(self, calls: int) -> None:
        """The device of the call after that many others is lost in it: what is on its queues never
        runs, and every call returns CUDA_ERROR_LAUNCH_FAILED from then on."""
        self._library.fake_lose_after(ctypes.c_long(calls))

    def lose_after_work(self, pieces: int) -> None:
        """The device of the piece of work after that many others is lost, as above."""
        self._library.fake_lose_after_work(ctypes.c_long(pieces))

    def recover(self) -> None:
        """All devices work again; nothing fails that was to."""
        self._library.fake_recover()

    def set_multiplies(self, on: bool) -> None:
        """False: products leave their result as it is, which saves nearly all of the time."""
        self._library.fake_multiplies(int(on))

    def brief(self, on: bool = True) -> None:
        """Calls are counted and digested from now on; log and trace are left out."""
        self._library.fake_brief(int(on))

    def calls(self) -> int:
        """How many came since `brief`."""
        return int(self._library.fake_calls())

    def call(self, index: int) -> str:
        """The name of one of them."""
        return str(self._library.fake_call(ctypes.c_long(index)).decode())

    def digest(self, call: int) -> int:
        """Of all calls since `brief` up to this one, their arguments and order. Where memory lies
        does not matter."""
        return int(self._library.fake_digest(ctypes.c_long(call)))

    def hung(self) -> int:
        """How often somebody began to wait for work that would never have run."""
        return int(self._library.fake_hung())

    def live(self) -> dict[str, int]:
        """How many of each kind of thing were made and not destroyed."""
        lines = self._library.fake_live().decode().splitlines()
        return {kind: int(count) for kind, count in (line.rsplit(" ", 1) for line in lines)}

    def interleave(self, seed: int) -> None:
        """Work runs only while somebody waits, one piece at a time of a queue that is drawn; 0: at
        once again."""
        self._library.fake_interleave(seed)

    def set_link(self, access: bool = True, atomics: bool = True) -> None:
        """What the devices say of the link between them."""
        self._library.fake_link(int(access), int(atomics))

    def set_name(self, device: int, name: str = "Fake H200") -> None:
        self._library.fake_name(device, name.encode())

    def trace(self) -> list[str]:
        """What ran since the last call: `DEVICE product`, or `DEVICE KERNEL` and, for each of its
        parameters, the device whose memory it points to, or -."""
        return list(self._library.fake_trace().decode().splitlines())

    def waiting(self) -> int:
        """Pieces of work on any queue that have not run."""
        return int(self._library.fake_waiting())

    def fault(self) -> str:
        """The first launch with an address that its device cannot reach; empty: none."""
        return str(self._library.fake_fault().decode())

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
