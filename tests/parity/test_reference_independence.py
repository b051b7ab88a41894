"""The reference is independent: no line of it comes from the engine, nor the other way round."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY


def imported(file: Path) -> set[str]:
    """Top-level names of the packages that a file imports anywhere in it; "." for relative."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0] if node.level == 0 else ".")
    return found


def test_the_reference_needs_torch_alone() -> None:
    files = sorted((REPOSITORY / "reference").rglob("*.py"))
    assert len(files) >= 6
    for file in files:
        others = imported(file) - sys.stdlib_module_names - {"torch", "reference"}
        assert not others, f"{file.name} imports {others}"
        assert "importlib" not in imported(file), file.name


def test_the_engine_does_not_need_the_reference() -> None:
    files = sorted((REPOSITORY / "engine").rglob("*.py"))
    assert len(files) > 20
    assert not [file.name for file in files if "reference" in imported(file)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import liveact.vae as v", {"liveact"}),
        ("def f():\n    from liveact import vae", {"liveact"}),
        ("from . import dit", {"."}),
    ],
)
def test_imports_are_seen(tmp_path: Path, line: str, expected: set[str]) -> None:
    (tmp_path / "file.py").write_text(line)
    assert imported(tmp_path / "file.py") == expected
