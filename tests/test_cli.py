"""The command line: what it makes, and that every bad input is one line and exit code 2."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from pipeline_helpers import ONE_THREAD, PORTRAIT, demo_checkpoint, speech, write_wav
from safetensors.torch import load_file, save_file

from liveact import cli
from liveact.generate import Edit
from liveact.session import Session

DIT_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.0 s: one block at 20 fps."""
    return write_wav(tmp_path_factory.mktemp("audio") / "speech.wav", speech(1.0))


def generate(wav: Path, directory: Path, **changes: object) -> list[str]:
    """Arguments of `generate`; a change to None leaves an option out."""
    options: dict[str, object] = {
        "checkpoint": demo_checkpoint(),
        "image": PORTRAIT,
        "audio": wav,
        "prompt": "A person is speaking.",
        "size": "32x32",
        "out": directory / "video.mp4",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    # With "=", so that a value may begin with a dash.
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["generate", *given]


def refused(answer: tuple[int, str, str], *expected: str) -> None:
    """Exit code 2 and exactly one line, which has each of `expected` (regular expressions)."""
    code, _, errors = answer
    assert code == 2, (code, errors)
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("liveact: "), errors
    for pattern in expected:
        assert re.search(pattern, errors), f"{pattern!r} not in {errors!r}"


# ------------------------------------------------------------------------------ a whole video


def decode(path: Path) -> tuple[list[np.ndarray], list[Any], np.ndarray, Any]:
    """Pictures, their times in seconds (exact fractions), sound [n, channels], its rate."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        pictures, times = [], []
        for picture in container.decode(video):
            pictures.append(picture.to_ndarray(format="rgb24"))
            times.append(picture.pts * picture.time_base)
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.audio[0]))
    sound = np.concatenate([frame.to_ndarray().T for frame in frames])
    return pictures, times, sound, frames[0].sample_rate


@pytest.mark.parametrize(("fps", "seconds"), [(20, 2.0), (25, 2.6)])
def test_generate_writes_the_whole_video(
    run: Run, tmp_path: Path, fps: int, seconds: float
) -> None:
    wav = write_wav(tmp_path / "in.wav", speech(seconds, 44_100, 2), 44_100)
    trace = tmp_path / "trace.json"
    arguments = generate(wav, tmp_path, size="64x32", fps=fps, trace=trace, edit="1:laughing")
    code, output, errors = run(*arguments)
    assert (code, errors) == (0, "")
    blocks = math.floor(seconds * fps / 32) + 1
    count = 21 + 32 * (blocks - 1)
    pictures, times, sound, rate_hz = decode(tmp_path / "video.mp4")
    assert [picture.shape for picture in pictures] == [(32, 64, 3)] * count
    assert times == [pytest.approx(i / fps, abs=1e-12) for i in range(count)]
    assert sound.shape[1] == 2, "stereo is kept"
    # AAC works in frames of 1024 samples; the container says how many of the last are played.
    assert abs(len(sound) / rate_hz - count / fps) <= 1024 / rate_hz
    left, right = sound[:, 0], sound[:, 1]
    assert np.abs(left - right).max() > 0.05, "the channels stayed what they were"

    lines = [line for line in output.splitlines() if line.startswith("block ")]
    assert len(lines) == blocks, output
    assert all("overlap" in line and "real time" in line for line in lines)
    assert f"{count} frames" in output.splitlines()[-1]

    events = [event for event in json.loads(trace.read_text()) if event.get("ph") == "X"]
    made = [(event["name"], event["args"]["block"]) for event in events]
    for block in range(blocks):
        assert made.count(("denoise", block)) == made.count(("audio", block)) == 1
        assert made.count(("decode", block)) == (6 if block == 0 else 8)
    assert {event["tid"] for event in events if event["name"] == "decode"} != {
        event["tid"] for event in events if event["name"] == "denoise"
    }
    left_over = {path.name for path in tmp_path.iterdir()}
    assert left_over == {"in.wav", "trace.json", "video.mp4"}


def test_equal_seeds_give_equal_pictures_and_others_do_not(
    run: Run, tmp_path: Path, wav: Path
) -> None:
    pictures = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        out = tmp_path / name
        out.mkdir()
        assert run(*generate(wav, out, seed=seed))[0] == 0
        pictures.append(np.stack(decode(out / "video.mp4")[0]))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": "mean", "vae_decode": "windowed", "audio_guidance": 1.5},
        {"memory": "sharded", "precision": "bf16", "device": "cpu", "vae_device": "cpu"},
        {"precision": "fp8", "wav2vec": "{demo}/wav2vec"},
        {"prompt": "x" * 100_000},
        {"prompt": "\N{ZERO WIDTH JOINER}\N{GRINNING FACE}\u202e\u0000" + "e\u0301" * 9},
        {"edit": "100:never reached"},
        {"seed": -(2**63)},
        {"fps": 29.97},
    ],
    ids=lambda changes: "+".join(f"{k}={str(v)[:12]!a}" for k, v in changes.items()),
)
def test_options_that_work(
    run: Run, tmp_path: Path, wav: Path, changes: dict[str, object]
) -> None:
    changes = {
        k: v.replace("{demo}", str(demo_checkpoint())) if isinstance(v, str) else v
        for k, v in changes.items()
    }
    code, _, errors = run(*generate(wav, tmp_path, **changes))
    assert (code, errors) == (0, "")
    fps = float(changes.get("fps", 20))
    assert len(decode(tmp_path / "video.mp4")[0]) == (21 if fps == 20 else 21)


@pytest.mark.parametrize("fps", [20, 25])
def test_silence_is_audio(run: Run, tmp_path: Path, fps: int) -> None:
    wav = write_wav(tmp_path / "silence.wav", np.zeros((16_000, 1)))
    assert run(*generate(wav, tmp_path, fps=fps))[0] == 0


# ------------------------------------------------------------------------------ bad options


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        *[
            ({"size": size}, "size: expected")
            for size in (
                "512", "0x0", "17x32", "100000x100000", "-32x32", "x", "32x", "32x32x32", "axb",
                "16x16", "3.2e1x32", "32×32", "9" * 5000 + "x32",
            )
        ],
        *[({"fps": fps}, "fps") for fps in ("0", "-1", "nan", "inf", "1e9", "x", "")],
        *[({"device": d}, "device: expected.*" + re.escape(d)) for d in ("cuda:0", "cuda")],
        *[({"device": d}, "device: expected cpu or cuda:N") for d in ("cuda:x", "tpu", "cuda:-1")],
        ({"vae_device": "cuda:0"}, "vae-device: expected"),
        ({"vae_device": "gpu"}, "expected cpu or cuda:N"),
        ({"precision": "fp4"}, "precision: expected"),
        ({"memory": "total"}, "memory: expected"),
        ({"vae_decode": "fast"}, "vae-decode: expected"),
        *[
            ({"edit": edit}, "edit: expected")
            for edit in (
                "8-7:x", "a:b", "3", "3:", "3: ", ":x", "-1:x", "1-:x", "1--2:x", "²:x",
                "9" * 5000 + ":x",
            )
        ],
        *[({"seed": seed}, "seed") for seed in ("x", "1.5", "", str(2**63), "9" * 5000)],
        *[
            ({"audio_guidance": g}, "audio.guidance")
            for g in ("nan", "0.5", "inf", "-1", "x", "1e9")
        ],
        ({"image": None}, "--image"),
        ({"prompt": None}, "--prompt"),
        ({"prompt": "\udcff"}, "prompt"),
        ({"bogus": 1}, "--bogus"),
    ],
    ids=lambda value: ",".join(f"{k}={v!s:.14}" for k, v in value.items())
    if isinstance(value, dict)
    else "",
)  # fmt: skip
def test_bad_options_are_refused(
    run: Run, tmp_path: Path, wav: Path, changes: dict[str, object], expected: str
) -> None:
    refused(run(*generate(wav, tmp_path, **changes)), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["inspect"], ["replay", "--part", "dit"], ["demo-checkpoint"]]
)
def test_bad_commands_are_refused(run: Run, arguments: list[str]) -> None:
    refused(run(*arguments))


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_an_empty_prompt_is_a_prompt(
    run: Run, tmp_path: Path, wav: Path, prompt: str
) -> None:
    """As in the released code: the end-of-text token is there, so there is something to encode."""
    code, _, errors = run(*generate(wav, tmp_path, prompt=prompt))
    assert (code, errors) == (0, "")


def test_edits_are_parsed() -> None:
    assert Edit.parse("7-8:laughing: loudly ") == Edit(7, 8, "laughing: loudly")
    assert Edit.parse("7: a-b") == Edit(7, 7, "a-b")


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
        refused(run(*generate(path, tmp_path)))
        assert not list(tmp_path.glob("*.mp4*")) + list(tmp_path.glob(".*"))


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


def test_a_lying_configuration_costs_no_memory(
    tmp_path: Path, checkpoint: Path, wav: Path
) -> None:
    """Peak of the whole process, of which torch and the encoders' library are most."""
    set_key(checkpoint / "config.json", "dim", 2**16)
    set_key(checkpoint / "t5_config.json", "dim", 2**16)
    arguments = generate(wav, tmp_path, checkpoint=checkpoint)
    script = (
        "import resource, sys; from liveact.cli import main; code = main(sys.argv[1:]);"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
    )
    code, peak_mib = map(int, result.stdout.split("\n")[-2].split())
    assert code == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert peak_mib < 1200


# ------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("option", ["out", "trace"])
def test_outputs_that_cannot_be_written(
    run: Run, tmp_path: Path, wav: Path, option: str
) -> None:
    directory = tmp_path / "directory.mp4"
    directory.mkdir()
    for path in (tmp_path / "none" / "a.mp4", directory, PORTRAIT / "a.mp4", wav, "/proc/a.mp4"):
        refused(run(*generate(wav, tmp_path, **{option: path})), str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["directory.mp4"]
    assert list(directory.iterdir()) == []


def test_a_full_disk_under_the_trace_is_one_line(run: Run, tmp_path: Path, wav: Path) -> None:
    refused(run(*generate(wav, tmp_path, trace="/dev/full")), "/dev/full", "No space left")
    assert list(tmp_path.iterdir()) == []


def test_an_older_video_survives_a_failure(run: Run, tmp_path: Path, wav: Path) -> None:
    (tmp_path / "video.mp4").write_text("older")
    refused(run(*generate(wav, tmp_path, trace="/dev/full")))
    assert (tmp_path / "video.mp4").read_text() == "older"


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    wav = write_wav(tmp_path / "long.wav", speech(90.0))
    process = subprocess.Popen(
        [sys.executable, "-m", "liveact.cli", *generate(wav, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("block"):
        assert process.poll() is None
    assert list(tmp_path.glob(".video*")), "the partial file is there"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "liveact: interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["long.wav"]


def test_a_reader_that_goes_away_ends_it(tmp_path: Path, wav: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "liveact.cli", *generate(wav, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_an_unexpected_error_while_reading_does_not_hang(
    run: Run, tmp_path: Path, wav: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Session, "push_audio", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(*generate(wav, tmp_path))
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 5
    while any(t.name.startswith("liveact") for t in threading.enumerate()):
        assert time.monotonic() < deadline


# ------------------------------------------------------------------------------ other commands


def test_inspect_and_doctor_say_what_there_is(run: Run) -> None:
    code, output, errors = run("inspect", demo_checkpoint(), "--size", "64x64")
    assert (code, errors) == (0, "")
    assert "random" in output and "64×64" in output and "one session, fp32" in output
    code, output, errors = run("doctor")
    assert (code, errors) == (0, "")
    assert "cpu backend" in output and "cuda backend" in output


@pytest.mark.parametrize(
    "arguments",
    [["--size", "0x0"], ["--precision", "x"], ["--audio-guidance", "0"], ["--audio-guidance=nan"]],
)
def test_inspect_refuses_bad_options(run: Run, arguments: list[str]) -> None:
    refused(run("inspect", demo_checkpoint(), *arguments))


def test_output_that_cannot_show_unicode_is_no_error() -> None:
    environment = ONE_THREAD | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-m", "liveact.cli", "inspect", str(demo_checkpoint())],
        capture_output=True,
        env=environment,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, b"")
