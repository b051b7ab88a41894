"""Builds and runs the C++ unit tests of the runtime, plainly and under sanitizers.

The builds are incremental and live in build/tests; from nothing they take about a minute and a half
on two cores.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import scipy_openblas32

from tests.support.paths import BUILT, REPOSITORY

# One thread of the compiler per core, up to this: each takes some 500 MB under the sanitizers.
MAX_JOBS = 4
TIMEOUT_S = 600


def environment() -> dict[str, str]:
    """Where the tools of the Python packages are found first, and as many threads as CPUs."""
    scripts = sysconfig.get_path("scripts")
    path = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    # Some cases are about what is divided between threads.
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return {**inherited, "PATH": path}


def run(command: list[str | Path]) -> str:
    """Standard output and error of a command that must succeed."""
    tools = environment()
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


def build(folder: Path, build_type: str, sanitize: bool) -> Path:
    """Configures and builds core_tests; gives the path of the program."""
    library = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*"))
    options = {
        "CMAKE_BUILD_TYPE": build_type,
        "LIVEACT_PYTHON": "OFF",
        "LIVEACT_TESTS": "ON",
        "LIVEACT_SANITIZE": "ON" if sanitize else "OFF",
        "LIVEACT_OPENBLAS_INCLUDE": scipy_openblas32.get_include_dir(),
        "LIVEACT_OPENBLAS_LIBRARY": library,
    }
    for nvtx in Path(sysconfig.get_path("purelib")).glob("nvidia/*/include/nvtx3"):
        options["LIVEACT_NVTX_INCLUDE"] = nvtx.parent
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    run(["cmake", "-G", "Ninja", "-S", REPOSITORY, "-B", folder, *definitions])
    jobs = min(MAX_JOBS, os.cpu_count() or 1)
    run(["cmake", "--build", folder, "--target", "core_tests", "--parallel", str(jobs)])
    return folder / "core_tests"


@pytest.mark.parametrize(
    ("folder", "build_type", "sanitize"),
    [
        pytest.param("core", "Release", False, id="release"),
        pytest.param("sanitize", "RelWithDebInfo", True, id="sanitizers", marks=pytest.mark.slow),
    ],
)
def test_core(folder: str, build_type: str, sanitize: bool) -> None:
    """Every case of csrc/tests passes; under the sanitizers also without a report or a leak."""
    output = run([build(BUILT / folder, build_type, sanitize)])
    cases = sum(
        len(re.findall(r"^TEST\(", file.read_text(), re.MULTILINE))
        for file in (REPOSITORY / "csrc" / "tests").glob("*.cpp")
    )
    assert cases > 0
    print(f"{folder}: {output.splitlines()[-1]} of {cases} cases")
    assert output.splitlines()[-1] == f"{cases} passed, 0 failed", output
