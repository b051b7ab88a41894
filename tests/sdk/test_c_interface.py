"""The C interface, called through ctypes: errors, lifetimes, threads, structs of other versions."""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from liveact import _core
from liveact.checkpoint.random import random_checkpoint
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import AUDIO_LAYERS, AUDIO_WIDTH, CONFIG, IMAGE_DIM
from tests.support.kernels.manifest import read_manifest, write_named_kernels
from tests.support.paths import REPOSITORY
from tests.support.pipeline import demo_checkpoint
from tests.support.sdk import shared_library

HEADER = (REPOSITORY / "include" / "liveact" / "liveact.h").read_text()
STATUS = {name: int(value) for name, value in re.findall(r"(LIVEACT_[A-Z_]+) = (\d)", HEADER)}


class StreamOptions(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("latent_height", c_int64),
        ("latent_width", c_int64),
        ("slots", c_int32 * 4),
        ("memory", c_char_p),
        ("compress_axis", c_char_p),
        ("value_filter", c_char_p),
        ("sampler", c_char_p),
        ("audio_guidance", c_float),
        ("max_image_tokens", c_int64),
    )


class DeviceOptions(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("kernels", c_char_p),
        ("driver", c_char_p),
        ("cublaslt", c_char_p),
    )


class Block(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("index", c_int64),
        ("frames", c_int64),
        ("audio_rows", c_int64),
        ("latent_size", c_int64),
    )


class Sizes(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("latent_channels", c_int64),
        ("condition_channels", c_int64),
        ("text_dim", c_int64),
        ("text_len", c_int64),
        ("image_dim", c_int64),
        ("audio_dim", c_int64),
        ("num_layers", c_int64),
    )


library = shared_library()


def fails(status: int, name: str) -> str:
    """The error text of a call that failed with this status."""
    assert status == STATUS[name]
    text = library.liveact_last_error()
    assert text and b"\n" not in text
    return str(text.decode())


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("f4")


def pointer(values: np.ndarray) -> c_void_p:
    return c_void_p(values.ctypes.data)


@pytest.fixture
def device() -> Iterator[c_void_p]:
    found = c_void_p()
    assert library.liveact_device_open(b"cpu", None, byref(found)) == 0
    yield found
    library.liveact_device_close(found)


@pytest.fixture
def model(device: c_void_p) -> Iterator[c_void_p]:
    found = c_void_p()
    directory = str(demo_checkpoint()).encode()
    assert library.liveact_model_load(device, directory, None, byref(found)) == 0
    yield found
    library.liveact_model_close(found)


def options(**changes: object) -> StreamOptions:
    result = StreamOptions()
    library.liveact_stream_options_init(byref(result))
    result.latent_height = result.latent_width = 4
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def open_stream(model: c_void_p, given: StreamOptions | None = None) -> c_void_p:
    found = c_void_p()
    given = given or options()
    assert library.liveact_stream_open(model, byref(given), byref(found)) == 0
    return found


def prepare(stream: c_void_p, text_dim: int = 64, image_dim: int = 64, side: int = 4) -> None:
    text, image, y = array(3, text_dim), array(5, image_dim), array(20, 14, side, side)
    assert library.liveact_stream_set_prompt(stream, pointer(text), c_int64(3)) == 0
    status = library.liveact_stream_set_image(
        stream, pointer(image), c_int64(5), pointer(y), c_int64(14)
    )
    assert status == 0, library.liveact_last_error()


def denoise(stream: c_void_p, audio_dim: int = 192, scale: float = 1.0) -> tuple[int, np.ndarray]:
    block = Block(size=ctypes.sizeof(Block))
    assert library.liveact_stream_next_block(stream, byref(block)) == 0
    noise, latent = array(3, block.latent_size) * np.float32(scale), array(block.latent_size)
    audio = array(block.audio_rows, audio_dim)
    status = library.liveact_stream_denoise(
        stream, pointer(noise), pointer(noise[1:]), pointer(audio), pointer(latent)
    )
    return status, latent


def test_the_version_is_that_of_the_package() -> None:
    assert library.liveact_version().decode() == _core.__version__


