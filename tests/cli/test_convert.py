"""`liveact convert`: what it writes, that it loads as it lies, and that it computes the same."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from liveact import _core
from liveact.checkpoint.layout import DIT_STEM
from liveact.checkpoint.random import random_checkpoint
from liveact.checkpoint.tensors import open_tensors
from liveact.commands import convert as convert_module
from liveact.commands.convert import convert
from liveact.device.devices import open_devices
from liveact.dit.dit import Dit
from liveact.dit.precision import Precision, PrecisionPolicy, auto_policy, converted_precision
from liveact.dit.weights import product_weights
from liveact.errors import InputError
from tests.support.cli import Run, generate, refused
from tests.support.demo_dit import ALL, NUM_LAYERS, policy, two_blocks
from tests.support.pipeline import ONE_THREAD, demo_checkpoint

MIXED = policy((0, "self_qkv"), (0, "attention"), (1, "ffn_down"), (1, "cross_q"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "fp8"
    convert(demo_checkpoint(), directory, "fp8")
    return directory


# ------------------------------------------------------------------------------ what is written


def test_products_are_fp8_and_the_rest_keeps_its_bytes(converted: Path) -> None:
    before = load_file(demo_checkpoint() / f"{DIT_STEM}.safetensors")
    after = open_tensors(converted, DIT_STEM)
    products = product_weights(NUM_LAYERS)
    assert set(after) == set(before) | {f"{name}_scale" for name in products}
    for name, tensor in before.items():
        if name not in products:
            assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
            continue
        codes, scale = after[name], after[f"{name}_scale"]
        assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
        # The fp8 contract in torch: one scale per output channel, round to nearest even.
        amax = tensor.float().abs().amax(1).clamp_min(1e-12)
        inverse = torch.full_like(amax, 448) / amax  # `448 / amax` is another rounding in torch
        assert torch.equal(scale, amax / 448)
        expected = (tensor.float() * inverse[:, None]).to(torch.float8_e4m3fn)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)), name


def test_the_record_says_what_was_done(converted: Path) -> None:
    raw = json.loads((converted / "config.json").read_text())
    record = raw.pop("_converted")
    assert raw == json.loads((demo_checkpoint() / "config.json").read_text())
    assert record["precision"] == "fp8" and converted_precision(converted) == "fp8"
    files = sorted(path.name for path in converted.glob("*.safetensors"))
    assert files == sorted(record["sha256"])
    for name, expected in record["sha256"].items():
        assert hashlib.sha256((converted / name).read_bytes()).hexdigest() == expected
    assert converted_precision(demo_checkpoint()) is None


@pytest.mark.parametrize("shard_bytes", [1, 300_000, 10**9])
def test_shards_hold_what_fits(tmp_path: Path, shard_bytes: int, converted: Path) -> None:
    result = convert(demo_checkpoint(), tmp_path / "out", "fp8", shard_bytes=shard_bytes)
    shards = sorted((tmp_path / "out").glob(f"{DIT_STEM}-*.safetensors"))
    assert len(shards) == result.shards
    index = json.loads((tmp_path / "out" / f"{DIT_STEM}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.bytes_after
    sizes = []
    for number, shard in enumerate(shards, 1):
        assert shard.name == f"{DIT_STEM}-{number:05}-of-{len(shards):05}.safetensors"
        tensors = load_file(shard)  # the library's own reader
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        assert all(f"{n}_scale" in tensors for n, t in tensors.items() if t.itemsize == 1)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= shard_bytes or len(tensors) <= 2
    assert sum(sizes) == result.bytes_after < result.bytes_before
    if shard_bytes == 300_000:
        assert len(shards) > 3
    assert torch.equal(two_blocks("fp8", tmp_path / "out"), two_blocks("fp8", converted))


def test_odd_sizes_are_aligned(tmp_path: Path) -> None:
    """Every fp32 and bf16 tensor begins at a multiple of its element, whatever lies before it."""
    source = tmp_path / "odd"
    source.mkdir()
    sizes = {"dim": 30, "num_heads": 3, "ffn_dim": 37, "num_layers": 1, "text_dim": 5}
    sizes |= {"intermediate_dim": 9, "output_dim": 11, "context_tokens": 1, "freq_dim": 6}
    config = json.loads((demo_checkpoint() / "config.json").read_text()) | sizes
    (source / "config.json").write_text(json.dumps(config))
    weights = random_checkpoint(config, 0, audio_layers=1, audio_channels=3, clip_dim=5)
    save_file(weights, source / f"{DIT_STEM}.safetensors")
    out = tmp_path / "out"
    narrow = PrecisionPolicy(policy((0, "ffn_up")).layers[:1])  # 37 · 30 bytes, no multiple of 4
    assert convert(source, out, narrow).shards == 1
    tensors = load_file(next(out.glob("*.safetensors")))
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in tensors.values())
    raw = next(out.glob("*.safetensors")).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0, name
    assert Dit.load(out, _core.open_cpu(), narrow).config.ffn_dim == 37


def test_other_files_are_linked_or_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo_checkpoint(), source)
    (source / ".cache").mkdir()
    (source / ".cache" / "junk").write_text("x")
    (source / "loop").symlink_to(source, target_is_directory=True)
    elsewhere = tmp_path / "blob"
    (source / "clip_config.json").rename(elsewhere)
    (source / "clip_config.json").symlink_to(elsewhere)
    result = convert(source, tmp_path / "linked")
    assert not result.copied and len(result.linked) == 11
    for name in result.linked:
        assert (tmp_path / "linked" / name).samefile(source / name)
        assert not (tmp_path / "linked" / name).is_symlink()
    assert not (tmp_path / "linked" / ".cache").exists()
    assert not (tmp_path / "linked" / "loop").exists()

    def no_links(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    result = convert(source, tmp_path / "copied")
    assert not result.linked and len(result.copied) == 11
    for name in result.copied:
        assert not (tmp_path / "copied" / name).samefile(source / name)
        assert (tmp_path / "copied" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Anonymous memory: the files are mapped, and mapped pages are the kernel's to drop."""
    script = """
import sys
from pathlib import Path
from liveact.commands.convert import convert

def anonymous():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

seen = []
shard = int(sys.argv[3])
convert(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=shard,
        progress=lambda *_: seen.append(anonymous()))
print(max(seen) - seen[0])
"""
    shard = 4_000_000
    source = tmp_path / "large"
    source.mkdir()
    # 40 layers of the demo checkpoint's size: 63 MB of bf16.
    raw = json.loads((demo_checkpoint() / "config.json").read_text()) | {"num_layers": 40}
    (source / "config.json").write_text(json.dumps(raw))
    tensors = load_file(demo_checkpoint() / f"{DIT_STEM}.safetensors")
    layer = {n[len("blocks.0.") :]: t for n, t in tensors.items() if n.startswith("blocks.0.")}
    large = {f"blocks.{i}.{name}": t.clone() for i in range(40) for name, t in layer.items()}
    save_file(tensors | large, source / f"{DIT_STEM}.safetensors")
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out"), str(shard)]
    result = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, check=False)
    assert result.returncode == 0, result.stderr
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert written > 36e6
    # One shard, and 8 MB that allocators may keep.
    assert int(result.stdout) < shard + 8e6


