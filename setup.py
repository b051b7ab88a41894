"""Builds the extension module `liveact._core` and the SDK `liveact/sdk` with CMake.

An editable install gets `liveact._core_dev` too, for tests and benchmarks; a wheel never does.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import scipy_openblas32
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _version() -> str:
    """That of the runtime."""
    header = (ROOT / "include" / "liveact" / "version.h").read_text()
    return re.findall(r'#define LIVEACT_VERSION "(.+)"', header)[0]


def _replace(source: Path, target: Path) -> None:
    """A new file, not new bytes in the old one: a process that has it mapped would crash."""
    target.unlink(missing_ok=True)
    shutil.copy2(source, target)


def _nvtx_include() -> list[str]:
    """Where the nvidia-nvtx package has its headers; without it CMake looks for a CUDA toolkit."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    found = [path for folder in folders for path in folder.glob("*/include/nvtx3")]
    return [f"-DLIVEACT_NVTX_INCLUDE={found[0].parent}"] if found else []


def _install_sdk(build: Path, prefix: Path) -> None:
    """Headers and libraries for C++ and C, and the OpenBLAS that the Python module uses too."""
    shutil.rmtree(prefix, ignore_errors=True)
    install = ["cmake", "--install", str(build), "--prefix", str(prefix), "--component", "sdk"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    # Wheels know no links: what only linkers read is a linker's script instead.
    name = prefix / "lib" / "libliveact.so"
    library = name.resolve().name
    name.unlink()
    name.write_text(f"INPUT({library})\n")


class CMakeBuild(build_ext):
    """One CMake project, configured once per build folder."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        library = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*"))
        build = ROOT / "build" / f"python-{sys.implementation.cache_tag}"
        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DBUILD_SHARED_LIBS=ON",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            "-DLIVEACT_KERNELS=../gpu",  # beside the SDK, where Python has them
            f"-DLIVEACT_OPENBLAS_INCLUDE={scipy_openblas32.get_include_dir()}",
            f"-DLIVEACT_OPENBLAS_LIBRARY={library}",
            *_nvtx_include(),
        ]
        subprocess.run(configure, check=True)
        targets = ["_core", "liveact", *(["_core_dev"] if self.editable_mode else [])]
        subprocess.run(["cmake", "--build", str(build), "--target", *targets], check=True)
        # An editable install imports from the source folder, which has all but the module itself.
        target.parent.mkdir(parents=True, exist_ok=True)
        package = ROOT / "engine" / "liveact" if self.editable_mode else target.parent
        if self.editable_mode:
            for old in package.glob("*.so"):
                old.unlink()
            dev = next(build.glob("_core_dev.*.so"))
            _replace(dev, package / dev.name)
        # setuptools copies it into the package afterwards.
        _replace(next(build.glob("_core.*.so")), target)
        _install_sdk(build, package / "sdk")


setup(
    version=_version(),
    ext_modules=[Extension("liveact._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