def test_sizes_and_blocks(model: c_void_p) -> None:
    sizes = Sizes(size=ctypes.sizeof(Sizes))
    assert library.liveact_model_get_sizes(model, byref(sizes)) == 0
    assert (sizes.latent_channels, sizes.condition_channels, sizes.num_layers) == (16, 20, 2)
    assert (sizes.text_dim, sizes.text_len, sizes.image_dim, sizes.audio_dim) == (64, 512, 64, 192)
    stream = open_stream(model)
    prepare(stream)
    found = []
    for _ in range(3):
        block = Block(size=ctypes.sizeof(Block))
        assert library.liveact_stream_next_block(stream, byref(block)) == 0
        found.append((block.index, block.frames, block.audio_rows, block.latent_size))
        assert denoise(stream)[0] == 0
    assert found == [(0, 6, 25, 6 * 256), (1, 8, 36, 8 * 256), (2, 8, 36, 8 * 256)]
    assert library.liveact_stream_bytes(stream) > 0
    library.liveact_stream_close(stream)


def test_errors_are_a_status_and_a_line(device: c_void_p, tmp_path: Path) -> None:
    found = c_void_p()
    for name, text in (
        (b"gpu", "device: expected cpu or cuda:N, found 'gpu'"),
        (b"cuda:", "device: expected cpu or cuda:N, found 'cuda:'"),
        (None, "name: expected a pointer, found null"),
    ):
        status = library.liveact_device_open(name, None, byref(found))
        assert fails(status, "LIVEACT_INVALID") == text
    text = fails(library.liveact_device_open(b"cuda:0", None, byref(found)), "LIVEACT_DEVICE")
    assert "libcuda.so.1" in text or "kernels" in text
    folder = str(tmp_path).encode()
    status = library.liveact_model_load(device, folder, None, byref(found))
    assert fails(status, "LIVEACT_INVALID").startswith(
        f"{tmp_path}: expected diffusion_pytorch_model.safetensors or "
    )
    directory = str(demo_checkpoint()).encode()
    status = library.liveact_model_load(device, directory, b"fp16", byref(found))
    assert "precision: expected fp32, auto, fp8, bf16 or a policy file, found 'fp16'" in fails(
        status, "LIVEACT_INVALID"
    )
    assert found.value is None, "what fails writes nothing"


def test_closing_in_any_order_and_nothing(device: c_void_p) -> None:
    first, model = c_void_p(), c_void_p()
    assert library.liveact_device_open(b"cpu", None, byref(first)) == 0
    directory = str(demo_checkpoint()).encode()
    assert library.liveact_model_load(first, directory, b"fp8", byref(model)) == 0
    stream = open_stream(model)
    library.liveact_device_close(first)
    library.liveact_model_close(model)
    prepare(stream)
    assert denoise(stream)[0] == 0
    library.liveact_stream_close(stream)
    for close in ("device", "model", "stream"):
        getattr(library, f"liveact_{close}_close")(None)
    library.liveact_stream_cancel(None)
    assert library.liveact_device_bytes(None) == 0
    assert library.liveact_device_name(device) == b"cpu"


def test_null_and_wrong_arguments(model: c_void_p) -> None:
    stream = open_stream(model)
    assert "text" in fails(
        library.liveact_stream_set_prompt(stream, None, c_int64(1)), "LIVEACT_INVALID"
    )
    text = array(1, 64)
    for tokens in (0, -1, 513):
        status = library.liveact_stream_set_prompt(stream, pointer(text), c_int64(tokens))
        assert "expected" in fails(status, "LIVEACT_INVALID")
    found = c_void_p()
    for change, expected in (
        ({"memory": b"endless"}, "memory"),
        ({"sampler": None}, "sampler: expected a pointer, found null"),
        ({"latent_height": 3}, "expected"),
        ({"slots": (c_int32 * 4)(0, 0, 0, 0)}, "expected"),
        ({"size": 0}, "liveact_stream_options: expected its size to be set, found 0"),
    ):
        given = options(**change)
        status = library.liveact_stream_open(model, byref(given), byref(found))
        assert expected in fails(status, "LIVEACT_INVALID")
    status = library.liveact_stream_denoise(stream, None, None, None, None)
    assert "renoise" in fails(status, "LIVEACT_INVALID")
    library.liveact_stream_close(stream)


