"""Builds of the runtime without Python, by CMake: incremental, in build/tests.

From nothing one takes about a minute and a half on two idle cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import scipy_openblas32

from tests.support.builds import locked
from tests.support.paths import BUILT, REPOSITORY

# One thread of the compiler per core, up to this: each takes some 500 MB under the sanitizers.
MAX_JOBS = 4
TIMEOUT_S = 1800  # a build from nothing beside others that use the cores
RELEASE = BUILT / "core"  # a static runtime, its unit tests, the SDK made of it
SANITIZED = BUILT / "sanitize"


def environment() -> dict[str, str]:
    """Where the tools of the Python packages are found first, and as many threads as CPUs."""
    scripts = sysconfig.get_path("scripts")
    path = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    # Some cases are about what is divided between threads.
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return {**inherited, "PATH": path}


def run(command: list[str | Path], **variables: str) -> str:
    """Standard output and error of a command that must succeed. variables: of its environment."""
    tools = environment() | variables
    executable = shutil.which(command[0], path=tools["PATH"])
    assert executable, f"expected {command[0]} among the development dependencies, found none"
    result = subprocess.run(
        [executable, *command[1:]],
        env=tools,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    if result.returncode != 0:
        pytest.fail(f"{command[0]}: exit code {result.returncode}\n{result.stdout}", pytrace=False)
    return result.stdout


def build(folder: Path, *targets: str) -> Path:
    """Builds targets in RELEASE or SANITIZED and gives that folder."""
    sanitize = folder == SANITIZED
    library = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*"))
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo" if sanitize else "Release",
        "LIVEACT_PYTHON": "OFF",
        "LIVEACT_TESTS": "ON",
        "LIVEACT_SANITIZE": "ON" if sanitize else "OFF",
        "LIVEACT_OPENBLAS_INCLUDE": scipy_openblas32.get_include_dir(),
        "LIVEACT_OPENBLAS_LIBRARY": library,
    }
    for nvtx in Path(sysconfig.get_path("purelib")).glob("nvidia/*/include/nvtx3"):
        options["LIVEACT_NVTX_INCLUDE"] = nvtx.parent
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    jobs = min(MAX_JOBS, os.cpu_count() or 1)
    with locked(folder.name):
        run(["cmake", "-G", "Ninja", "-S", REPOSITORY, "-B", folder, *definitions])
        run(["cmake", "--build", folder, "--target", *targets, "--parallel", str(jobs)])
    return folder
