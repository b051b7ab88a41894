"""The FLOP count against known numbers: those of docs/benchmarks.md, and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops
from benchmarks.models import MODELS
from liveact.checkpoint.random import random_checkpoint
from reference import DiT, DiTStream

pytestmark = pytest.mark.usefixtures("one_thread")
RELEASED = MODELS["released"].config


def test_released_sizes() -> None:
    """docs/benchmarks.md, "What is counted, and how": 656 TFLOP of linears, 289 of self-attention,
    16 of the other attentions (text 512, image 257), 961 in all = 30.0 a frame."""
    shape = flops.BlockShape(1024, prompt_tokens=512)
    groups = flops.engine_block(RELEASED, shape)
    linears = sum(groups[g] for g in ("self_linear", "cross_linear", "audio_linear", "ffn"))
    assert linears / 1e12 == pytest.approx(656, abs=1)
    assert groups["self_attention"] / 1e12 == pytest.approx(289, abs=0.5)
    others = groups["cross_attention"] + groups["audio_attention"]
    assert others / 1e12 == pytest.approx(16, abs=0.5)
    assert flops.tera_per_frame(groups) == pytest.approx(30.0, abs=0.05)
    wide = flops.engine_block(RELEASED, flops.BlockShape(1170, prompt_tokens=512))
    assert flops.tera_per_frame(wide) == pytest.approx(35.8, abs=0.1)


def test_a_collapsed_padding_is_one_key() -> None:
    """40 tokens of 512 and one key for the padding: 41 instead of 512."""
    counts = [
        flops.engine_block(RELEASED, flops.BlockShape(1024, prompt_tokens=n))["cross_attention"]
        for n in (40, 512)
    ]
    assert counts[0] * (512 + 257) == counts[1] * (41 + 257)


@pytest.mark.parametrize("text_tokens", [7, 16])
def test_plain_block_is_what_torch_counts(text_tokens: int) -> None:
    """Exactly, on the plain model, in a steady block (the first that compresses)."""
    config = MODELS["tiny"].config | {"text_len": 16}
    model = MODELS["tiny"]
    weights = random_checkpoint(config, 0, **model.features)
    audio_dim = model.features["audio_layers"] * model.features["audio_channels"]
    h, w, image_tokens = 4, 6, 9
    stream = DiTStream(
        DiT.from_tensors(config, weights),
        text=torch.randn(text_tokens, config["text_dim"]),
        clip=torch.randn(image_tokens, model.features["clip_dim"]),
        y=torch.randn(20, 14, h, w),
        audio=torch.randn(100, model.features["audio_layers"], model.features["audio_channels"]),
    )
    for block in range(3):
        n = 6 if block == 0 else 8
        noise = torch.randn(16, n, h, w)
        # torch's counter does not know the CPU's fused attention.
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            stream.denoise(noise, list(torch.randn(3, 16, n, h, w)))
    shape = flops.BlockShape(h * w // 4, prompt_tokens=text_tokens, image_tokens=image_tokens)
    groups = flops.plain_block(config, shape, audio_dim, model.features["clip_dim"])
    assert sum(groups.values()) == counter.get_total_flops()