def test_programs_of_an_older_version(model: c_void_p) -> None:
    """Members that they do not know keep their released values, and are not written."""
    given = options()
    given.size = StreamOptions.compress_axis.offset
    given.compress_axis = given.sampler = c_char_p(b"of a later version")
    stream = open_stream(model, given)
    block = Block(size=Block.audio_rows.offset, audio_rows=-1)
    assert library.liveact_stream_next_block(stream, byref(block)) == 0
    assert (block.frames, block.audio_rows, block.size) == (6, -1, Block.audio_rows.offset)
    library.liveact_stream_close(stream)


def test_a_block_that_is_not_finite(model: c_void_p) -> None:
    stream = open_stream(model)
    prepare(stream)
    assert "has a NaN" in fails(denoise(stream, scale=np.nan)[0], "LIVEACT_NOT_FINITE")
    assert fails(denoise(stream)[0], "LIVEACT_INVALID"), "the stream is unusable"
    library.liveact_stream_close(stream)


def test_a_cancelled_block_and_errors_of_threads(model: c_void_p) -> None:
    stream = open_stream(model)
    prepare(stream)
    library.liveact_stream_cancel(stream)
    seen: list[tuple[int, bytes]] = []

    def work() -> None:
        assert library.liveact_last_error() == b"", "the text is of the thread"
        seen.append((denoise(stream)[0], library.liveact_last_error()))

    fails(library.liveact_device_open(b"gpu", None, byref(c_void_p())), "LIVEACT_INVALID")
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert [status for status, _ in seen] == [STATUS["LIVEACT_CANCELLED"]] and seen[0][1]
    assert b"'gpu'" in library.liveact_last_error()
    library.liveact_stream_close(stream)


def test_a_gpu_is_opened_with_its_kernels(tmp_path: Path, compiled_kernels: Path) -> None:
    """On the fake driver: the manifest is read, every kernel of a block launched."""
    fake = FakeCuda.copy_into(tmp_path)
    manifest = read_manifest("sm_90a", compiled_kernels)
    fake.images(manifest)
    write_named_kernels(tmp_path / "kernels", manifest)
    weights = random_checkpoint(
        CONFIG, 0, audio_layers=AUDIO_LAYERS, audio_channels=AUDIO_WIDTH, clip_dim=IMAGE_DIM
    )
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = DeviceOptions(
        ctypes.sizeof(DeviceOptions),
        str(tmp_path / "kernels").encode(),
        fake.path.encode(),
        fake.path.encode(),
    )
    device, model = c_void_p(), c_void_p()
    assert library.liveact_device_open(b"cuda", byref(given), byref(device)) == 0
    assert library.liveact_device_name(device) == b"cuda:0"
    directory = str(tmp_path).encode()
    status = library.liveact_model_load(device, directory, b"fp32", byref(model))
    assert "expected auto, fp8 or bf16 on cuda:0, found fp32" in fails(status, "LIVEACT_INVALID")
    assert library.liveact_model_load(device, directory, None, byref(model)) == 0
    stream = open_stream(model, options(latent_height=6, latent_width=6, max_image_tokens=5))
    prepare(stream, text_dim=64, image_dim=IMAGE_DIM, side=6)
    fake.clear()
    status, _ = denoise(stream, audio_dim=AUDIO_LAYERS * AUDIO_WIDTH)
    assert status == 0, library.liveact_last_error()
    launched = {line.split()[1] for line in fake.log() if line.startswith("cuLaunchKernel ")}
    assert {"patchify", "unpatchify", "value_scale"} <= launched, launched
    for close, handle in (("stream", stream), ("model", model), ("device", device)):
        getattr(library, f"liveact_{close}_close")(handle)
    assert fake.live_allocations() == 0

    broken = tmp_path / "kernels" / "sm_90a" / "guide.cubin"
    broken.write_bytes(b"another")
    status = library.liveact_device_open(b"cuda:0", byref(given), byref(device))
    assert "guide.cubin: expected SHA-256" in fails(status, "LIVEACT_DEVICE")
