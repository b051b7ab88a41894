"""Checkpoints as people have them: files that are something else, missing, or not finite."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from liveact import Engine, InputError, SessionError
from liveact.checkpoint import demo, random
from liveact.checkpoint.layout import (
    DIT_STEM,
    IMAGE_CONFIG_FILE,
    IMAGE_FILE,
    TEXT_CONFIG_FILE,
    TEXT_FILE,
    TOKENIZER_DIRECTORY,
    VAE_FILE,
)
from liveact.checkpoint.opened import open_checkpoint
from liveact.checkpoint.tensors import load_pth
from liveact.commands.convert import convert
from liveact.encoders import portrait, prompt
from liveact.encoders import speech as audio
from liveact.encoders.tokens import PromptTokenizer
from liveact.encoders.weights import Weights
from liveact.vae import vae as vae_module
from tests.support.cli import Run, generate, refused
from tests.support.paths import PORTRAIT
from tests.support.pipeline import demo_checkpoint, in_time, speech

DIT_FILE = f"{DIT_STEM}.safetensors"
AUDIO_FILE = "wav2vec/model.safetensors"
TOKENIZER = f"{TOKENIZER_DIRECTORY}/tokenizer.json"
WEIGHTS = (DIT_FILE, VAE_FILE, TEXT_FILE, IMAGE_FILE, AUDIO_FILE)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 28000000000\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint, to be damaged."""
    return Path(shutil.copytree(demo_checkpoint(), tmp_path / "checkpoint"))