# ------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("precision", ["fp8", "auto", MIXED], ids=["fp8", "auto", "policy"])
def test_results_are_those_of_quantising_at_load(tmp_path: Path, precision: Precision) -> None:
    """Bit for bit; and by default it loads as what it was converted to."""
    out = tmp_path / "out"
    convert(demo_checkpoint(), out, precision)
    chosen = open_devices("cpu", None, None, out).precision
    assert chosen == precision
    assert torch.equal(two_blocks(chosen, out), two_blocks(precision))


def test_auto_leaves_the_choice_to_who_loads(tmp_path: Path) -> None:
    """Its weights stay bf16 in the files, and may still be quantised where memory is short."""
    out = tmp_path / "out"
    convert(demo_checkpoint(), out)
    assert converted_precision(out) == "auto"
    tensors = open_tensors(out, DIT_STEM)
    wide = {
        product
        for name, (_, product) in product_weights(NUM_LAYERS).items()
        if tensors.dtype(name) == torch.bfloat16
    }
    assert wide == {"cross_kv"}
    for precision in (auto_policy(NUM_LAYERS, "fp8"), "fp8"):
        assert torch.equal(two_blocks(precision, out), two_blocks("fp8"))


def test_the_recorded_model_computes_the_same(golden: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    convert(golden / "dit", out)
    results = []
    for checkpoint, options in ((golden / "dit", ["--precision=auto"]), (out, [])):
        result = tmp_path / "result.safetensors"
        arguments = ["--checkpoint", checkpoint, "--inputs", golden / "dit/inputs.safetensors"]
        code, _, errors = run(
            "replay", "--part=dit", "--device=cpu", *arguments, "--out", result, *options
        )
        assert (code, errors) == (0, "")
        results.append(load_file(result))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_weights_are_used_where_they_are_mapped(converted: Path) -> None:
    """What the CPU allocates are scales, biases, norms and constants, but no weight."""
    device = _core.open_cpu()
    dit = Dit.load(converted, device, "fp8")
    mapped = device.allocated_bytes
    weights = product_weights(NUM_LAYERS)
    fp8_bytes = sum(dit._tensors[name].nbytes for name in weights)
    converting = _core.open_cpu()
    other = Dit.load(demo_checkpoint(), converting, "fp8")
    assert converting.allocated_bytes - mapped == fp8_bytes > 1e6
    assert other.device is converting


def test_attention_stays_free_to_choose(converted: Path) -> None:
    """It has no weights, so a policy may differ from what was converted there."""
    products = policy(*(choice for choice in ALL if choice[1] != "attention"))
    assert torch.equal(two_blocks(products, converted), two_blocks(products))


# ------------------------------------------------------------------------------------ refusals


def test_a_wider_precision_is_refused(converted: Path, run: Run, wav: Path, tmp_path: Path) -> None:
    expected = r"precision with fp8 for self_qkv of layer 0, as its weights were converted, found "
    answer = run(*generate(wav, tmp_path, checkpoint=converted, precision="bf16", device="cpu"))
    refused(answer, re.escape(str(converted)), expected + "bf16")
    refused(run("inspect", converted, "--precision", "fp32"), expected + "fp32")
    with pytest.raises(InputError, match="ffn_up of layer 1"):
        narrow = [choice for choice in ALL if choice != (1, "ffn_up")]
        Dit.load(converted, _core.open_cpu(), policy(*narrow))


@pytest.mark.parametrize(
    ("out", "precision", "expected"),
    [
        ("new", "bf16", "precision: expected auto, fp8 or a policy .* found bf16"),
        ("used", "fp8", "expected nothing or an empty directory, found other files in it"),
        ("file", "fp8", "expected nothing or an empty directory, found a file"),
        ("no/such", "fp8", "expected the directory .*no to exist"),
        ("demo/fp8", "fp8", "expected a directory outside of the checkpoint"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, out: str, precision: str, expected: str
) -> None:
    source = tmp_path / "demo"
    shutil.copytree(demo_checkpoint(), source)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=expected):
        convert(source, tmp_path / out, precision)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_converted_checkpoint_is_not_converted_again(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a checkpoint as released, found a converted"):
        convert(converted, tmp_path / "again")


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500_000))
    with pytest.raises(InputError, match=r"expected 0\.00\d+ GB of free space .*found \S+ GB"):
        convert(demo_checkpoint(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_what_breaks_halfway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(convert_module, "_link", fail)
    (tmp_path / "out").mkdir()  # empty: allowed
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError):
        convert(demo_checkpoint(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any((tmp_path / "out").iterdir())


def damage(directory: Path, change: Any) -> None:
    """Rewrites the only shard with `change(tensors)`."""
    shard = next(directory.glob(f"{DIT_STEM}-*.safetensors"))
    tensors = load_file(shard)
    change(tensors)
    shard.unlink()
    (directory / f"{DIT_STEM}.safetensors.index.json").unlink()
    save_file(tensors, directory / f"{DIT_STEM}.safetensors")


SCALE = "blocks.1.ffn.2.weight_scale"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(SCALE), f"expected tensor '{SCALE}' of shape .256., found none"),
        (lambda t: t.update({SCALE: torch.ones(255)}), "expected shape .256., found .255."),
        (lambda t: t.update({SCALE: torch.ones(256).bfloat16()}), "expected dtype float32"),
        (
            lambda t: t.update({"head.head.weight": t["head.head.weight"].to(torch.float8_e4m3fn)}),
            "head.head.weight': expected dtype",
        ),
        (lambda t: t.update({"blocks.9.x": torch.ones(1)}), "found tensor 'blocks.9.x'"),
    ],
)
def test_a_damaged_one_is_refused(
    converted: Path, tmp_path: Path, change: Any, expected: str
) -> None:
    shutil.copytree(converted, tmp_path / "bad")
    damage(tmp_path / "bad", change)
    with pytest.raises(InputError, match=expected):
        Dit.load(tmp_path / "bad", _core.open_cpu(), "fp8")


def test_fp8_of_other_makers_is_refused(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in raw.items() if k != "_converted"}))
    with pytest.raises(InputError, match=r"expected dtype .*found float8_e4m3fn"):
        Dit.load(tmp_path / "other", _core.open_cpu(), "fp8")
    for record, expected in (
        ({"version": 2}, "_converted of version 1"),
        ([], "_converted of version 1"),
        ({"version": 1, "precision": "bf16"}, "precision auto, fp8 or a policy, found 'bf16'"),
        ({"version": 1, "precision": {}}, "expected a precision policy"),
    ):
        path.write_text(json.dumps(raw | {"_converted": record}))
        with pytest.raises(InputError, match=expected):
            Dit.load(tmp_path / "other", _core.open_cpu(), "fp8")


# -------------------------------------------------------------------------------- command line


def test_the_command_line(run: Run, wav: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(MIXED.text())
    out = tmp_path / "out"
    code, output, errors = run("convert", demo_checkpoint(), "--out", out, "--precision", path)
    assert (code, errors) == (0, "")
    assert re.search(r"mine.json \(4 of 20 in fp8\), DiT .* 11 hard-linked, 0 copied", output)
    code, output, _ = run("inspect", out)
    assert code == 0
    words = " ".join(re.sub("[│─┌┐└┘┬┴]", " ", output).split())
    assert "in 1, converted: out (4 of 20 in fp8), loads as it lies" in words
    assert "precision out (4 of 20 in fp8)" in words
    code, output, errors = run(*generate(wav, tmp_path, checkpoint=out, device="cpu"))
    assert (code, errors) == (0, "")
    assert "cpu, out (4 of 20 in fp8);" in output
    refused(run("convert", demo_checkpoint(), "--out", out), "expected nothing or an empty")
    refused(run("convert", demo_checkpoint(), "--out", tmp_path / "n", "--precision=x"), "fp8")
