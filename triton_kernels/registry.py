"""Every spec of the package, found in its kernel modules."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import triton_kernels
from triton_kernels.spec import Spec

_TOOLS = ("common", "compile", "registry", "sizes", "spec")  # modules without kernels


@cache
def all_specs() -> dict[str, Spec]:
    """Name → spec, sorted by name. A module without SPECS or a name used twice is an error."""
    specs: dict[str, Spec] = {}
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        if module.name in _TOOLS:
            continue
        for spec in importlib.import_module(f"triton_kernels.{module.name}").SPECS:
            if spec.name in specs:
                raise ValueError(f"two specs are named {spec.name}")
            specs[spec.name] = spec
    return dict(sorted(specs.items()))


def specs_for(arch: str) -> dict[str, Spec]:
    """Those of all_specs that are compiled for this architecture."""
    return {n: s for n, s in all_specs().items() if s.arches is None or arch in s.arches}
