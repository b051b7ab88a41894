"""What the JSON of every benchmark has. A result that lacks something is not written.

A specification is a type, a tuple of types, a dict (these keys and maybe more), a one-element list
(a list of such items) or None (the value null). FIELDS is what `python -m benchmarks` puts round
every result; a benchmark adds a FIELDS of its own.
"""

from __future__ import annotations

import json
from typing import Any

from liveact.errors import LiveActError

VERSION = 1
_TEXT = (str, type(None))

FIELDS: dict[str, Any] = {
    "schema": int,
    "benchmark": str,
    "command": str,
    "timed": str,  # what the clock runs for ...
    "not_timed": str,  # ... and what it does not
    "device": str,
    "precision": _TEXT,
    "sizes": dict,
    "memory_policy": (dict, type(None)),
    "weights": (dict, type(None)),  # source and sha256
    "seed": int,
    "repeat": int,
    "machine": {
        "date": str,
        "cpu": str,
        "cores": int,
        "threads": int,
        "platform": str,
        "python": str,
        "commit": _TEXT,
        "versions": {"torch": str, "triton": _TEXT, "liveact-engine": _TEXT, "cuda": _TEXT},
    },
    "gpu": (dict, type(None)),  # telemetry.FIELDS; null where the device is the CPU
}


def check(value: Any, fields: Any, where: str = "result") -> None:
    """Raises LiveActError that names the first place where `value` is not as specified."""
    if isinstance(fields, dict):
        _expect(isinstance(value, dict), where, "an object", value)
        for key, field in fields.items():
            _expect(key in value, f"{where}.{key}", "a value", "none")
            check(value[key], field, f"{where}.{key}")
    elif isinstance(fields, list):
        _expect(isinstance(value, list), where, "a list", value)
        for index, item in enumerate(value):
            check(item, fields[0], f"{where}[{index}]")
    else:
        types = fields if isinstance(fields, tuple) else (fields,)
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        fits = fits or (float in types and type(value) is int)  # 3 is a fine number of ms
        _expect(fits, where, " or ".join(t.__name__ for t in types), value)


def to_json(result: dict[str, Any]) -> str:
    """The text of a file. Raises LiveActError for NaN and infinities, which are no JSON."""
    try:
        return json.dumps(result, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise LiveActError(f"result: expected finite numbers, found that {error}") from None


def _expect(condition: bool, where: str, expected: str, found: Any) -> None:
    if not condition:
        raise LiveActError(f"{where}: expected {expected}, found {found!r:.60}")
