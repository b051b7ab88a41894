"""The command line: what it makes, its options and outputs; every refusal is one line, code 2."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from liveact.commands.generate import Edit
from liveact.session.session import Session
from tests.support.cli import Run, generate, refused
from tests.support.film import decode
from tests.support.paths import PORTRAIT
from tests.support.pipeline import ONE_THREAD, demo_checkpoint, speech, write_wav

DIT_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"

# ------------------------------------------------------------------------------ a whole video


@pytest.mark.parametrize(("fps", "seconds"), [(20, 2.0), (25, 2.6)])
def test_generate_writes_the_whole_video(
    run: Run, tmp_path: Path, fps: int, seconds: float
) -> None:
    wav = write_wav(tmp_path / "in.wav", speech(seconds, 44_100, 2), 44_100)
    trace = tmp_path / "trace.json"
    arguments = generate(wav, tmp_path, size="64x32", fps=fps, trace=trace, edit="1:laughing")
    code, output, errors = run(*arguments)
    assert (code, errors) == (0, "")
    count = round(seconds * fps)  # as long as the sound
    blocks = 1 + math.ceil((count - 21) / 32)
    pictures, times, sound, rate_hz = decode(tmp_path / "video.mp4")
    assert [picture.shape for picture in pictures] == [(32, 64, 3)] * count
    assert times == [pytest.approx(i / fps, abs=1e-12) for i in range(count)]
    assert sound.shape[1] == 2, "stereo is kept"
    # AAC works in frames of 1024 samples; the container says how many of the last are played.
    assert abs(len(sound) / rate_hz - count / fps) <= 1024 / rate_hz
    left, right = sound[:, 0], sound[:, 1]
    assert np.abs(left - right).max() > 0.05, "the channels stayed what they were"

    lines = output.splitlines()
    assert lines[0].startswith("device: ")
    for i, line in enumerate(lines[1 : blocks + 1]):
        pattern = rf"block {i + 1}/{blocks}: denoise \d+ ms, decode \d+ ms, overlap \d+%, "
        assert re.fullmatch(pattern + r"\d+\.\d\dx real time", line), output
    assert lines[blocks + 1].startswith("Blocks"), "one line per block, however wide"
    assert f"{count} frames" in output.splitlines()[-1]

    events = [event for event in json.loads(trace.read_text()) if event.get("ph") == "X"]
    made = [(event["name"], event["args"]["block"]) for event in events]
    for block in range(blocks):
        assert made.count(("denoise", block)) == made.count(("audio", block)) == 1
        last = math.ceil((count - 21 - 32 * (block - 1)) / 4) if block else 6
        assert made.count(("decode", block)) == min(last, 8)
    assert {event["tid"] for event in events if event["name"] == "decode"} != {
        event["tid"] for event in events if event["name"] == "denoise"
    }
    left_over = {path.name for path in tmp_path.iterdir()}
    assert left_over == {"in.wav", "trace.json", "video.mp4"}


@pytest.mark.slow
def test_equal_seeds_give_equal_pictures_and_others_do_not(
    run: Run, tmp_path: Path, wav: Path
) -> None:
    pictures = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        out = tmp_path / name
        out.mkdir()
        assert run(*generate(wav, out, seed=seed, size="128x128"))[0] == 0
        pictures.append(np.stack(decode(out / "video.mp4")[0]))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"memory": "mean", "vae_decode": "windowed", "audio_guidance": 1.5},
        {"memory": "sharded", "precision": "bf16", "device": "cpu", "vae_device": "cpu"},
        {"precision": "fp8", "wav2vec": "{demo}/wav2vec"},
        {"prompt": "x" * 100_000},
        {"prompt": "\N{ZERO WIDTH JOINER}\N{GRINNING FACE}\u202e\u0000" + "e\u0301" * 9},
        {"edit": "100:never reached"},
        {"sampler": "euler", "slots": "2/2/2/6"},
        {"slots": "2/4/2/8"},
        {"seed": -(2**63)},
        {"fps": 29.97},
    ],
    ids=lambda changes: "+".join(f"{k}={str(v)[:12]!a}" for k, v in changes.items()),
)
def test_options_that_work(run: Run, tmp_path: Path, wav: Path, changes: dict[str, object]) -> None:
    changes = {
        k: v.replace("{demo}", str(demo_checkpoint())) if isinstance(v, str) else v
        for k, v in changes.items()
    }
    code, _, errors = run(*generate(wav, tmp_path, **changes))
    assert (code, errors) == (0, "")
    assert len(decode(tmp_path / "video.mp4")[0]) == math.ceil(float(str(changes.get("fps", 20))))


def test_an_edit_that_is_never_reached_is_told(run: Run, tmp_path: Path, wav: Path) -> None:
    code, output, errors = run(*generate(wav, tmp_path, edit="1:late"))
    assert (code, errors) == (0, "")
    assert f"edit of block 1: never reached, {wav} makes 1 blocks" in output
    assert "never reached" not in run(*generate(wav, tmp_path, edit="0:first"))[1]


@pytest.mark.parametrize("fps", [20, 25])
def test_silence_is_audio(run: Run, tmp_path: Path, fps: int) -> None:
    wav = write_wav(tmp_path / "silence.wav", np.zeros((16_000, 1)))
    code, _, errors = run(*generate(wav, tmp_path, fps=fps))
    assert (code, errors) == (0, "")
    pictures, times, sound, rate_hz = decode(tmp_path / "video.mp4")
    assert len(pictures) == len(times) == fps, "one second"
    assert abs(len(sound) / rate_hz - 1) <= 1024 / rate_hz
    assert np.abs(sound).max() <= 2**-15, "expected nothing louder than a step of 16 bits"
    # Neither grey nor a still: a NaN on the way would have come out as one value everywhere.
    video = np.stack(pictures).astype(np.float64)
    assert video.std(axis=(1, 2, 3)).min() > 10, "expected texture in every picture"
    assert video.std(axis=0).mean() > 1, "expected pictures that change"


# ------------------------------------------------------------------------------ bad options


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        *[
            ({"size": size}, "size: expected")
            for size in (
                "512", "0x0", "17x32", "100000x100000", "-32x32", "x", "32x", "32x32x32", "axb",
                "16x16", "3.2e1x32", "３２x32", "9" * 5000 + "x32",
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
        ({"sampler": "ddim"}, "sampler: expected renoise, euler"),
        *[
            ({"slots": slots}, "slots: expected")
            for slots in ("", "2/2/2", "2,2,2,8", "2/2/2/-8", "2/2/2/8/1", "２/2/2/8", "9999/2/2/8")
        ],
        ({"slots": "2/2/9/8"}, "kv layout: expected"),
        ({"slots": "0/0/0/8"}, "kv layout: expected"),
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
def test_an_empty_prompt_is_a_prompt(run: Run, tmp_path: Path, wav: Path, prompt: str) -> None:
    """As in the released code: the end-of-text token is there, so there is something to encode."""
    code, _, errors = run(*generate(wav, tmp_path, prompt=prompt))
    assert (code, errors) == (0, "")
    assert len(decode(tmp_path / "video.mp4")[0]) == 20, "one second"


def test_edits_are_parsed() -> None:
    assert Edit.parse("7-8:laughing: loudly ") == Edit(7, 8, "laughing: loudly")
    assert Edit.parse("7: a-b") == Edit(7, 7, "a-b")


# ------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("option", ["out", "trace"])
def test_outputs_that_cannot_be_written(run: Run, tmp_path: Path, wav: Path, option: str) -> None:
    directory = tmp_path / "directory.mp4"
    directory.mkdir()
    for path in (tmp_path / "none" / "a.mp4", directory, PORTRAIT / "a.mp4", wav, "/proc/a.mp4"):
        refused(run(*generate(wav, tmp_path, **{option: path})), str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["directory.mp4"]
    assert list(directory.iterdir()) == []


def test_a_trace_into_a_device_is_one_line(run: Run, tmp_path: Path, wav: Path) -> None:
    refused(run(*generate(wav, tmp_path, trace="/dev/full")), "/dev/full", "found a device")
    assert list(tmp_path.iterdir()) == []


def test_an_older_video_survives_a_failure(run: Run, tmp_path: Path, wav: Path) -> None:
    (tmp_path / "video.mp4").write_text("older")
    refused(run(*generate(wav, tmp_path, trace="/dev/full")))
    assert (tmp_path / "video.mp4").read_text() == "older"


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    wav = write_wav(tmp_path / "long.wav", speech(90.0))
    process = subprocess.Popen(
        [sys.executable, "-m", "liveact", *generate(wav, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
        # A shell starts what runs in its background with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("block"):
        assert process.poll() is None
    assert list(tmp_path.glob(".video*")), "the partial file is there"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "liveact: interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["long.wav"]


def test_an_unexpected_error_while_reading_does_not_hang(
    run: Run, tmp_path: Path, wav: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Session, "push_audio", fail)
    others = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="out of luck"):
        run(*generate(wav, tmp_path))
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 5
    while any(t.name.startswith("liveact") for t in set(threading.enumerate()) - others):
        assert time.monotonic() < deadline


# ------------------------------------------------------------------------------ other commands


def test_inspect_and_doctor_say_what_there_is(run: Run) -> None:
    code, output, errors = run("inspect", demo_checkpoint(), "--size", "64x64")
    assert (code, errors) == (0, "")
    assert "random" in output and "64×64" in output and "one session, fp32" in output
    assert re.search(r"VAE decode +│ [0-9.]+ MiB on a CPU, [0-9.]+ MiB on a GPU", output)
    code, output, errors = run("doctor")
    assert (code, errors) == (0, "")
    assert "cpu backend" in output and "cuda backend" in output
    assert re.search(r"version +│ [0-9.]+, runtime [0-9.]+", output)
    assert re.search(r"GPU +│ (none: expected|.*, driver for CUDA [0-9.]+, cuBLASLt)", output)


@pytest.mark.parametrize(
    "arguments",
    [["--size", "0x0"], ["--precision", "x"], ["--audio-guidance", "0"], ["--audio-guidance=nan"]],
)
def test_inspect_refuses_bad_options(run: Run, arguments: list[str]) -> None:
    refused(run("inspect", demo_checkpoint(), *arguments))


@pytest.mark.slow
def test_output_that_cannot_show_unicode_is_no_error() -> None:
    environment = ONE_THREAD | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-m", "liveact", "inspect", str(demo_checkpoint())],
        capture_output=True,
        env=environment,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, b"")