def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else dict(load_pth(path))


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Renamed into place: what was read is a mapping of the file."""
    new = path.with_suffix(".new")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(copies, new)
    new.rename(path)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def load(checkpoint: Path) -> Engine:
    return Engine.load(checkpoint, device="cpu")


# ------------------------------------------------------------------------ weights of another form


@pytest.mark.parametrize("file", [*WEIGHTS, TOKENIZER])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (LFS, "a git-lfs pointer in its place: run `git lfs pull` in "),
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file: get the weights as released"),
        (b"<!DOCTYPE html>\n<html>not found", "a web page in its place: download it again"),
        (b"", "an empty file: download it again"),
    ],
    ids=["lfs", "gguf", "page", "empty"],
)
def test_what_lies_in_the_place_of_weights_is_named(
    checkpoint: Path, file: str, content: bytes, found: str
) -> None:
    replace(checkpoint / file, content)
    with pytest.raises(InputError, match=re.escape(found)) as caught:
        load(checkpoint)
    line = str(caught.value)
    assert line.startswith(f"{checkpoint / file}: expected a ") and "\n" not in line
    if content == LFS:
        assert line.endswith(str((checkpoint / file).parent))


@pytest.mark.parametrize("file", [DIT_FILE, AUDIO_FILE])
def test_a_pickle_is_not_a_safetensors_file(checkpoint: Path, file: str) -> None:
    tensors = read(checkpoint / file)
    (checkpoint / file).unlink()
    torch.save(tensors, checkpoint / file)
    with pytest.raises(
        InputError, match=r"safetensors file, found a pickle of torch.save: torch.l"
    ):
        load(checkpoint)


@pytest.mark.parametrize("file", [VAE_FILE, TEXT_FILE, IMAGE_FILE])
def test_a_safetensors_file_is_not_a_pickle(checkpoint: Path, file: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in read(checkpoint / file).items()}
    (checkpoint / file).unlink()
    save_file(tensors, checkpoint / file)
    with pytest.raises(InputError, match=r"state dict, found a safetensors file: get the \.pth"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("file", "instead", "message"),
    [
        (DIT_FILE, f"{DIT_STEM}.bin", rf"found neither, but {DIT_STEM}.bin, a pickle of torch"),
        (DIT_FILE, "liveact-q4.gguf", r"found neither, but liveact-q4.gguf, a GGUF file: get"),
        (VAE_FILE, "Wan2.1_VAE.safetensors", r"found nothing, but Wan2.1_VAE.safetensors, a safet"),
        (AUDIO_FILE, "wav2vec/fairseq-ckpt.pt", r"found neither, but fairseq-ckpt.pt"),
    ],
)
def test_files_of_other_names_are_seen(
    checkpoint: Path, file: str, instead: str, message: str
) -> None:
    tensors = read(checkpoint / file)
    (checkpoint / file).unlink()
    if instead.endswith(".gguf"):
        (checkpoint / instead).write_bytes(b"GGUF" + bytes(60))
    else:
        write(checkpoint / instead, tensors)
    with pytest.raises(InputError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "module."])
def test_a_prefix_of_all_names_is_told(checkpoint: Path, file: str, prefix: str) -> None:
    path = checkpoint / file
    write(path, {prefix + name: tensor for name, tensor in read(path).items()})
    message = rf"expected tensor '.*found '{prefix}.*': remove '{prefix}' from the names"
    with pytest.raises(InputError, match=message) as caught:
        load(checkpoint)
    assert str(path) in str(caught.value)


def test_names_of_other_libraries_are_told(checkpoint: Path) -> None:
    write(checkpoint / DIT_FILE, {"blocks.0.attn1.to_q.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"expected tensor .* those of diffusers: get the weights"):
        load(checkpoint)


def test_weights_that_are_not_aligned_are_refused(checkpoint: Path) -> None:
    """The format allows them, no writer of today makes them, and a processor may not read them."""
    content = (checkpoint / DIT_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    shifted = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" "
    replace(checkpoint / DIT_FILE, shifted + content[8 + length :])
    with pytest.raises(
        InputError, match=r"expected bytes at a multiple of [24] in the file, found"
    ):
        load(checkpoint)


# ------------------------------------------------------------------- checked before it is loaded


FILES = sorted(demo.DEMO_FILES - {f"{TOKENIZER_DIRECTORY}/special_tokens_map.json"})


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Weights, "__init__", fail)
    monkeypatch.setattr(vae_module, "assign_tensors", fail)
    monkeypatch.setattr("liveact._core.Model", fail)
    monkeypatch.setattr(PromptTokenizer, "__init__", fail)


@pytest.mark.parametrize(
    "file", [f for f in FILES if f not in (f"{TOKENIZER_DIRECTORY}/tokenizer_config.json",)]
)
def test_a_missing_file_is_found_before_anything_is_loaded(
    checkpoint: Path, nothing_is_loaded: None, file: str
) -> None:
    (checkpoint / file).unlink()
    started_s = time.process_time()  # other processes do not count
    with pytest.raises(InputError) as caught:
        load(checkpoint)
    assert time.process_time() - started_s < 1
    name = Path(file).name
    if name not in (TEXT_CONFIG_FILE, IMAGE_CONFIG_FILE):  # then the sizes are the released ones
        assert name in str(caught.value) and "found n" in str(caught.value)


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_wrong_shape_is_found_before_anything_is_loaded(
    checkpoint: Path, nothing_is_loaded: None, run: Run, wav: Path, tmp_path: Path, file: str
) -> None:
    path = checkpoint / file
    tensors = read(path)
    name = max(tensors, key=lambda n: tensors[n].numel())
    write(path, tensors | {name: tensors[name][:-1]})
    wrong = (re.escape(str(path)), re.escape(name))
    with pytest.raises(InputError, match=".*".join(wrong)):
        load(checkpoint)
    refused(run(*generate(wav, tmp_path, checkpoint=checkpoint)), *wrong)
    refused(run("inspect", checkpoint), *wrong)


def test_parts_that_do_not_fit_together_are_found_too(
    checkpoint: Path, nothing_is_loaded: None
) -> None:
    sizes = demo.TEXT_CONFIG | {"dim": 32}
    (checkpoint / TEXT_CONFIG_FILE).write_text(json.dumps(sizes))
    write(checkpoint / TEXT_FILE, random.random_text_encoder(sizes, 0))
    with pytest.raises(InputError, match="text encoder width: expected 64 as in the DiT, found 32"):
        load(checkpoint)


# ------------------------------------------------------------------------ of the released size


def write_hollow_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """bf16, a real header and a hole in the place of the data."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as every writer does, so that the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_hollow_pth(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """bf16; pages that nobody touches are neither memory nor disk."""
    state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with torch.serialization.skip_data():
        torch.save(state, path)


RELEASED = demo.DIT_CONFIG | {
    "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "text_dim": 4096,
    "intermediate_dim": 512, "output_dim": 768, "context_tokens": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All files in their released sizes, 48 GB of which take 21 MB: a tokenizer and headers."""
    folder = tmp_path_factory.mktemp("released")
    raw = {key: value for key, value in RELEASED.items() if key != "_demo"}
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = random._dit_shapes(RELEASED, 12 * 768, 1280)
    shard_of = {name: f"{DIT_STEM}-{i % 8 + 1:05}.safetensors" for i, name in enumerate(shapes)}
    for shard in sorted(set(shard_of.values())):
        part = {name: shape for name, shape in shapes.items() if shard_of[name] == shard}
        write_hollow_safetensors(folder / shard, part)
    index = json.dumps({"weight_map": shard_of})
    (folder / f"{DIT_STEM}.safetensors.index.json").write_text(index)
    write_hollow_pth(folder / VAE_FILE, random._vae_shapes(96))
    missing = folder / "none"
    write_hollow_pth(folder / TEXT_FILE, prompt.shapes(prompt._read_sizes(missing)))
    write_hollow_pth(folder / IMAGE_FILE, portrait.shapes(portrait._read_sizes(missing)))
    (folder / "wav2vec").mkdir()
    (folder / "wav2vec" / "config.json").write_text("{}")
    preprocessor = json.dumps(demo.AUDIO_PREPROCESSOR_CONFIG)
    (folder / "wav2vec" / "preprocessor_config.json").write_text(preprocessor)
    sizes = audio._read_sizes(folder / "wav2vec" / "config.json")
    write_hollow_pth(folder / "wav2vec" / "pytorch_model.bin", audio.shapes(sizes))
    (folder / TOKENIZER_DIRECTORY).mkdir(parents=True)
    pieces = [[f"piece{i:028}", -1.5] for i in range(256_000)]  # as long a file as the released
    (folder / TOKENIZER).write_text(json.dumps({"model": {"type": "Unigram", "vocab": pieces}}))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_released_size_is_inspected_from_headers(released: Path, run: Run) -> None:
    started_s = time.process_time()  # other processes do not count
    code, output, errors = run("inspect", released)
    seconds = time.process_time() - started_s
    assert (code, errors) == (0, "")
    for row in (
        r"DiT\W+18,\d{3}\.\d M parameters, 40 layers",
        r"text encoder\W+5,680\.\d M parameters, 10\.58 GiB",
        r"image encoder\W+63\d\.\d M parameters, 1\.18 GiB",
        r"audio encoder\W+94\.4 M parameters, 180\.\d MiB",
        r"VAE\W+126\.9 M parameters, 242\.\d MiB",
    ):
        assert re.search(row, output), (row, output)
    print(f"inspect: {seconds:.2f} s")
    assert seconds < 2


