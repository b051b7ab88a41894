"""Runs the C++ unit tests of the runtime and the corpus of its fuzzed readers, plainly and under
sanitizers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.core_builds import RELEASE, SANITIZED, build, run
from tests.support.paths import REPOSITORY

BUILDS = [
    pytest.param(RELEASE, id="release"),
    pytest.param(SANITIZED, id="sanitizers", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("folder", BUILDS)
def test_core(folder: Path) -> None:
    """Every case of csrc/tests passes; under the sanitizers also without a report or a leak."""
    # Thousands of short sessions: pages go back to the system at the end only.
    kept = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    output = run([build(folder, "core_tests") / "core_tests"], **kept)
    cases = sum(
        len(re.findall(r"^TEST\(", file.read_text(), re.MULTILINE))
        for file in (REPOSITORY / "csrc" / "tests").glob("*.cpp")
    )
    assert cases > 0
    print(f"{folder.name}: {output.splitlines()[-1]} of {cases} cases")
    assert output.splitlines()[-1] == f"{cases} passed, 0 failed", output


@pytest.mark.parametrize(
    ("folder", "inputs"),
    [
        pytest.param(RELEASE, 100_000, id="release"),
        pytest.param(SANITIZED, 20_000, id="sanitizers", marks=pytest.mark.slow),
    ],
)
def test_damaged_files_are_refused(folder: Path, inputs: int) -> None:
    """The corpus of the fuzzer, and what is damaged from it (csrc/fuzz)."""
    corpus = REPOSITORY / "csrc" / "fuzz" / "corpus"
    output = run([build(folder, "fuzz_corpus") / "fuzz_corpus", corpus, str(inputs)])
    files = sum(1 for _ in corpus.iterdir())
    assert files >= 16
    assert output == f"{files} files, {inputs} damaged ones: nothing found\n"
