"""Precision policies: what a file may say, and that every product gets the format it names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from liveact import _core, _core_dev
from liveact.device.devices import open_devices
from liveact.dit.dit import Dit
from liveact.dit.precision import PrecisionPolicy, choose_precision
from liveact.errors import InputError
from tests.support.cli import Run, generate, refused
from tests.support.demo_dit import ALL, policy, two_blocks
from tests.support.pipeline import demo_checkpoint


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_policy_of_one_format_is_that_format() -> None:
    assert torch.equal(two_blocks(policy(*ALL)), two_blocks("fp8"))
    assert torch.equal(two_blocks(policy()), two_blocks("bf16"))


def test_every_product_is_switched_by_its_own_name() -> None:
    """Two blocks, because the format of the context shows in the second only."""
    results = [two_blocks(policy()), *(two_blocks(policy(choice)) for choice in ALL)]
    for i, first in enumerate(results):
        assert all(not torch.equal(first, other) for other in results[:i])


def test_a_policy_survives_its_file(tmp_path: Path) -> None:
    given = policy((0, "ffn_up"), (1, "attention"))
    path = write(tmp_path / "mine.json", given.text())
    found = PrecisionPolicy.read(path)
    assert found == given
    assert found.layers[0]["ffn_up"].error == 0.04
    assert str(found) == "mine.json (2 of 20 in fp8)"
    # One line per product, so that a person can read it and a diff shows what changed.
    assert sum('"format"' in line for line in path.read_text().splitlines()) == 20
    assert open_devices("cpu", None, path).precision == given
    assert "mine.json (2 of 20 in fp8)" in open_devices("cpu", None, str(path)).reason
    assert choose_precision(given, None) is given
    full = replace(given, sums="full")
    assert PrecisionPolicy.read(write(tmp_path / "full.json", full.text())) == full != given
    assert str(full).endswith("(2 of 20 in fp8, full sums)")


def change(path: str, value: Any) -> Any:
    """A good policy with one place changed; None deletes."""
    raw = policy().to_json()
    *parents, key = path.split("/")
    place: Any = raw
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    if value is None:
        del place[key]
    else:
        place[key] = value
    return raw


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "expected JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a precision policy"),
        (change("liveact_precision_policy", 2), "liveact_precision_policy to be 1, found 2"),
        (change("liveact_precision_policy", True), "to be 1, found True"),
        (change("activations", "fp32"), "activations to be 'bf16', found 'fp32'"),
        (change("activations", None), "activations to be 'bf16', found None"),
        (change("sums", "quick"), "expected sums fast or full, found 'quick'"),
        (change("threshold", 1), "expected only .*, found 'threshold'"),
        (change("measured", 1), "expected an object measured, found 1"),
        (change("layers", {}), "expected a list layers"),
        (change("layers", []), "expected a list layers"),
        (change("layers", [1]), "layer 0: expected an object, found 1"),
        (change("layers/1/ffn_down", None), "layer 1: ffn_down: expected an object .*found None"),
        (change("layers/1/ffn_side", {}), "layer 1: expected only .*found 'ffn_side'"),
        (change("layers/1/self_o/format", "fp4"), "layer 1: self_o: .*fp8 or bf16, found 'fp4'"),
        (change("layers/1/self_o/format", []), r"fp8 or bf16, found \[\]"),
        (change("layers/0/self_o/error", -1), "error to be 0 or more, found -1"),
        (change("layers/0/self_o/error", float("nan")), "error to be 0 or more, found nan"),
        (change("layers/0/self_o/why", ""), "self_o: expected only format, error, found 'why'"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, value: Any, expected: str) -> None:
    path = write(tmp_path / "policy.json", value)
    with pytest.raises(InputError, match=expected) as raised:
        PrecisionPolicy.read(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError) as in_cpp:
        _core_dev.read_policy(path)
    differs = ("expected JSON", "found nan")  # JSON itself is refused in other words
    if not any(words in str(raised.value) for words in differs):
        assert str(in_cpp.value) == str(raised.value)


@pytest.mark.parametrize("name", ["", "fp16", "no/such.json", "x" * 5000, "a\0b", "."])
def test_what_is_neither_a_name_nor_a_file(name: str) -> None:
    with pytest.raises(
        InputError, match="precision: expected fp32, auto, fp8, bf16 or a policy file"
    ):
        choose_precision(name, None)


def test_a_policy_for_another_model(tmp_path: Path) -> None:
    raw = change("layers/0/self_o/error", 0.01)
    raw["layers"].append(raw["layers"][0])
    found = PrecisionPolicy.read(write(tmp_path / "three.json", raw))
    with pytest.raises(InputError, match=r"^three.json: expected 2 layers .*, found 3$"):
        Dit.load(demo_checkpoint(), _core.open_cpu(), found)


def test_the_command_line_takes_one(run: Run, wav: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", policy((0, "ffn_up")).text())
    code, out, errors = run(*generate(wav, tmp_path, precision=path, device="cpu"))
    assert (code, errors) == (0, "")
    assert "cpu, mine.json (1 of 20 in fp8);" in out
    code, out, _ = run("inspect", demo_checkpoint(), "--precision", path)
    assert code == 0
    assert "mine.json (1 of 20 in fp8)" in " ".join(out.split())
    write(path, change("layers", [{}]))
    refused(run(*generate(wav, tmp_path, precision=path)), "layer 0: self_qkv: expected")
    refused(run("inspect", demo_checkpoint(), "--precision", path), "layer 0: self_qkv: expected")
