"""What callers pass to Engine and Session: odd types and values are one line at the door."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from liveact import Engine, InputError, LiveActError
from liveact.device.devices import open_devices
from liveact.dit.dit import MemoryPolicy
from liveact.media.image import fit_image, read_image
from tests.support.paths import PORTRAIT
from tests.support.pipeline import demo_checkpoint, speech
from tests.support.session import RATE_HZ, open_session, take


def refused(call: Callable[[], object], name: str) -> None:
    """InputError of one short line that begins with the argument's name."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert re.match(rf"{name}: expected .+, found .+", line), line
    assert "\n" not in line and len(line) < 250, line


class Odd:
    """Of no type that anything expects."""


NUMBERS: tuple[object, ...] = (None, "20", True, 1j, [20], Odd(), float("nan"), float("inf"))
WHOLE: tuple[object, ...] = (*NUMBERS, 1.5, 42.0, "42", Fraction(1), np.float32(1))
TEXTS: tuple[object, ...] = (None, 5, b"text", ["text"], Odd(), "\ud800")

BAD_OPTIONS: list[tuple[str, object]] = [
    *[("size", v) for v in ("64x64", 512, None, (512,), (64, 64, 64), {64, 32}, Odd(), np.ones(2))],
    *[("size", (v, 64)) for v in WHOLE],
    *[("fps", v) for v in (*NUMBERS, 0, 101, -20)],
    *[("seed", v) for v in (*WHOLE, 2**63, -(2**63) - 1)],
    *[("prompt", v) for v in TEXTS],
    *[("image", v) for v in (None, 5, b"me.png", [[0]], torch.zeros(3, 8, 8), Odd())],
    *[("image", np.zeros(shape, np.uint8)) for shape in ((8,), (8, 8, 2), (0, 8, 3), (1, 8, 8, 3))],
    *[("image", np.zeros((8, 8, 3), dtype)) for dtype in ("f4", "i4", "u2", "?", "O")],
    *[("audio_guidance", v) for v in (*NUMBERS, 0.5, 101)],
    *[("memory", v) for v in (None, 5, ["mean"], {}, "Mean", "", Odd())],
    *[("memory", MemoryPolicy(v)) for v in (None, 5, [], "total")],  # type: ignore[arg-type]
    *[("sampler", v) for v in (None, 1, "Euler")],
    *[("vae_decode", v) for v in (None, True, ["streaming"], "fast")],
    *[("audio_mode", v) for v in (None, True, {}, "both")],
    *[("idle", v) for v in (None, True, ["wait"], "Silence")],
    *[("max_backlog_s", v) for v in ("3", True, 1j, [3], Odd(), float("nan"), -1, 0, 1e-3)],
    *[("sample_rate", v) for v in ("48000", True, 48_000.0, 0, 3_999, 384_001, Odd())],
    *[("channels", v) for v in ("2", True, 2.0, 0, -1, 65, Odd())],
    *[("trace", v) for v in (5, b"trace", True, Odd(), "a\0b")],
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=lambda value: f"{value!r:.20}")
def test_options_of_a_session(engine: Engine, name: str, value: object) -> None:
    before = engine.dit.device.allocation_count
    refused(lambda: open_session(engine, **{name: value}), name)
    assert engine.dit.device.allocation_count == before


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"slots": None}, "slots"),
        ({"slots": 14}, "slots"),
        ({"slots": (2, 2, 2)}, "slots"),
        ({"slots": (2, 2, 2, 8, 1)}, "slots"),
        ({"slots": (2, 2, 2, 8.0)}, "slots"),
        ({"slots": (2, 2, 2, -8)}, "slots"),
        ({"slots": (2, 2, 2, 10**9)}, "slots"),
        ({"slots": ("2", 2, 2, 8)}, "slots"),
        ({"compress_axis": None}, "compress_axis"),
        ({"value_filter": "both"}, "value_filter"),
    ],
)
def test_memory_policies(engine: Engine, options: dict[str, Any], name: str) -> None:
    refused(lambda: open_session(engine, memory=MemoryPolicy(**options)), name)


def test_slots_that_do_not_go_together_leave_nothing(engine: Engine) -> None:
    before = engine.dit.device.allocated_bytes
    for slots in ((2, 2, 9, 8), (0, 0, 0, 8), (2, 2, 2, 1)):
        with pytest.raises(InputError, match=r"expected .*found"):
            open_session(engine, memory=MemoryPolicy(slots=slots))
    assert engine.dit.device.allocated_bytes == before


def test_numbers_of_every_kind_are_taken(engine: Engine) -> None:
    options: dict[str, Any] = {
        "size": [np.int64(32), 32],
        "fps": Fraction(30_000, 1001),
        "seed": np.uint32(7),
        "audio_guidance": np.float32(1),
        "image": str(PORTRAIT),
    }
    with open_session(engine, **options) as session:
        assert session.fps == Fraction(30_000, 1001)
    with open_session(engine, fps=np.float64(12.5), size=(32, 32)) as session:
        assert session.fps == Fraction(25, 2)


# ------------------------------------------------------------------------------- portraits


def picture(mode: str) -> Image.Image:
    return Image.open(PORTRAIT).convert(mode).resize((48, 32))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