def test_the_audio_encoder_may_lie_elsewhere(checkpoint: Path, run: Run) -> None:
    (checkpoint / "wav2vec").rename(checkpoint.parent / "elsewhere")
    refused(run("inspect", checkpoint), r"wav2vec.*found nothing")
    code, output, errors = run("inspect", checkpoint, "--wav2vec", checkpoint.parent / "elsewhere")
    assert (code, errors) == (0, "") and "audio encoder" in output


@pytest.mark.slow
def test_the_released_size_is_checked_in_a_second(released: Path, nothing_is_loaded: None) -> None:
    """What `Engine.load` does before it loads anything."""
    times_s = []
    for _ in range(3):
        started_s = time.process_time()
        open_checkpoint(released)
        times_s.append(time.process_time() - started_s)
    print(f"check: {min(times_s):.2f} s")
    assert min(times_s) < 1


# ------------------------------------------------------------------------------- not finite


def spoil(path: Path, name: str, value: float) -> None:
    tensors = {n: t.clone() for n, t in read(path).items()}
    tensors[name].view(-1)[-1] = value
    write(path, tensors)


def make_blocks(engine: Engine) -> int:
    with engine.open_session(
        image=PORTRAIT, prompt="A person.", size=(32, 32), vae_decode="streaming"
    ) as session:
        session.push_audio(speech(1.0), 16_000)
        session.end_of_audio()
        return len(in_time(lambda: list(session)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("file", "name", "what"),
    [
        (TEXT_FILE, "norm.weight", "text encoder"),
        (IMAGE_FILE, "visual.transformer.0.mlp.2.bias", "image encoder"),
        (VAE_FILE, "encoder.head.2.bias", "VAE encoder"),
    ],
)
def test_encoders_that_are_not_finite_are_refused_at_the_door(
    checkpoint: Path, file: str, name: str, what: str, value: float
) -> None:
    if file == VAE_FILE:
        tensors = read(checkpoint / file)
        write(checkpoint / file, tensors | {name: torch.full_like(tensors[name], value)})
    else:
        spoil(checkpoint / file, name, value)
    engine = load(checkpoint)
    before = engine.dit.device.allocated_bytes
    message = f"^{what}: expected finite numbers, found a NaN or an infinity"
    with pytest.raises(InputError, match=message):
        make_blocks(engine)
    assert engine.dit.device.allocated_bytes == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        (VAE_FILE, "decoder.head.2.bias", "block 0: VAE: expected finite pictures, found a NaN"),
        (VAE_FILE, "decoder.conv1.bias", "block 0: VAE: expected finite pictures, found a NaN"),
        (AUDIO_FILE, "encoder.layer_norm.bias", "block 0: expected finite audio features, found"),
    ],
)
def test_blocks_that_are_not_finite_are_an_error(
    checkpoint: Path, run: Run, wav: Path, tmp_path: Path, file: str, name: str, message: str,
    value: float,
) -> None:  # fmt: skip
    spoil(checkpoint / file, name, value)
    with pytest.raises(SessionError, match=message):
        make_blocks(load(checkpoint))
    code, _, errors = run(*generate(wav, tmp_path, checkpoint=checkpoint))
    assert code == 1 and message in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.glob("*.mp4*"))


def test_a_decoder_may_be_used_again_after_a_reset() -> None:
    vae = vae_module.Vae.load(demo_checkpoint() / VAE_FILE)
    decoder = vae.open_stream()
    latents = torch.zeros(16, 2, 4, 4)
    with pytest.raises(SessionError, match="VAE: expected finite pictures"):
        list(decoder.decode(latents * torch.nan))
    decoder.reset()
    assert len(list(decoder.decode(latents))) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blocks.1.ffn.2.weight", "blocks.0.norm3.bias"])
def test_convert_refuses_what_is_not_finite(
    checkpoint: Path, tmp_path: Path, name: str, value: float
) -> None:
    spoil(checkpoint / DIT_FILE, name, value)
    message = f"{checkpoint / DIT_FILE}: DiT: tensor {name!r}: expected finite values, found a NaN"
    with pytest.raises(InputError, match=re.escape(message)):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
