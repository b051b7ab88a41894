"""The first window on a GPU rehearsed without one: in a clean environment, from a copy of the tree.

The environment has what a bare machine for GPU work has, and what benchmarks/pack.sh brings along.
Every stage has to get to the point where it asks for a GPU, and to say so in its one line.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.stages import FIRST
from tests.support import builds
from tests.support.paths import REPOSITORY

# What such a machine has, with what these need. Not: av, cachetools, ftfy, soxr, scipy-openblas32.
# Its setuptools is the one that comes with Python, which is too old.
PRESENT = {
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "rich",
    "pygments",
    "markdown-it-py",
    "mdurl",
    "pillow",
    "pybind11",
    "cmake",
    "ninja",
    "pytest",
    "pluggy",
    "iniconfig",
    "packaging",
    "nvidia-nvtx",
    "filelock",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
    "typing-extensions",
    "matplotlib",
    "contourpy",
    "cycler",
    "fonttools",
    "kiwisolver",
    "pyparsing",
    "python-dateutil",
    "six",
    "nvidia-ml-py",
}
# No driver: of the engine, of torch, of the launcher of attention kernels.
ASKS = re.compile(
    r"no usable GPU|expected a usable cuda:0|expected a CUDA device|no CUDA device|needs sm_90a"
    r"|needs 2 GPUs"
)
# The limits are those of a machine with 16 cores. Without a GPU the tests of the Gluon kernel are
# skipped, and what comes after them is wanted all the same.
RUN = """
import dataclasses, sys
from benchmarks import stages
stages.BUDGET_S["first"] = 3000
slower = [
    dataclasses.replace(stage, limit_s=10 * stage.limit_s, after=None) for stage in stages.FIRST
]
stages.WINDOWS["first"] = slower
sys.exit(stages.main([sys.argv[1], "first"]))
"""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def clean_environment(folder: Path) -> Path:
    """The python of an environment with the packages of PRESENT and pip, nothing else."""
    venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    for distribution in metadata.distributions():
        if normalised(distribution.metadata["Name"]) not in PRESENT:
            continue
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            source, target = Path(str(distribution.locate_file(top))), site / top
            if not target.exists() and top != "__pycache__":
                target.symlink_to(source)
    for program in ("cmake", "ninja"):
        (folder / "bin" / program).symlink_to(Path(sys.executable).parent / program)
    return folder / "bin" / "python3"


def copy_of_the_tree(folder: Path) -> Path:
    """What git knows or would add, with the recordings beside it, as pack.sh wants them."""
    tree = folder / "tree"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)
    if (REPOSITORY.parent / "shared").is_dir():
        (folder / "shared").symlink_to(REPOSITORY.parent / "shared")
    return tree


def pack(tree: Path) -> str:
    """What pack.sh printed. Skips the test where there is no package index."""
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    shutil.copytree(builds.compiled_kernels(), tree / "pack" / "kernels")
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").symlink_to(sys.executable)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        ["bash", "benchmarks/pack.sh", version],
        cwd=tree,
        capture_output=True,
        text=True,
        env=environment,
    )
    if any(why in done.stderr for why in ("No matching distribution", "Connection", "HTTP error")):
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(tree / ".venv")
    return done.stdout


@pytest.mark.slow
def test_every_stage_gets_to_where_it_asks_for_a_gpu(tmp_path: Path) -> None:
    tree, python = copy_of_the_tree(tmp_path), clean_environment(tmp_path / "clean")
    size = re.search(r"tree and pack: (\d+) MiB of at most 60", pack(tree))
    assert size is not None and int(size[1]) <= 60
    if (tmp_path / "shared").exists():
        (tmp_path / "shared").unlink()  # it does not travel
    out = tmp_path / "out"
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = keep | {"PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(
        [str(python), "-c", RUN, str(out)],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    lines = (out / "summary.txt").read_text().splitlines()
    print(*lines, sep="\n")
    assert [line.split()[0] for line in lines] == [stage.name for stage in FIRST], done.stderr
    said = {line.split()[0]: line for line in lines}
    for name in ("install", "build", "doctor", "gluon_package"):
        assert " ok " in said[name], said[name]
    for name in said.keys() - {"install", "build", "doctor", "gluon_package"}:
        assert ASKS.search(said[name]) and " ok " not in said[name], said[name]
    assert (out / "results.tar.gz").exists()
