"""The ranges that profilers show: names and nesting, and that they cost nothing without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.builds import fake_nvtx_library
from tests.support.cuda.fake import FakeCuda
from tests.support.paths import REPOSITORY

LAYER = ["self_attention", ["memory_update", []], "cross_attention", [], "audio", [], "ffn", []]


@pytest.fixture(scope="module")
def profiler() -> Path:
    return fake_nvtx_library()


def run(folder: Path, kernels: Path, *profiler: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "NVTX_INJECTION64_PATH"}
    for path in profiler:
        environment["NVTX_INJECTION64_PATH"] = str(path)
    command = [sys.executable, "-m", "tests.support.cuda.ranges_run"]
    command += [FakeCuda.copy_into(folder).path, str(kernels), *map(str, profiler)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def tree(lines: list[str]) -> list[Any]:
    """[name, [children], name, [children], …]; fails where begins and ends do not pair."""
    stack: list[list[Any]] = [[]]
    for line in lines:
        if line == "<":
            stack.pop()
        else:
            children: list[Any] = []
            stack[-1] += [line.removeprefix("> "), children]
            stack.append(children)
    assert len(stack) == 1, "a range has no end"
    return stack[0]


@pytest.mark.slow
def test_names_and_nesting(tmp_path: Path, compiled_kernels: Path, profiler: Path) -> None:
    result = run(tmp_path, compiled_kernels, profiler)
    assert result["other_domains"] == []
    ranges = tree(result["ranges"])
    names, children = ranges[::2], ranges[1::2]
    assert names == ["plan", "set_image", "set_prompt", "block 0", "block 1", "block 2", "block 3"]

    def layers(audio: bool) -> list[Any]:
        layer = LAYER if audio else [*LAYER[:4], *LAYER[6:]]
        return ["embed", [], "layer 0", layer, "layer 1", layer, "head", []]

    eager = ["conditioning", []]
    for step in range(3):
        eager += [f"step {step}", layers(audio=step > 0)]
    # The ops of block 2 are captured under the same names; block 3 only launches the graphs.
    assert children[0] == 2 * eager  # a first and a later block
    assert children[3] == children[4] == children[5] == eager
    assert children[6] == ["conditioning", [], "step 0", [], "step 1", [], "step 2", []]
    # Every name but those of blocks, once: nothing is registered while blocks run.
    assert result["registered"] == len(
        set(re.findall(r"> (?!block)(.*)", "\n".join(result["ranges"])))
    )


def test_the_names_are_documented() -> None:
    text = (REPOSITORY / "docs" / "profiling.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_]+)", text, re.MULTILINE))
    names: set[str] = set()
    in_files: dict[str, int] = {}
    for file in (REPOSITORY / "csrc").rglob("*.cpp"):
        found = re.findall(r'\bRange(?:Name)?(?: \w+)?\("([a-z_]+)', file.read_text())
        in_files[str(file.relative_to(REPOSITORY / "csrc"))] = len(found)
        names |= set(found)
    # Where ranges are known to be: a search that finds none of them proves nothing.
    assert {f"core/{name}.cpp" for name in ("stream", "conditioning", "dit", "model")} <= {
        n for n, found in in_files.items() if found
    }
    assert sum(in_files.values()) >= 16
    for file in (REPOSITORY / "engine" / "liveact").rglob("*.py"):
        names |= set(re.findall(r'nvtx\.range\("([a-z_]+)', file.read_text()))
    assert names == documented


@pytest.mark.slow
def test_nothing_is_loaded_without_a_profiler(tmp_path: Path, compiled_kernels: Path) -> None:
    assert run(tmp_path, compiled_kernels)["loaded"] == []
