"""Weight files: what is read, what is refused, and that damage of any kind is one `InputError`."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from liveact.checkpoint.tensors import (
    FLOATS,
    assign_tensors,
    check_tensors,
    load_pth,
    open_tensor_file,
    open_tensors,
)
from liveact.errors import InputError
from liveact.files import read_json, read_size

# torch warns about pickles of unusual protocols before it refuses them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MIB = 2**20
TENSORS = {
    "blocks.0.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "blocks.0.bias": torch.arange(3, dtype=torch.bfloat16),
    "ids": torch.arange(5),
}


def save_shards(directory: Path, shards: dict[str, list[str]], index: object) -> None:
    """Writes TENSORS in shards, file name → tensor names, and an index with any content."""
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, directory / file)
    (directory / "m.safetensors.index.json").write_text(json.dumps(index))


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------- JSON


def test_json_object_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"dim": 64}')
    assert read_json(tmp_path / "config.json") == {"dim": 64}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "found nothing"),
        (b"", "JSONDecodeError"),
        (b'{"a": ', "JSONDecodeError"),
        (b"[1, 2]", "found list"),
        (b"\xff\xfe\x00", "found "),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_bad_json_is_refused(tmp_path, content, found):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=found) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 9, 10**30, True, 2.0, "4", None])
def test_sizes_are_bounded(value):
    assert read_size({"layers": 8}, "layers", Path("c.json"), at_most=8) == 8
    with pytest.raises(InputError, match=r"c.json: expected layers to be in 1..8, found"):
        read_size({"layers": value}, "layers", Path("c.json"), at_most=8)


# --------------------------------------------------------------------------------- safetensors


def test_tensor_file_is_read_and_described(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path)
    with open_tensor_file(path) as tensors:
        assert set(tensors) == set(TENSORS) and len(tensors) == 3
        assert tensors.shape("blocks.0.weight") == (3, 4)
        assert tensors.dtype("blocks.0.bias") == torch.bfloat16
        assert tensors.file_of("ids") == tensors.source == path
        assert "ids" in tensors and "nothing" not in tensors and tensors.get("nothing") is None
        taken = {name: tensors[name] for name in tensors}
    # Taken tensors outlive the file's handle, others cannot be had any more.
    assert all(torch.equal(taken[name], TENSORS[name]) for name in TENSORS)
    with pytest.raises(ValueError, match="closed"):
        tensors["ids"]


@pytest.mark.parametrize("format_", ["safetensors", "pth"])
def test_tensors_are_mapped_not_read(tmp_path, format_):
    path = tmp_path / f"big.{format_}"
    big = torch.ones(16 * MIB)  # 64 MiB
    (save_file if format_ == "safetensors" else torch.save)({"big": big}, path)
    before = resident_bytes()
    found = (open_tensor_file if format_ == "safetensors" else load_pth)(path)
    mapped = found["big"]
    assert found["big"].data_ptr() == mapped.data_ptr()
    assert resident_bytes() - before < 16 * MIB
    assert mapped[-1] == 1.0


def test_shards_are_one_mapping(tmp_path):
    shards = {"m-1.safetensors": ["ids"], "m-2.safetensors": ["blocks.0.weight", "blocks.0.bias"]}
    # The index forgets a tensor of a shard: it is there all the same.
    weight_map = {"ids": "m-1.safetensors", "blocks.0.bias": "m-2.safetensors"}
    save_shards(tmp_path, shards, {"metadata": {}, "weight_map": weight_map})
    with open_tensors(tmp_path, "m") as tensors:
        assert set(tensors) == set(TENSORS)
        assert tensors.file_of("blocks.0.bias").name == "m-2.safetensors"
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"ids": "m-3.safetensors"}, r"m-3.safetensors: expected a file, found nothing"),
        ({"gone": "m-1.safetensors"}, r"'gone': expected in m-1.safetensors, found in no shard"),
        (
            {"ids": "m-2.safetensors", "blocks.0.bias": "m-1.safetensors"},
            r"'ids': expected in m-2.safetensors, found in m-1.safetensors",
        ),
        (
            {
                "ids": "m-1.safetensors",
                "blocks.0.weight": "m-2.safetensors",
                "x": "m-4.safetensors",
            },
            r"m-4.safetensors: tensor 'ids': expected in one shard only, found in m-1.safetensors",
        ),
        ({"ids": "../m-1.safetensors"}, r"'ids': expected a file name, found '../m-1"),
        ({"ids": 7}, r"'ids': expected a file name, found 7"),
        ({}, "expected an object 'weight_map', found {}"),
        ([], "expected an object 'weight_map', found"),
    ],
)
def test_wrong_index_is_refused(tmp_path, weight_map, message):
    shards = {
        "m-1.safetensors": ["ids"],
        "m-2.safetensors": ["blocks.0.weight", "blocks.0.bias"],
        "m-4.safetensors": ["ids"],
    }
    save_shards(tmp_path, shards, {"weight_map": weight_map})
    with pytest.raises(InputError, match=message):
        open_tensors(tmp_path, "m")


def test_one_file_or_shards_but_not_both(tmp_path):
    with pytest.raises(InputError, match="found neither"):
        open_tensors(tmp_path, "m")
    save_file(TENSORS, tmp_path / "m.safetensors")
    assert set(open_tensors(tmp_path, "m")) == set(TENSORS)
    save_shards(tmp_path, {}, {"weight_map": {"ids": "m.safetensors"}})
    with pytest.raises(InputError, match="found both"):
        open_tensors(tmp_path, "m")


def header_file(header: dict[str, object], data_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def entry(shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 0) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 99 * MIB) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        header_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),  # overlapping
        header_file({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8),  # the same bytes twice
        header_file({"a": entry([3], 0, 12)}, 8),  # truncated
        header_file({"a": entry([3], 0, 8)}, 8),  # shape and offsets disagree
        header_file({"a": entry([2**62, 8], 0, 8)}, 8),  # product overflows
        header_file({"a": {**entry([2], 0, 8), "dtype": "F31"}}, 8),
        header_file({"a": {**entry([8], 0, 8), "dtype": "F8_E8M0"}}, 8),  # valid, but not for us
    ],
)
def test_lying_header_is_refused(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"expected .*found") as caught:
        open_tensor_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * MIB


@pytest.mark.parametrize("load", [open_tensor_file, load_pth])
def test_what_is_not_a_file_is_refused(tmp_path, load):
    with pytest.raises(InputError, match="expected a file, found something else"):
        load(tmp_path)
    with pytest.raises(InputError, match="expected a file, found nothing"):
        load(tmp_path / "missing")


# ----------------------------------------------------------------------------------------- pth


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_of_either_format_is_read(tmp_path, zipped):
    path = tmp_path / "m.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    state = load_pth(path)
    assert set(state) == set(TENSORS)
    assert all(torch.equal(state[name], TENSORS[name]) for name in TENSORS)
    assert state.shape("blocks.0.weight") == (3, 4) and state.file_of("ids") == path


class RunsCode:
    """Creates a directory when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.directory,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, save):
    save({"a": RunsCode(tmp_path / "ran")}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="expected a torch state dict, found"):
        load_pth(tmp_path / "m.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "expected a dict of tensors, found list"),
        ({"a": torch.zeros(2), "b": 3}, "expected names and tensors, found 'b': int"),
        ({1: torch.zeros(2)}, "expected names and tensors, found 1: Tensor"),
        ({"a": torch.eye(2).to_sparse()}, "tensor 'a': expected dense"),
        ({"a": torch.zeros(1).expand(2**34)}, "tensor 'a': expected at most the .* found 68719476"),
    ],
)
def test_other_pth_contents_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(InputError, match=message):
        load_pth(tmp_path / "m.pth")


