"""The command line with files and checkpoints that are not what they should be.

Every one is refused with one line and exit code 2, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.cli import Run, generate, refused
from tests.support.paths import PORTRAIT
from tests.support.pipeline import demo_checkpoint, speech, write_wav

DIT_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"

# ------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize("which", ["image", "audio", "checkpoint", "wav2vec"])
@pytest.mark.parametrize("what", ["missing", "empty", "text", "directory", "below a file"])
def test_files_that_are_not_what_they_should_be(
    run: Run, tmp_path: Path, wav: Path, which: str, what: str
) -> None:
    path = tmp_path / "input"
    if what in ("empty", "text"):
        path.write_text("" if what == "empty" else "Hello.\n" * 400)
    elif what == "directory":
        path.mkdir()
    elif what == "below a file":
        path = wav / "input"
    refused(run(*generate(wav, tmp_path, **{which: path})), re.escape(str(path)))
    assert not list(tmp_path.glob("*.mp4*")) + list(tmp_path.glob(".*"))


def test_images_that_cannot_be_used(run: Run, tmp_path: Path, wav: Path) -> None:
    data = PORTRAIT.read_bytes()
    cut = tmp_path / "cut.png"
    cut.write_bytes(data[: len(data) // 2])
    huge = tmp_path / "huge.png"
    at = data.index(b"IHDR") + 4
    huge.write_bytes(data[:at] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + data[at + 8 :])
    for path in (cut, huge, wav):
        refused(run(*generate(wav, tmp_path, image=path)), re.escape(str(path)))


def test_sounds_that_cannot_be_used(run: Run, tmp_path: Path, wav: Path) -> None:
    data = wav.read_bytes()
    short = write_wav(tmp_path / "short.wav", speech(0.01))
    single = write_wav(tmp_path / "single.wav", speech(1 / 16_000))
    none = write_wav(tmp_path / "none.wav", speech(0))
    cut = tmp_path / "cut.wav"
    cut.write_bytes(data[: len(data) // 2])
    header = tmp_path / "header.wav"
    header.write_bytes(data[:20])
    for path in (short, single, none, cut, header, PORTRAIT):
        refused(run(*generate(path, tmp_path)), re.escape(str(path)))
        assert not list(tmp_path.glob("*.mp4*")) + list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_sound_that_is_damaged_in_the_middle_leaves_no_file(run: Run, tmp_path: Path) -> None:
    """The error comes from the thread that reads the file, when blocks are already being made."""
    path = tmp_path / "long.flac"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        samples = (speech(70.0).T * 32767).astype("i2")
        for start in range(0, samples.shape[1], 4096):
            part = np.ascontiguousarray(samples[:, start : start + 4096])
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    refused(run(*generate(path, tmp_path)), "long.flac")
    assert [p.name for p in tmp_path.iterdir()] == ["long.flac"]


# ------------------------------------------------------------------------------ bad checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint, to be damaged."""
    return Path(shutil.copytree(demo_checkpoint(), tmp_path / "checkpoint"))


def set_key(path: Path, key: str, value: object) -> None:
    config = json.loads(path.read_text())
    if value is None:
        del config[key]
    else:
        config[key] = value
    path.write_text(json.dumps(config))


CONFIG_CHANGES: list[tuple[str, object]] = [
    *[(key, None) for key in ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "text_dim")],
    *[
        (key, value)
        for key in ("dim", "num_layers", "text_len", "context_tokens", "ffn_dim")
        for value in (2**40, 2**20, 0, -1, "256", 256.0, True, [256], {})
    ],
    ("num_layers", 1),
    ("num_layers", 3),
    ("num_heads", 3),
    ("num_heads", 256),
    ("dim", 128),
    ("freq_dim", 255),
    ("out_dim", 36),
    ("output_dim", 47),
    ("eps", "x"),
    ("eps", -1),
    ("eps", float("nan")),
    ("eps", [1e-6]),
    ("patch_size", [1, 4, 4]),
    ("model_type", "t2v"),
    ("audio_window", 7),
]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), CONFIG_CHANGES, ids=lambda value: f"{value!s:.12}")
def test_configurations_that_lie_are_refused(
    run: Run, tmp_path: Path, checkpoint: Path, wav: Path, key: str, value: object
) -> None:
    set_key(checkpoint / "config.json", key, value)
    answer = run(*generate(wav, tmp_path, checkpoint=checkpoint))
    refused(answer, re.escape(str(checkpoint)))
    assert not list(tmp_path.glob("*.mp4*")) + list(tmp_path.glob(".*"))
    refused(run("inspect", checkpoint), re.escape(str(checkpoint)))


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"dim": ' + "9" * 5000 + "}", "[" * 9999])
def test_configurations_that_are_not_json_objects(
    run: Run, tmp_path: Path, checkpoint: Path, wav: Path, text: str
) -> None:
    (checkpoint / "config.json").write_text(text, encoding="latin-1")
    refused(run(*generate(wav, tmp_path, checkpoint=checkpoint)), "config.json")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("t5_config.json", "dim", 2**15),
        ("t5_config.json", "num_layers", 200),
        ("t5_config.json", "vocab", 100),
        ("t5_config.json", "num_heads", "4"),
        ("clip_config.json", "dim", 2**15),
        ("clip_config.json", "num_layers", 200),
        ("clip_config.json", "image_size", 2**30),
        ("wav2vec/config.json", "hidden_size", 2**15),
        ("wav2vec/config.json", "num_hidden_layers", 200),
        ("wav2vec/config.json", "conv_dim", [32]),
        ("wav2vec/config.json", "conv_kernel", "x"),
        ("wav2vec/config.json", "num_attention_heads", 0),
        ("wav2vec/preprocessor_config.json", "sampling_rate", 8000),
        ("wav2vec/preprocessor_config.json", "do_normalize", "yes"),
    ],
)
def test_configurations_of_the_encoders_that_lie(
    run: Run, tmp_path: Path, checkpoint: Path, wav: Path, file: str, key: str, value: object
) -> None:
    set_key(checkpoint / file, key, value)
    refused(run(*generate(wav, tmp_path, checkpoint=checkpoint)))


