"""cross_attention and audio_attention under Triton's interpreter against float64 softmax."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.kernels.attention_cases import (
    BF16_STEP,
    F32_LOGIT_ERROR,
    HEAD_DIM,
    interpret,
    launch_of,
)
from triton_kernels import audio_attention, cross_attention

HEADS = 2
WIDTH = HEADS * HEAD_DIM


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, last_bias: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, bound) float64 [M, WIDTH]; q [M, WIDTH], k and v [HEADS, T, HEAD_DIM]."""
    queries = q.double().unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1)
    k, v = k.double(), v.double()
    logits = queries @ k.transpose(1, 2) / math.sqrt(HEAD_DIM)
    logits[..., -1] += last_bias
    p = logits.softmax(dim=2)
    terms = (queries.abs() @ k.abs().transpose(1, 2)).amax(dim=2, keepdim=True)
    drift = 2 * torch.expm1(F32_LOGIT_ERROR * (terms / math.sqrt(HEAD_DIM) + last_bias))
    bound = (BF16_STEP + drift) * (p @ v.abs())
    return tuple(x.transpose(0, 1).reshape(-1, WIDTH) for x in (p @ v, bound))


def check(out: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    assert not out.isnan().any(), "expected a result in every row"
    bound = bound + BF16_STEP * expected.abs() + 1e-30  # of P before, of the result here
    worst = ((out.double() - expected).abs() / bound).max().item()
    assert worst <= 1.0, f"an element is {worst:.2f} times the bound off"


def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(shape)))
    return (torch.randn(*shape, generator=generator) * size).bfloat16()


# M, text tokens in the buffer, pad_count, image tokens, size of q
CROSS = {
    "small": (96, 21, 492, 257, 1.0),
    "no_padding": (96, 20, 0, 257, 1.0),
    "one_text_key": (40, 1, 512, 257, 1.0),
    "whole_tiles": (128, 128, 384, 256, 1.0),
    "ragged": (130, 67, 446, 5, 1.0),
    "one_query": (1, 33, 480, 64, 1.0),
    "huge_logits": (30, 21, 492, 257, 200.0),
}


@pytest.fixture(scope="module")
def cross_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    launches = []
    for m, text, pad_count, image, size in CROSS.values():
        arguments = {
            "q": normal(m, WIDTH, size=size),
            "text_k": normal(HEADS, text, HEAD_DIM),
            "text_v": normal(HEADS, text, HEAD_DIM, size=2.0),
            "image_k": normal(HEADS, image, HEAD_DIM),
            "image_v": normal(HEADS, image, HEAD_DIM, size=0.5),
            "out": torch.empty(m, WIDTH, dtype=torch.bfloat16),
            **dict.fromkeys(("out_scale", "text_v_scale", "image_v_scale"), torch.empty(0)),
            "tokens": m,
            "heads": HEADS,
            "text_tokens": text,
            "text_keys": text if pad_count > 0 else text - 1,
            "image_tokens": image,
            "pad_bias": math.log(pad_count) if pad_count > 0 else 0.0,
        }
        launches.append(launch_of(cross_attention.SPECS[0], arguments, "sm_90a"))
    outputs = interpret(launches, tmp_path_factory.mktemp("cross_attention"))
    return dict(zip(CROSS, outputs, strict=True))


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention(cross_results: dict[str, torch.Tensor], name: str) -> None:
    m, text, pad_count, image, size = CROSS[name]
    q = normal(m, WIDTH, size=size)
    text_k, text_v = normal(HEADS, text, HEAD_DIM), normal(HEADS, text, HEAD_DIM, size=2.0)
    image_k, image_v = normal(HEADS, image, HEAD_DIM), normal(HEADS, image, HEAD_DIM, size=0.5)
    if pad_count > 0:  # spelled out: the padding rows are keys like any other
        text_k = torch.cat([text_k[:, :-1], text_k[:, -1:].expand(-1, pad_count, -1)], dim=1)
        text_v = torch.cat([text_v[:, :-1], text_v[:, -1:].expand(-1, pad_count, -1)], dim=1)
    else:
        text_k, text_v = text_k[:, :-1], text_v[:, :-1]
    parts = [attend(q, text_k, text_v), attend(q, image_k, image_v)]
    check(cross_results[name], parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])


# frame_rows, latent frames, frames in kv, audio tokens of a frame
AUDIO = {
    "small": (12, 8, 8, 8),
    "released": (70, 3, 3, 32),
    "shared_tokens": (12, 5, 1, 32),
    "one_token": (13, 2, 2, 1),
    "ragged": (65, 2, 2, 31),
}


@pytest.fixture(scope="module")
def audio_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    launches = []
    for frame_rows, frames, kv_frames, tokens in AUDIO.values():
        arguments = {
            "q": normal(frames * frame_rows, WIDTH),
            "kv": normal(kv_frames * tokens, 2 * WIDTH),
            "out": torch.empty(frames * frame_rows, WIDTH, dtype=torch.bfloat16),
            **dict.fromkeys(("out_scale", "v_scale"), torch.empty(0)),
            "frame_rows": frame_rows,
            "frames": frames,
            "heads": HEADS,
            "kv_frames": kv_frames,
            "tokens": tokens,
        }
        launches.append(launch_of(audio_attention.SPECS[0], arguments, "sm_90a"))
    outputs = interpret(launches, tmp_path_factory.mktemp("audio_attention"))
    return dict(zip(AUDIO, outputs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", AUDIO)
def test_audio_attention(audio_results: dict[str, torch.Tensor], name: str) -> None:
    frame_rows, frames, kv_frames, tokens = AUDIO[name]
    q = normal(frames * frame_rows, WIDTH).unflatten(0, (frames, frame_rows))
    kv = normal(kv_frames * tokens, 2 * WIDTH).unflatten(0, (kv_frames, tokens))
    parts = []
    for frame in range(frames):
        pair = kv[frame if kv_frames > 1 else 0].unflatten(1, (2, HEADS, HEAD_DIM))
        k, v = pair.permute(1, 2, 0, 3)
        parts.append(attend(q[frame], k, v))
    check(audio_results[name], torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
