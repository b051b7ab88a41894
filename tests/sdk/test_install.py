"""The installed tree: programs that are built with it alone compute what Python computes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.core_builds import run
from tests.support.paths import REPOSITORY
from tests.support.sdk import (
    EMBED,
    PYTHON_BUILD,
    embed,
    exported,
    features,
    install,
    latents_of_python,
    pkg_config,
    write_features,
)

STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


@pytest.fixture(scope="module")
def given() -> dict[str, list[torch.Tensor]]:
    return features()


@pytest.fixture(scope="module")
def expected(given: dict[str, list[torch.Tensor]]) -> np.ndarray:
    return latents_of_python(given)


@pytest.fixture(scope="module", params=["shared", "static"])
def prefix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that was moved after it was installed."""
    folder = tmp_path_factory.mktemp(request.param)
    install(folder / "installed", shared=request.param == "shared")
    return (folder / "installed").rename(folder / "moved")


@pytest.mark.slow
def test_programs_with_cmake(
    prefix: Path, given: dict[str, list[torch.Tensor]], expected: np.ndarray, tmp_path: Path
) -> None:
    shutil.copytree(EMBED, tmp_path / "source")
    build = tmp_path / "build"
    configure = ["cmake", "-G", "Ninja", "-S", tmp_path / "source", "-B", build]
    run([*configure, f"-DCMAKE_PREFIX_PATH={prefix}"])
    run(["cmake", "--build", build])
    for program in ("embed", "embed_c"):
        folder = write_features(tmp_path / program, given)
        assert np.array_equal(embed(build / program, folder), expected), program


@pytest.mark.slow
def test_programs_with_pkg_config(
    prefix: Path, given: dict[str, list[torch.Tensor]], expected: np.ndarray, tmp_path: Path
) -> None:
    flags = pkg_config(prefix, "--cflags")
    libraries = pkg_config(prefix, "--libs")
    for compiler, standard, source in (
        ("g++", "-std=c++20", "embed.cpp"),
        ("gcc", "-std=c99", "embed.c"),
    ):
        program = tmp_path / source.replace(".", "_")
        run([compiler, standard, *STRICT, *flags, EMBED / source, "-o", program, *libraries])
        folder = write_features(tmp_path / source, given)
        assert np.array_equal(embed(program, folder, library_path=prefix / "lib"), expected)


def test_the_tree_may_be_moved(prefix: Path) -> None:
    """Nothing that people read or linkers follow has a path of the build."""
    texts = [path for path in prefix.rglob("*") if path.suffix in (".cmake", ".pc", ".h")]
    assert len(texts) > 12
    for path in texts:
        assert str(REPOSITORY) not in path.read_text() and "/installed" not in path.read_text()
    sizes = {path.name: path.stat().st_size for path in prefix.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 32e6, sizes
    print(f"{prefix.parent.name}: {sum(sizes.values()) / 1e6:.1f} MB, {sizes}")


def test_versions_that_are_not_compatible_are_refused(prefix: Path, tmp_path: Path) -> None:
    """Of 0.2 any patch; neither what comes later nor another minor version."""
    version = (prefix / "lib/cmake/liveact/liveactConfigVersion.cmake").read_text()
    header = (prefix / "include/liveact/version.h").read_text()
    (number,) = re.findall(r'#define LIVEACT_VERSION "(.+)"', header)
    assert f'set(PACKAGE_VERSION "{number}")' in version
    minor = ".".join(number.split(".")[:2])
    for wanted, found in ((minor, True), ("0.1", False), ("0.99", False), ("1.0", False)):
        script = tmp_path / "check.cmake"
        script.write_text(
            f"set(PACKAGE_FIND_VERSION {wanted})\n"
            + "".join(
                f"set(PACKAGE_FIND_VERSION_{part} {value})\n"
                for part, value in zip(("MAJOR", "MINOR"), wanted.split("."), strict=True)
            )
            + f"include({prefix}/lib/cmake/liveact/liveactConfigVersion.cmake)\n"
            + "message(STATUS compatible=${PACKAGE_VERSION_COMPATIBLE})\n"
        )
        output = run(["cmake", "-P", script])
        assert ("compatible=TRUE" in output) is found, (wanted, output)
    assert pkg_config(prefix, "--modversion") == [number]


def test_what_is_exported() -> None:
    """The list of symbols is part of the interface: what leaves it breaks programs, what comes into
    it must be kept. After a change that is meant: write the list again, as the message says."""
    listed = REPOSITORY / "cmake" / "exported.txt"
    run(["cmake", "--build", PYTHON_BUILD, "--target", "liveact"])
    found = exported(PYTHON_BUILD / "libliveact.so")
    assert found == listed.read_text().split(), (
        f"{listed}: expected these exported symbols, found others; to accept them:\n"
        "python -c 'from tests.support.sdk import *; print(*exported(PYTHON_BUILD / "
        '"libliveact.so"), sep="\\n")\' > cmake/exported.txt'
    )
    header = (REPOSITORY / "include" / "liveact" / "liveact.h").read_text()
    declared = set(re.findall(r"\b(liveact_\w+)\(", header)) - {"liveact_device_options"}
    assert {name for name in found if name.startswith("liveact_")} == declared


def test_c_headers_are_c(tmp_path: Path) -> None:
    for header in ("api.h", "version.h", "liveact.h"):
        source = tmp_path / "header.c"
        source.write_text(f"#include <liveact/{header}>\nint main(void) {{ return 0; }}\n")
        command = ["gcc", "-std=c99", "-fsyntax-only", *STRICT, "-I", str(REPOSITORY / "include")]
        subprocess.run([*command, str(source)], check=True)