WEIGHTS = [DIT_FILE, VAE_FILE, TEXT_FILE, IMAGE_FILE, "wav2vec/model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "half", "text", "zeros", "head", "directory", "huge header"]
)
def test_weight_files_that_are_damaged(
    run: Run, tmp_path: Path, checkpoint: Path, wav: Path, file: str, damage: str
) -> None:
    path = checkpoint / file
    data = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        header = {"zeros": 0, "huge header": 2**63}.get(damage, len(data) + 1)
        path.write_bytes(
            {
                "empty": b"",
                "half": data[: len(data) // 2],
                "text": b"version https://git-lfs.github.com/spec/v1\n",
            }.get(damage, struct.pack("<Q", header) + data[8:])
        )
    refused(run(*generate(wav, tmp_path, checkpoint=checkpoint)), re.escape(str(checkpoint)))
    assert not list(tmp_path.glob("*.mp4*")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("damage", ["missing tensor", "shape", "dtype"])
def test_weight_files_with_other_tensors(
    run: Run, tmp_path: Path, checkpoint: Path, wav: Path, file: str, damage: str
) -> None:
    path = checkpoint / file
    safe = file.endswith(".safetensors")
    tensors = load_file(path) if safe else torch.load(path, weights_only=True)
    # The largest: a weight that is surely used.
    name = max((n for n in tensors if "head" not in n), key=lambda n: tensors[n].numel())
    if damage == "missing tensor":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, path) if safe else torch.save(tensors, path)
    answer = run(*generate(wav, tmp_path, checkpoint=checkpoint))
    refused(answer, re.escape(str(path)), re.escape(name))


def test_half_precision_weights_of_the_dit_are_refused(
    run: Run, tmp_path: Path, checkpoint: Path, wav: Path
) -> None:
    path = checkpoint / DIT_FILE
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    refused(run(*generate(wav, tmp_path, checkpoint=checkpoint)), DIT_FILE, "float16")


def test_a_pickle_with_code_is_not_run(
    run: Run, tmp_path: Path, checkpoint: Path, wav: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"conv1.weight": Evil()}, checkpoint / VAE_FILE)
    refused(run(*generate(wav, tmp_path, checkpoint=checkpoint)), VAE_FILE)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "json", "no file"])
def test_tokenizers_that_are_damaged(
    run: Run, tmp_path: Path, checkpoint: Path, wav: Path, damage: str
) -> None:
    directory = checkpoint / TOKENIZER
    if damage in ("missing", "no file"):
        shutil.rmtree(directory)
        if damage == "no file":
            directory.mkdir()
    else:
        (directory / "tokenizer.json").write_text("" if damage == "empty" else "{}")
    answer = run(*generate(wav, tmp_path, checkpoint=checkpoint))
    refused(answer, re.escape(str(directory)))


@pytest.mark.slow
def test_a_lying_configuration_costs_no_memory(tmp_path: Path, checkpoint: Path, wav: Path) -> None:
    """Peak of the whole process, of which torch is most."""
    set_key(checkpoint / "config.json", "dim", 2**16)
    set_key(checkpoint / "t5_config.json", "dim", 2**16)
    arguments = generate(wav, tmp_path, checkpoint=checkpoint)
    script = (
        "import re, sys; from liveact.commands.cli import main; code = main(sys.argv[1:]);"
        # Not ru_maxrss, which begins at what the process that started this one had.
        "peak = re.search('VmHWM:\\s+([0-9]+)', open('/proc/self/status').read());"
        "print(code, int(peak[1]) // 1024)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
    )
    code, peak_mib = map(int, result.stdout.split("\n")[-2].split())
    assert code == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert peak_mib < 1200