# ---------------------------------------------------------------------------------------- fuzz

mutations = st.lists(
    st.one_of(
        st.tuples(st.just("truncate"), st.floats(0, 1), st.just(b"")),
        st.tuples(st.just("overwrite"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("overwrite"), st.just(0.0), st.binary(min_size=8, max_size=8)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    ),
    min_size=1,
    max_size=3,
)


def mutated(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, position, data in changes:
        at = int(position * len(content))
        if kind == "truncate":
            content = content[:at]
        else:
            skipped = len(data) if kind == "overwrite" else 0
            content = content[:at] + data + content[at + skipped :]
    return content


@pytest.mark.parametrize("kind", ["safetensors", "zipped pth", "old pth"])
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(changes=mutations)
def test_damage_is_an_input_error(tmp_path_factory, kind, changes):
    directory = tmp_path_factory.getbasetemp()
    path = directory / "fuzz.bin"
    path.unlink(missing_ok=True)  # never in place: a mapping of the last example may be alive
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zipped pth")
    content = mutated(path.read_bytes(), changes)
    path.unlink()
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = open_tensor_file(path) if kind == "safetensors" else load_pth(path)
        for name in found:  # every byte can be touched
            assert tuple(found[name].shape) == found.shape(name)
            found[name].clone()
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * MIB


# -------------------------------------------------------------------------- checking and using

SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items() if name != "ids"}


@pytest.mark.parametrize("format_", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("expected", "dtypes", "prefix", "message"),
    [
        (SHAPES, FLOATS, (), None),
        (SHAPES, FLOATS, ("blocks.",), None),
        (
            {**SHAPES, "head": (2, 7)},
            FLOATS,
            (),
            "{path}: toy: expected tensor 'head' of shape [2, 7], found none of this name",
        ),
        (
            {"blocks.0.weight": (4, 3)},
            FLOATS,
            (),
            "{path}: toy: tensor 'blocks.0.weight': expected shape [4, 3], found [3, 4]",
        ),
        (
            SHAPES,
            {torch.float32},
            (),
            "{path}: toy: tensor 'blocks.0.bias': expected dtype float32, found bfloat16",
        ),
        (
            {"blocks.0.weight": (3, 4)},
            FLOATS,
            ("blocks.",),
            "{path}: toy: expected no more than the 1 tensors that the configuration gives, "
            "found tensor 'blocks.0.bias'",
        ),
    ],
)
def test_checkpoint_is_compared_with_the_model(
    tmp_path, format_, expected, dtypes, prefix, message
):
    path = tmp_path / f"m.{format_}"
    (save_file if format_ == "safetensors" else torch.save)(TENSORS, path)
    found = (open_tensor_file if format_ == "safetensors" else load_pth)(path)
    if message is None:
        check_tensors(found, expected, dtypes, "toy", prefix)
    else:
        with pytest.raises(InputError, match=f"^{re.escape(message.format(path=path))}$"):
            check_tensors(found, expected, dtypes, "toy", prefix)


def test_assigned_tensors_are_not_copied_without_need():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    weight = torch.ones(2, 2)
    assign_tensors(module, {"0.weight": weight, "1.weight": weight}, "cpu", torch.float32)
    assert module[0].weight.data_ptr() == module[1].weight.data_ptr() == weight.data_ptr()
    assert not module.training and not module[0].weight.requires_grad
    assign_tensors(module, {"0.weight": weight, "1.weight": weight}, "cpu", torch.bfloat16)
    assert module[0].weight.dtype == torch.bfloat16
    assert module[0].weight.data_ptr() == module[1].weight.data_ptr()
