"""The documents: what they name exists, their lines are short, and whatever is cited, here or in a
comment, is in the repository. Only the recordings of the released model lie beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "triton_kernels/README.md"),
    *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md"))),
]
LONGEST_LINE = 110
NOT_IN_THE_REPOSITORY = {
    "../shared/golden": "the recordings, beside the checkout",
    "../shared/golden/dit": "the recordings, beside the checkout",
    ".venv/bin": "what `make` sets up",
    ".venv/bin/pip": "what `make` sets up",
    ".venv/bin/pre-commit": "what `make` sets up",
    "dist/": "an output of `make wheel`",
    "dist/*.whl": "an output of `make wheel`",
    "engine/liveact/gpu": "an output of `make kernels`",
    "benchmarks/results/": "an output of the benchmarks",
    "Soul-AILab/LiveAct": "a name on a model hub",
    "TencentGameMate/chinese-wav2vec2-base": "a name on a model hub",
    "google/umt5-xxl/": "a folder of a checkpoint",
    "wav2vec/": "a folder of a checkpoint",
}
SOURCES = (".py", ".pyi", ".cpp", ".h", ".sh", ".md", ".toml", ".yaml")
TEXTS = (*SOURCES, "Makefile", "CMakeLists.txt", ".ci/run")
INCLUDE = r'^#include "([^"]+)"'
INCLUDE_ROOTS = ("csrc", "include", "bindings")
OF_LIBRARIES = {"cblas.h"}
MADE_HERE = {"build", "out", "dist", "shared", "__pycache__"}


@cache
def files() -> dict[str, set[str]]:
    """Every file of the repository, by name: the folders that have one of this name."""
    found: dict[str, set[str]] = {}
    for folder, folders, names in os.walk(REPOSITORY):
        folders[:] = [f for f in folders if f == ".ci" or not f.startswith(".")]
        folders[:] = [f for f in folders if f not in MADE_HERE and not f.endswith(".egg-info")]
        for name in names:
            found.setdefault(name, set()).add(os.path.relpath(folder, REPOSITORY))
    return found


def texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every file that people write, but this one."""
    for name, folders in files().items():
        for folder in folders:
            path = os.path.normpath(f"{folder}/{name}")
            if path.endswith(TEXTS) and REPOSITORY / path != Path(__file__).resolve():
                yield path, (REPOSITORY / path).read_text()


def prose(document: str) -> list[tuple[int, str]]:
    """(number, line) of a document outside of its code blocks."""
    lines, in_code = [], False
    for number, line in enumerate((REPOSITORY / document).read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            lines.append((number, line))
    return lines


def exists(document: str, name: str) -> bool:
    """Whether a name in a document is a file or folder, seen from the root or the document."""
    if "/" not in name:
        return name in files()
    for folder in (REPOSITORY, (REPOSITORY / document).parent):
        if "*" in name and any(folder.glob(name)):
            return True
        path = folder / name
        if path.is_dir() if name.endswith("/") else path.exists():
            return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    broken = []
    for number, line in prose(document):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            path = target.partition("#")[0]
            if ":" not in path and not (REPOSITORY / document).parent.joinpath(path).exists():
                broken.append(f"{document}:{number}: {target}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    missing = []
    for number, line in prose(document):
        for word in " ".join(re.findall(r"`([^`]+)`", line)).split():
            is_path = re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", word) and "/" in word
            is_file = re.fullmatch(r"\w+\.\w+", word) and word.endswith(SOURCES)
            known = word in NOT_IN_THE_REPOSITORY or exists(document, word)
            if (is_path or is_file) and not known:
                missing.append(f"{document}:{number}: {word}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_of_prose_are_short(document: str) -> None:
    """Rows of tables cannot be broken."""
    long = [
        f"{document}:{number}: {len(line)}"
        for number, line in prose(document)
        if len(line) > LONGEST_LINE and not line.startswith("|")
    ]
    assert not long, f"expected at most {LONGEST_LINE} columns, found\n" + "\n".join(long)


def test_cited_files_are_in_the_repository() -> None:
    """By comments and messages too: documents by any name, sources by their path from the root."""
    strangers = []
    for path, text in texts():
        for cited in re.findall(r"[\w./-]+\.md\b", text):
            near = (REPOSITORY, REPOSITORY / "docs", (REPOSITORY / path).parent)
            if not cited.startswith(("golden/", "../shared/golden/")) and not any(
                (folder / cited).exists() for folder in near
            ):
                strangers.append(f"{path}: {cited}")
        folders = "csrc|include|bindings|engine|triton_kernels|reference|benchmarks|tests|examples"
        prose = re.sub(INCLUDE, "", text, flags=re.M)  # has roots of its own, see below
        for cited in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\.(?:h|cpp|py|sh)\b", prose):
            if not (REPOSITORY / cited).exists():
                strangers.append(f"{path}: {cited}")
        pattern = r"\bshared/(?!golden)[\w./-]*|\b(?:model|checkpoint)-spec\b|§"
        strangers += [f"{path}: {cited}" for cited in re.findall(pattern, text)]
    assert not strangers, "\n".join(strangers)


def test_included_files_are_in_the_repository() -> None:
    """`#include "core/ops.h"` is seen from the folders that CMakeLists.txt gives the compiler, or
    from the file's own."""
    strangers, found = [], 0
    for path, text in texts():
        if path.endswith((".h", ".cpp")):
            for included in re.findall(INCLUDE, text, flags=re.M):
                found += 1
                beside = (REPOSITORY / path).parent
                roots = [beside, *(REPOSITORY / root for root in INCLUDE_ROOTS)]
                if included not in OF_LIBRARIES and not any((r / included).exists() for r in roots):
                    strangers.append(f"{path}: {included}")
    assert found > 100, "includes"
    assert not strangers, "\n".join(strangers)


def test_cited_sections_exist() -> None:
    """`docs/NAME.md, "Section"`, over line breaks and comment marks too."""
    missing, cited = [], 0
    for path, text in texts():
        joined = re.sub(r"\s*\n\s*(?://|#)?\s*", " ", text)
        for name, section in re.findall(r'(?:docs/|\()(\w+\.md)\)?,? "([^"]+)"', joined):
            cited += 1
            headings = re.findall(r"^#+ (.+)$", (REPOSITORY / "docs" / name).read_text(), re.M)
            if section not in headings:
                missing.append(f'{path}: {name}, "{section}"')
    assert cited and not missing, "\n".join(missing)
