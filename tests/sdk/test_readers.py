"""What C++ programs open by themselves: precisions by name, and the manifest of the kernels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveact import _core, _core_dev
from liveact.commands.convert import convert
from liveact.device import kernels
from liveact.dit.dit import settled
from liveact.dit.precision import PrecisionPolicy, choose_precision, core_precision
from liveact.errors import DeviceError, InputError
from tests.support.demo_dit import NUM_LAYERS, policy
from tests.support.pipeline import demo_checkpoint

# ------------------------------------------------------------------------------- precisions


def formats_of_python(given: str | Path | None, directory: Path) -> list[dict[str, str]]:
    """What Python's loading makes of a precision on the CPU."""
    device = _core.open_cpu()
    config, _ = _core.open_dit(directory)
    chosen = core_precision(settled(choose_precision(given, directory) or "fp32", [device], config))
    if isinstance(chosen, str):
        return [dict.fromkeys(_core.products(), chosen)] * config.num_layers
    return list(chosen["layers"])


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "auto", None, "policy"])
def test_names_mean_what_they_mean_in_python(tmp_path: Path, name: str | None) -> None:
    path = tmp_path / "mine.json"
    path.write_text(policy((0, "ffn_up"), (1, "attention")).text())
    given = path if name == "policy" else name
    found = _core_dev.precision_of(demo_checkpoint(), str(given or ""), _core.open_cpu())
    assert found == formats_of_python(given, demo_checkpoint())


@pytest.mark.parametrize("name", ["auto", "fp8", "policy"])
def test_a_converted_checkpoint_says_what_it_was_made_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(policy((0, "ffn_up"), (1, "attention")).text())
    out = tmp_path / "out"
    convert(demo_checkpoint(), out, PrecisionPolicy.read(path) if name == "policy" else name)
    found = _core_dev.precision_of(out, "", _core.open_cpu())
    assert found == formats_of_python(None, out)
    with pytest.raises(InputError, match=r"as its weights were converted, found bf16 \(use the o"):
        _core_dev.precision_of(out, "bf16", _core.open_cpu())


def test_a_policy_for_another_model(tmp_path: Path) -> None:
    raw = policy().to_json()
    raw["layers"].append(raw["layers"][0])
    path = tmp_path / "three.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=rf"^three.json: expected {NUM_LAYERS} layers .*, found 3"):
        _core_dev.precision_of(demo_checkpoint(), str(path), _core.open_cpu())


# --------------------------------------------------------------------------------- manifest


@pytest.fixture
def folder(tmp_path: Path, compiled_kernels: Path) -> Path:
    """A copy of the kernels, to be damaged."""
    shutil.copytree(compiled_kernels / "sm_90a", tmp_path / "sm_90a")
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "sm_90a" / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_all_kernels_are_read(folder: Path) -> None:
    entries = json.loads((folder / "sm_90a" / "manifest.json").read_text())["kernels"]
    assert [image.name for image in kernels.load("sm_90a", folder)] == [e["name"] for e in entries]
    assert kernels.available(folder) == ["sm_90a"]
    assert kernels.available(folder / "nothing") == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.update(format=2),
            "manifest.json: expected format 1 for 'sm_90a', found f",
        ),
        (lambda m: m.update(format=True), "found format True for 'sm_90a'"),
        (lambda m: m.pop("arch"), "found format 1 for None"),
        (lambda m: m.pop("kernels"), "manifest.json: expected kernels to be a list, found none"),
        (lambda m: m["kernels"].insert(0, 3), "expected name to be a text, found none"),
        (lambda m: m["kernels"][0].update(threads="3"), "expected threads to be a size, found '3'"),
        (lambda m: m["kernels"][0].update(threads=-1), "expected threads to be a size, found -1"),
        (lambda m: m["kernels"][0].update(threads=2**31), "expected threads to be a size, found"),
        (lambda m: m["kernels"][0].update(file="../a.cubin"), "expected a file beside the manif"),
        (lambda m: m["kernels"][0].update(file="gone.cubin"), "gone.cubin: expected a kernel, fou"),
        (lambda m: m["kernels"][0].update(sha256="0"), "expected SHA-256 '0', found "),
        (lambda m: m["kernels"][0].update(grid=[[{}]]), "expected parameter to be a text, found n"),
        (lambda m: m["kernels"][0].update(grid=[[1]] * 4), "of at most 3 dimensions, found 4"),
        (
            lambda m: m["kernels"][0].update(grid=[[{"parameter": "none", "divisor": 1}]]),
            "expected a grid of its parameters, found 'none'",
        ),
        (
            lambda m: m["kernels"][0]["parameters"][0].update(type="i64"),
            "expected parameters of type *, i32 or f32, found 'i64'",
        ),
        (
            lambda m: m["kernels"][0]["hidden_parameters"][0].update(bytes_per_program=8),
            "expected a kernel without scratch memory, found one with",
        ),
    ],
)
def test_a_bad_manifest_is_one_clear_line(
    folder: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    change(folder, edit)
    with pytest.raises(DeviceError) as raised:
        kernels.load("sm_90a", folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(folder))


def test_what_is_no_manifest(folder: Path) -> None:
    (folder / "sm_90a" / "manifest.json").write_text("{")
    with pytest.raises(DeviceError, match=r"manifest.json: expected JSON, found no name of a memb"):
        kernels.load("sm_90a", folder)
    with pytest.raises(DeviceError, match=r"compiled for sm_100a in .*, found sm_90a"):
        kernels.load("sm_100a", folder)