def test_a_pillow_image_is_as_its_file(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("me.tif" if mode == "CMYK" else "me.png")
    image = picture(mode)
    if "A" in mode:
        image.putalpha(100)
    image.save(path)
    assert torch.equal(fit_image(image, (32, 32)), read_image(path, (32, 32)))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_an_array_is_as_its_image(mode: str) -> None:
    image = picture(mode)
    if mode == "RGBA":
        image.putalpha(100)
    assert torch.equal(fit_image(np.asarray(image), (32, 32)), fit_image(image, (32, 32)))


def test_an_image_in_memory_is_turned_as_its_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture("RGB").save(tmp_path / "me.png", exif=exif)
    image = Image.open(tmp_path / "me.png")
    assert torch.equal(fit_image(image, (32, 64)), read_image(tmp_path / "me.png", (32, 64)))


def test_a_session_takes_them(engine: Engine) -> None:
    for image in (picture("RGB"), picture("RGBA"), np.asarray(picture("L"))):
        open_session(engine, image=image).close()


def test_a_pillow_image_of_a_cut_file_is_refused(tmp_path: Path) -> None:
    data = PORTRAIT.read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    refused(lambda: fit_image(Image.open(tmp_path / "cut.png"), (32, 32)), "image")
    refused(lambda: fit_image(Image.new("F", (8, 8)), (32, 32)), "image")


# ------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("rate", [*WHOLE, 0, -1, 3_999, 384_001, 48_000.0, "48000", 10**30])
def test_sample_rates(engine: Engine, rate: object) -> None:
    with open_session(engine) as session:
        refused(lambda: session.push_audio(speech(0.1), rate), "sample rate")  # type: ignore[arg-type]
        assert session._state.utterance.audio._pushed == 0


PCM: list[object] = [
    [0.0, 0.5], [[0.0], [0.1, 0.2]], b"\0\0\0\0", "sound", None, 5, {}, Odd(),
    np.zeros(4, np.int32), np.zeros(4, np.float64), np.zeros((2, 2, 2), np.float32),
    np.array([None, 1]), torch.zeros(4, requires_grad=True), np.zeros((4, 0), np.float32),
]  # fmt: skip


@pytest.mark.parametrize("pcm", PCM, ids=lambda value: f"{value!r:.20}")
def test_samples(engine: Engine, pcm: Any) -> None:
    with open_session(engine) as session:
        refused(lambda: session.push_audio(pcm, RATE_HZ), "pcm")
        session.push_audio(torch.from_numpy(speech(1.0)), RATE_HZ)  # type: ignore[arg-type]
        session.end_of_audio()
        assert len(take(session)) == 6


def test_prompts_and_waits(engine: Engine) -> None:
    with open_session(engine) as session:
        for prompt in TEXTS:
            refused(lambda p=prompt: session.set_prompt(p), "prompt")
        for block in (None, "1", 1.0, True, Odd()):
            refused(lambda b=block: session.set_prompt("x", b), "from_block")
        for block in ("1", 1.0, True, Odd()):
            refused(lambda b=block: session.set_prompt("x", 0, b), "to_block")
        for wait in ("1", True, -1, float("nan"), float("inf"), Odd()):
            refused(lambda w=wait: session.next_chunk(w), "timeout_s")
        for wait in ("1", True, -1, float("nan"), Odd()):
            refused(
                lambda w=wait: session.push_audio(speech(0.1), RATE_HZ, timeout_s=w), "timeout_s"
            )
        with pytest.raises(TimeoutError):
            session.next_chunk(np.float32(0.01))  # type: ignore[arg-type]


def test_what_an_engine_encodes(engine: Engine) -> None:
    for prompt in TEXTS:
        refused(lambda p=prompt: engine.encode_prompt(p), "prompt")
    refused(lambda: engine.encode_picture(None), "picture, clock")  # type: ignore[arg-type]
    refused(lambda: engine.encode_picture(torch.zeros(3, 8, 8), 5), "picture, clock")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *[({"directory": v}, "directory") for v in (None, 5, b"x", Odd(), "a\0b")],
        *[({"device": v}, "device") for v in (5, True, b"cpu", ["cpu"], Odd(), "gpu", "cuda:x")],
        ({"device": torch.device("cpu")}, "device"),
        ({"device": "cuda:99999999999999999999"}, "device"),
        ({"device": "cuda:" + "9" * 400}, "device"),
        *[({"vae_device": v}, "(vae_)?device") for v in (5, True, ["cpu"], Odd(), "gpu")],
        *[({"precision": v}, "precision") for v in (5, True, ["fp8"], Odd(), "fp16", "")],
        *[({"wav2vec": v}, "wav2vec") for v in (5, True, b"x", Odd())],
        ({"progress": 5}, "progress"),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_arguments_of_load(options: dict[str, Any], name: str) -> None:
    given = {"directory": demo_checkpoint(), "device": "cpu"} | options
    refused(lambda: Engine.load(given.pop("directory"), **given), name)


def test_opened_devices_say_the_rest() -> None:
    devices = open_devices("cpu", None, "bf16")
    for more in ({"vae_device": "cpu"}, {"precision": "fp32"}):
        with pytest.raises(InputError, match="expected None beside opened devices, found"):
            Engine.load(demo_checkpoint(), device=devices, **more)
    with Engine.load(demo_checkpoint(), device=devices) as loaded:
        assert loaded.devices is devices and loaded.dit.precision == "bf16"
    assert issubclass(InputError, LiveActError)
