"""The shell scripts of the benchmarks, with stand-ins for what they call: order, limits, errors."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"

# Says what it was called with; behaves as the environment of the test asks.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
  *"$SLOW"*) sleep 30 ;;
  *"$BROKEN"*) echo broken; exit 3 ;;
esac
while [[ $# -gt 0 ]]; do  # what writes a JSON writes one
  if [[ $1 == --json ]]; then
    echo '{"off": {"block_period_ms": {"median": 1600}, "overlap": 0.9}}' >"$2"
  fi
  shift
done
"""


@pytest.fixture
def run(tmp_path: Path):
    """run(script, *arguments, slow=, broken=) → (completed process, the calls it made)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python3", "nvidia-smi", "liveact", "nsys", "ncu"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)

    def call(
        script: str, *arguments: str, slow: str = "never", broken: str = "never", path: str = ""
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = os.environ | {
            "PATH": path or f"{folder}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "SLOW": slow,
            "BROKEN": broken,
        }
        done = subprocess.run(
            ["bash", str(BENCHMARKS / script), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_nsight_systems_records_the_window(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done, calls = run("profile_nsys.sh", str(out), "7-8", "--device", "cuda:1")
    assert done.returncode == 0, done.stderr
    without, profile = calls[0], calls[1]
    assert without.startswith("python3 -m benchmarks profile") and "--blocks" not in without
    for part in ("--cuda-graph-trace=node", "--capture-range=cudaProfilerApi", "--blocks 7-8"):
        assert part in profile
    assert without.endswith("--device cuda:1") and profile.endswith("--device cuda:1")
    assert json.loads((out / "without.json").read_text())


def test_nsight_compute_takes_one_layer(run, tmp_path: Path) -> None:
    done, calls = run("profile_ncu.sh", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "--nvtx-include liveact@block 1/step 1/layer 12/" in calls[0]
    assert "--profile-from-start off" in calls[0] and "--blocks 0-1" in calls[0]


@pytest.mark.parametrize(
    ("script", "tool"), [("profile_nsys.sh", "nsys"), ("profile_ncu.sh", "ncu")]
)
def test_missing_tools_are_named(run, tmp_path: Path, script: str, tool: str) -> None:
    done, _ = run(script, str(tmp_path), path="/usr/bin:/bin")
    assert done.returncode == 2 and f"expected {tool}" in done.stderr
    done, _ = run(script)
    assert done.returncode != 0 and "usage: benchmarks/" in done.stderr
