"""Tests of the kernels under Triton's interpreter, which must be chosen before triton is imported:
they run in a process of their own, started by tests/kernels/test_interpreted.py."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
