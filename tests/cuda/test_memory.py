"""Device memory: asked for before any is taken, what the released model needs, weights on a GPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from liveact import _core
from liveact.blocks import RELEASED_SLOTS
from liveact.dit.dit import Dit, MemoryPolicy, auto_bytes
from liveact.dit.precision import auto_policy
from liveact.dit.weights import product_weights
from liveact.errors import DeviceError
from tests.support.cuda.blocks import LATENT, NUM_LAYERS, calls, open_device
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import core_config


@pytest.fixture(autouse=True)
def plenty(fake: FakeCuda) -> Iterator[None]:
    yield
    fake.set_free_memory()


def numbers(message: str) -> tuple[float, list[float]]:
    """The total and the parts of "expected 8.6 MB for … (context 7.5, scratch 1.1), found …"."""
    total, parts = re.findall(
        r"expected ([\d.]+) MB for .* \((.*)\), found 0\.\d MB free", message
    )[0]
    return float(total), [
        float(part.split()[-1]) for part in parts.split(", ") if part[-1].isdigit()
    ]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_too_little_room_is_said_before_any_is_taken(fake, images, weights, precision) -> None:
    device = open_device(fake, images)
    fake.set_free_memory(100_000)
    fake.clear()
    with pytest.raises(
        DeviceError, match=r"^cuda:0: expected .* for the weights \(products"
    ) as error:
        Dit(device, core_config(NUM_LAYERS), weights, precision)
    total, parts = numbers(str(error.value))
    assert total == pytest.approx(sum(parts), abs=0.05 * (1 + len(parts)))  # printed to a tenth
    assert calls(fake.log())["cuMemAlloc"] == 0
    fake.set_free_memory()
    dit = Dit(device, core_config(NUM_LAYERS), weights, precision)
    assert device.allocated_bytes / 1e6 == pytest.approx(total, abs=0.05)

    fake.set_free_memory(100_000)
    fake.clear()
    with pytest.raises(
        DeviceError, match=r"for a session \(context .*, text, image and audio"
    ) as error:
        dit.open_stream(LATENT, MemoryPolicy(), 1.5, 4)
    total, parts = numbers(str(error.value))
    assert total == pytest.approx(sum(parts), abs=0.05 * (1 + len(parts)))
    assert calls(fake.log())["cuMemAlloc"] == 0
    before = device.allocated_bytes
    fake.set_free_memory()
    stream = dit.open_stream(LATENT, MemoryPolicy(), 1.5, 4)
    assert (device.allocated_bytes - before) / 1e6 == pytest.approx(total, abs=0.05)
    assert stream.device_bytes == device.allocated_bytes - before


def test_exactly_enough_is_enough(fake, images, weights) -> None:
    device = open_device(fake, images)
    dit = Dit(device, core_config(NUM_LAYERS), weights, "fp8")
    needed = device.allocated_bytes
    del dit
    fake.set_free_memory(needed - 1)
    with pytest.raises(DeviceError, match="for the weights"):
        Dit(device, core_config(NUM_LAYERS), weights, "fp8")
    fake.set_free_memory(needed)
    Dit(device, core_config(NUM_LAYERS), weights, "fp8")


def test_auto_is_fp8_where_memory_is_short(fake, images, weights) -> None:
    """To the byte: the weights with text and image keys in bf16, a session of 720x416 and what
    somebody else needs, or those keys in fp8."""
    device, config = open_device(fake, images), core_config(NUM_LAYERS)
    beside = 12_345
    fake.set_free_memory()
    needed = sum(auto_bytes(device, config)) + beside
    for free_bytes, expected in ((needed, "bf16"), (needed - 1, "fp8")):
        fake.set_free_memory(free_bytes)
        dit = Dit(device, config, weights, "auto", beside)
        assert dit.precision == auto_policy(NUM_LAYERS, expected)
        assert str(dit.precision).startswith(f"auto, cross_kv in {expected} (")
        fake.set_free_memory()
        narrow = Dit(other := open_device(fake, images), config, weights, "fp8")
        assert (device.allocated_bytes > other.allocated_bytes) == (expected == "bf16")
        dit.close()
        narrow.close()


@pytest.mark.parametrize(("latent", "most_gb"), [((64, 64), 30), ((52, 90), 32)])
def test_what_the_released_model_takes_in_fp8(fake, images, latent, most_gb: int) -> None:
    """512x512 and 720x416, on one GPU: products and constants once, each session beside them."""
    config = _core.ModelConfig()
    sizes = (config.dim, config.num_layers, config.ffn_dim, config.num_heads)
    assert sizes == (5120, 40, 13824, 40)
    weights, stream = _core.required_bytes(
        open_device(fake, images), config, "fp8", "bf16", *latent, RELEASED_SLOTS, 1.0, 257
    )
    context = (
        3 * 40 * 6 * (latent[0] * latent[1] // 4) * 2 * 5120
    )  # steps, layers, frames, F, k v D
    assert context < stream < 1.35 * context
    assert weights + stream <= most_gb * 1e9, f"{weights / 1e9:.1f} and {stream / 1e9:.1f} GB"


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8 from bf16"])
def test_weights_may_lie_on_the_device(fake, images, weights, precision: str) -> None:
    """The model is the same, and the host reads no product that has its format already."""
    precision, _, other = precision.partition(" from ")
    given: dict[str, tuple[torch.Tensor, str]] = {n: (t, "bf16") for n, t in weights.items()}
    products = product_weights(NUM_LAYERS)
    if precision == "fp8" and not other:
        for name in products:
            tensor = given[name][0]
            codes, scale = _core.quantize_weight(tensor.data_ptr(), "bf16", list(tensor.shape))
            given[name] = (torch.from_numpy(codes), "fp8")
            given[f"{name}_scale"] = (torch.from_numpy(scale), "fp32")

    def contents(on_device: bool) -> list[str]:
        device = open_device(fake, images)
        described = {}
        for name, (tensor, dtype) in given.items():
            address = tensor.data_ptr()
            if on_device:
                address = fake.seal(address, tensor.nbytes)
            described[name] = (address, dtype, list(tensor.shape))
        fake.clear()
        model = _core.Model(device, core_config(NUM_LAYERS), described, precision)
        found = fake.contents()
        del model
        return found

    assert contents(on_device=True) == contents(on_device=False)

    contents(on_device=True)
    read = sorted(
        int(line.split()[3]) for line in fake.log() if line.startswith("cuMemcpyAsync device host")
    )
    # Read: what is not a product, and products that are yet to be converted.
    unread = set(products) if not other else set()
    unread |= {
        name
        for name, (tensor, _) in given.items()
        if name.endswith(".weight")
        and tensor.ndim > 1
        and name not in products
        and "memory_proj" not in name
        and not name.startswith("time_")
    }
    unread.add("audio_proj.proj1.bias")  # of the first latent frame, which has no audio
    # The gains of keys are read once more, for the scales of the keys.
    again = [n for n in given if n.endswith("self_attn.norm_k.weight")]
    names = [n for n in given if n not in unread] + again
    expected = sorted(given[n][0].nbytes for n in names)
    assert read == expected, (Counter(read) - Counter(expected), Counter(expected) - Counter(read))
