"""The DiT of a checkpoint and one session's stream on it: sizes, misuse, cancelling, memory."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path

import pytest
import torch

from liveact import _core
from liveact.blocks import audio_rows
from liveact.checkpoint.layout import DIT_STEM
from liveact.checkpoint.random import random_checkpoint
from liveact.checkpoint.tensors import open_tensors
from liveact.device.devices import open_devices, parse_device
from liveact.dit.dit import Dit, MemoryPolicy
from liveact.dit.weights import open_weights, product_weights
from liveact.errors import DeviceError, InputError, LiveActError, SessionError
from reference import audio_rows as reference_audio_rows
from tests.support.demo_dit import AUDIO_DIM, NUM_LAYERS, denoise, open_stream
from tests.support.pipeline import Background, demo_checkpoint


@pytest.fixture(scope="module")
def dit() -> Dit:
    return Dit.load(demo_checkpoint(), _core.open_cpu())


def mapped_bytes(precision: str) -> int:
    """Of matrices that a CPU reads where the file is mapped; another device would copy them."""
    tensors = open_tensors(demo_checkpoint(), DIT_STEM)
    copied = product_weights(NUM_LAYERS) if precision == "fp8" else []
    return sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and tensor.ndim > 1
        and name not in copied
        # The time MLP runs on the host; the other two are put together anew.
        and not name.startswith(("time_", "audio_proj.proj1.weight"))
        and "memory_proj" not in name
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_a_stream_allocates_what_was_said_and_nothing_later(
    precision: str, guidance: float
) -> None:
    device = _core.open_cpu()
    dit = Dit.load(demo_checkpoint(), device, precision)
    weights = device.allocated_bytes
    stored = dit.config
    said_weights, said = _core.required_bytes(
        device, stored, precision, "bf16", 4, 4, (2, 2, 2, 8), guidance, 257
    )
    assert said_weights == weights + mapped_bytes(precision)
    stream = open_stream(dit, guidance=guidance)
    assert stream.device_bytes == said == device.allocated_bytes - weights
    count = device.allocation_count
    for block in range(12):
        assert denoise(stream, block).isfinite().all()
        stream.set_prompt(torch.randn(1 + block, 64))
    assert device.allocation_count == count, "denoising allocates nothing"
    assert device.allocated_bytes == weights + said
    stream.close()
    assert device.allocated_bytes == weights


def test_the_latents_stay_of_order_one(dit: Dit) -> None:
    stream = open_stream(dit)
    norms = [denoise(stream, block).square().mean().sqrt().item() for block in range(40)]
    assert all(0.2 < norm < 5 for norm in norms)


def test_a_cancelled_stream_stops_at_the_next_layer(dit: Dit) -> None:
    start_s = time.monotonic()
    denoise(open_stream(dit, side=24))
    block_s = time.monotonic() - start_s
    taken_s = []
    for _ in range(3):  # the machine may do something else meanwhile
        stream = open_stream(dit, side=24)
        denoise(stream)
        running = Background(denoise, stream)
        assert running.running(block_s / 10)
        stream.cancel()
        start_s = time.monotonic()
        with pytest.raises(SessionError, match="cancelled"):
            running.result()
        taken_s.append(time.monotonic() - start_s)
        with pytest.raises(LiveActError):
            denoise(stream)
    assert min(taken_s) < block_s


def test_cancel_works_before_and_after_everything(dit: Dit) -> None:
    stream = open_stream(dit)
    stream.cancel()
    with pytest.raises(SessionError, match="cancelled"):
        denoise(stream)
    stream.close()
    stream.close()
    stream.cancel()


def test_a_stream_that_failed_is_not_used_again(dit: Dit) -> None:
    stream, other = open_stream(dit), open_stream(dit)
    with pytest.raises(SessionError, match="NaN"):
        stream.denoise(
            torch.full((16, 6, 4, 4), torch.nan), torch.zeros(2, 16, 6, 4, 4), torch.zeros(25, 192)
        )
    with pytest.raises(LiveActError, match="failed before"):
        denoise(stream)
    assert torch.equal(denoise(other), denoise(open_stream(dit)))


def test_misuse_is_one_clear_error(dit: Dit) -> None:
    stream = dit.open_stream((4, 4))
    with pytest.raises(LiveActError, match="set_prompt and set_image"):
        denoise(stream)
    with pytest.raises(LiveActError, match=r"expected shape \[2, 64\], found \[2, 63\]"):
        stream.set_prompt(torch.zeros(2, 63))
    with pytest.raises(LiveActError, match="1 to 512 tokens"):
        stream.set_prompt(torch.zeros(0, 64))
    with pytest.raises(LiveActError, match="1 to 512 tokens, found 513"):
        stream.set_prompt(torch.zeros(513, 64))
    with pytest.raises(LiveActError, match="at least one block"):
        stream.export_context(0, 0)
    stream = open_stream(dit)
    for shape in ((16, 8, 4, 4), (16, 6, 4, 2)):
        with pytest.raises(LiveActError, match="noise: expected shape"):
            stream.denoise(torch.zeros(shape), torch.zeros(2, *shape), torch.zeros(25, 192))
    with pytest.raises(LiveActError, match=r"audio: expected shape \[25, 192\], found \[36, 192\]"):
        stream.denoise(torch.zeros(16, 6, 4, 4), torch.zeros(2, 16, 6, 4, 4), torch.zeros(36, 192))
    denoise(stream)
    with pytest.raises(LiveActError, match="before the first block"):
        stream.set_image(torch.zeros(257, 64), torch.zeros(20, 14, 4, 4))
    for step, layer in ((3, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(LiveActError, match="export_context: expected"):
            stream.export_context(step, layer)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((3, 4), {}, "even latent height"),
        ((0, 4), {}, "even latent height"),
        ((4, 2**40), {}, "even latent height"),
        ((4, 4), {"audio_guidance": float("nan")}, "audio guidance"),
        ((4, 4), {"audio_guidance": 0.9}, "audio guidance"),
        ((4, 4), {"image_tokens": 0}, "at least 1 image token"),
        ((4, 4), {"sampler": "ddim"}, "sampler: expected renoise or euler"),
        ((4, 4), {"policy": MemoryPolicy("all")}, "memory: expected sequential"),
        ((4, 4), {"policy": MemoryPolicy(compress_axis="x")}, "compress axis: expected"),
        ((4, 4), {"policy": MemoryPolicy(value_filter="x")}, "value filter: expected"),
        ((4, 4), {"policy": MemoryPolicy(slots=(2, 2, 9, 8))}, "kv layout: expected"),
    ],
)
def test_streams_that_cannot_be(
    dit: Dit, size: tuple[int, int], options: dict[str, object], expected: str
) -> None:
    gc.collect()  # streams that failed in other tests lie in cycles with their tracebacks
    before = dit.device.allocated_bytes
    with pytest.raises(InputError, match=expected):
        dit.open_stream(size, **options)  # type: ignore[arg-type]
    assert dit.device.allocated_bytes == before


@pytest.mark.parametrize("features", [1, 30, 200])
def test_audio_rows(features: int) -> None:
    audio = torch.arange(features * 2.0).view(features, 1, 2)
    for block in range(5):
        found = audio_rows(audio, block)
        assert torch.equal(found, reference_audio_rows(audio, block))


def test_sizes_are_read_from_the_configuration_and_the_tensors(tmp_path: Path) -> None:
    config, _ = open_weights(demo_checkpoint())
    assert (config.dim, config.num_heads, config.num_layers) == (256, 2, 2)
    assert (config.audio_dim, config.image_dim, config.freq_dim) == (AUDIO_DIM, 64, 256)
    raw = json.loads((demo_checkpoint() / "config.json").read_text())
    del raw["freq_dim"], raw["eps"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / f"{DIT_STEM}.safetensors").symlink_to(demo_checkpoint() / f"{DIT_STEM}.safetensors")
    config, _ = open_weights(tmp_path)
    assert (config.freq_dim, config.eps) == (256, pytest.approx(1e-6))


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_odd_sizes_work_or_are_refused(precision: str) -> None:
    """Nothing in the runtime may assume that sizes are multiples of what a vector holds."""
    config = {
        "model_type": "i2v", "dim": 3 * 10, "num_heads": 3, "ffn_dim": 37, "num_layers": 1,
        "in_dim": 36, "out_dim": 16, "text_dim": 5, "text_len": 7, "freq_dim": 6,
        "intermediate_dim": 9, "output_dim": 11, "context_tokens": 1, "patch_size": [1, 2, 2],
        "audio_window": 5, "vae_scale": 4, "eps": 1e-6,
    }  # fmt: skip
    weights = random_checkpoint(config, 0, audio_layers=1, audio_channels=3, clip_dim=5)
    sizes = _core.ModelConfig()
    for key, value in config.items():
        if hasattr(sizes, key):
            setattr(sizes, key, value)
    sizes.image_dim, sizes.audio_dim = 5, 3
    dit = Dit(_core.open_cpu(), sizes, weights, precision)
    stream = dit.open_stream((6, 2), image_tokens=2)
    stream.set_image(torch.randn(2, 5), torch.randn(20, 14, 6, 2))
    stream.set_prompt(torch.randn(7, 5))
    for n in (6, 8, 8, 8):
        noise = torch.randn(3, 16, n, 6, 2)
        rows = torch.randn(stream.audio_rows_of_next_block, 3)
        assert stream.denoise(noise[0], noise[1:], rows).isfinite().all()


# ------------------------------------------------------------------------------ devices


def test_devices_are_what_was_asked_for() -> None:
    devices = open_devices("cpu", None, None)
    assert (devices.name, devices.vae_name, devices.precision) == ("cpu", "cpu", "fp32")
    assert open_devices("cpu", "cpu", "fp8").precision == "fp8"
    assert "fp8" in open_devices("cpu", "cpu", "fp8").reason


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:-1", "cuda:1.0", "cuda:²", "CPU", "cpu:0"]
)
def test_devices_that_no_machine_has(name: str) -> None:
    with pytest.raises(InputError, match="expected cpu or cuda:N"):
        parse_device(name)


def test_devices_that_this_machine_has_not() -> None:
    with pytest.raises(DeviceError, match="expected a usable cuda:99"):
        open_devices("cuda:99", None, None)
    with pytest.raises(DeviceError, match="vae-device: expected a usable cuda:99"):
        open_devices("cpu", "cuda:99", None)
    with pytest.raises(InputError, match="precision: expected"):
        open_devices("cpu", None, "fp16")
