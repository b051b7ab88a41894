"""LiveAct engine: a portrait, live speech and a prompt in; lip-synced video out, in real time.

`Engine` holds a loaded checkpoint, `Session` one speaking portrait, `Chunk` what comes out of it.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from liveact.errors import BacklogFull, DeviceError, InputError, LiveActError, SessionError

if TYPE_CHECKING:
    from liveact.engine import Engine
    from liveact.session.chunk import Chunk, Interruption
    from liveact.session.session import Session

if "torch" not in sys.modules:
    # Its threads (encoders and VAE on a CPU) are to sleep while they wait, as those of the runtime
    # do: spinning, they take a core from whatever else runs. Read once, when torch is imported; a
    # choice of the user stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("liveact-engine")
__all__ = [
    "BacklogFull",
    "Chunk",
    "DeviceError",
    "Engine",
    "InputError",
    "Interruption",
    "LiveActError",
    "Session",
    "SessionError",
]

_LAZY = {
    "Engine": "liveact.engine",
    "Session": "liveact.session.session",
    "Chunk": "liveact.session.chunk",
    "Interruption": "liveact.session.chunk",
}


def __getattr__(name: str) -> Any:
    """torch and the encoders are imported when first needed, not by `import liveact`."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'liveact' has no attribute {name!r}")
