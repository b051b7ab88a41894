"""What README and docs/sdk.md show compiles and runs as it is pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.core_builds import run
from tests.support.paths import REPOSITORY
from tests.support.sdk import install, pkg_config


@pytest.mark.slow
def test_the_lines_of_the_readme(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    (code,) = re.findall(r"<!-- example: cpp -->\n```cpp\n(.*?)```", readme, re.S)
    body = code[code.index("{") + 1 : code.rindex("}")].strip().splitlines()
    assert len(body) == 5, "README promises five lines"
    (tmp_path / "main.cpp").write_text(code)
    prefix = install(tmp_path / "prefix", shared=True)
    flags = pkg_config(prefix, "--cflags", "--libs")
    program = tmp_path / "main"
    compile_ = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", tmp_path / "main.cpp"]
    run([*compile_, "-o", program, *flags])
    run(["env", "-C", REPOSITORY, program], LD_LIBRARY_PATH=str(prefix / "lib"))


def test_cmake_in_the_documents() -> None:
    """The two lines of docs/sdk.md are those of the example, which other tests build."""
    text = (REPOSITORY / "docs" / "sdk.md").read_text()
    (shown,) = re.findall(r"```cmake\n(.*?)```", text, re.S)
    example = (REPOSITORY / "examples" / "embed" / "CMakeLists.txt").read_text()
    for line in shown.strip().splitlines():
        assert line.replace("my_program", "embed") in example
