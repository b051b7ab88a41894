"""How much work a block is: an analytic count, from the sizes alone.

Only matrix products are counted, as everybody who publishes TFLOPs does: a product of [m, k] and
[k, n] is 2·m·k·n, attention is two products for each score. Normalisation, rotation, softmax and
the memory's 5-tap filter are below 0.1 % of it and move bytes, not FLOP. Two counts:

- `engine_block`: what this runtime computes in a steady block.
- `plain_block`: what the released way computes (reference/dit.py): keys of text, image and
  audio anew at every step, padding attended to row by row. torch's own counter, run over the plain
  model, must give exactly this number (tests/bench/test_flops.py).

The difference is work left out, so FLOP per second of both must not be compared; milliseconds may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STEPS = 3
AUDIO_STEPS = 2  # step 0 skips the audio layers
TAPS = 5


@dataclass(frozen=True)
class BlockShape:
    """A steady block: `current` latent frames that attend to `slots` of them (themselves too)."""

    tokens_per_frame: int  # F
    current: int = 8
    slots: int = 14
    prompt_tokens: int = 40
    image_tokens: int = 257

    @property
    def tokens(self) -> int:  # M
        return self.current * self.tokens_per_frame

    @property
    def keys(self) -> int:
        return self.slots * self.tokens_per_frame


def product(m: int, n: int, k: int) -> int:
    """[m, k] · [k, n]"""
    return 2 * m * n * k


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and their product with the values; width = heads · head_dim."""
    return 4 * queries * keys * width


def _layer(config: Mapping[str, Any], shape: BlockShape, text_keys: int) -> dict[str, int]:
    """What both ways compute per layer and step; audio only where a step hears it."""
    d, m = config["dim"], shape.tokens
    return {
        "self_linear": product(m, 4 * d, d),
        "self_attention": attention(m, shape.keys, d),
        "cross_linear": product(m, 2 * d, d),
        "cross_attention": attention(m, text_keys + shape.image_tokens, d),
        "ffn": 2 * product(m, config["ffn_dim"], d),
    }


def _audio_layer(config: Mapping[str, Any], shape: BlockShape) -> dict[str, int]:
    d, m = config["dim"], shape.tokens
    return {
        "audio_linear": product(m, 2 * d, d),
        "audio_attention": attention(m, config["context_tokens"], d),
    }


def _embedding_and_head(config: Mapping[str, Any], shape: BlockShape) -> int:
    d, m = config["dim"], shape.tokens
    return product(m, d, 4 * config["in_dim"]) + product(m, 4 * config["out_dim"], d)


def _audio_projection(config: Mapping[str, Any], rows: int, features: int, audio_dim: int) -> int:
    """`rows` windows of `features` audio features through the three linears."""
    hidden = config["intermediate_dim"]
    return rows * (
        product(1, hidden, features * audio_dim)
        + product(1, hidden, hidden)
        + product(1, config["context_tokens"] * config["output_dim"], hidden)
    )


def _audio_keys(config: Mapping[str, Any], frames: int) -> int:
    return product(frames * config["context_tokens"], 2 * config["dim"], config["output_dim"])


def engine_block(
    config: Mapping[str, Any], shape: BlockShape, audio_dim: int = 12 * 768
) -> dict[str, int]:
    """FLOP of one steady block by op group, as this runtime computes it (without guidance).

    The padding of the text is one biased key; keys of text and image cost nothing in a block; audio
    is projected once for the block's own latent frames.
    """
    layers = config["num_layers"]
    text_keys = shape.prompt_tokens + (shape.prompt_tokens < config["text_len"])
    groups = {k: STEPS * layers * v for k, v in _layer(config, shape, text_keys).items()}
    groups |= {k: AUDIO_STEPS * layers * v for k, v in _audio_layer(config, shape).items()}
    groups["embedding_and_head"] = STEPS * _embedding_and_head(config, shape)
    groups["conditioning"] = _audio_projection(config, shape.current, 8, audio_dim) + (
        layers * _audio_keys(config, shape.current)
    )
    return groups


def plain_block(
    config: Mapping[str, Any],
    shape: BlockShape,
    audio_dim: int = 12 * 768,
    clip_dim: int = 1280,
    compressed_slots: int = 2,
) -> dict[str, int]:
    """FLOP of one steady block by op group, the released way (without guidance)."""
    layers, d, text_len = config["num_layers"], config["dim"], config["text_len"]
    groups = {k: STEPS * layers * v for k, v in _layer(config, shape, text_len).items()}
    groups |= {k: AUDIO_STEPS * layers * v for k, v in _audio_layer(config, shape).items()}
    groups["embedding_and_head"] = STEPS * _embedding_and_head(config, shape)
    groups["time"] = STEPS * (product(1, d, config["freq_dim"]) + product(1, 7 * d, d))
    embeddings = (
        product(text_len, d, config["text_dim"])
        + product(text_len, d, d)
        + product(shape.image_tokens, clip_dim + d, clip_dim)
    )
    keys = product(text_len + shape.image_tokens, 2 * d, d)
    groups["text_and_image"] = STEPS * (embeddings + layers * keys)
    groups["conditioning"] = STEPS * (
        _audio_projection(config, 1, 5, audio_dim)
        + _audio_projection(config, shape.slots - 1, 8, audio_dim)
    ) + AUDIO_STEPS * layers * _audio_keys(config, shape.slots)
    # Keys and values of F tokens out of 5F, one filter of five taps per channel.
    groups["memory"] = STEPS * layers * 2 * compressed_slots * 2 * TAPS * d * shape.tokens_per_frame
    return groups


def tera_per_frame(groups: Mapping[str, int], current: int = 8) -> float:
    """TFLOP per video frame; a latent frame is 4 of them."""
    return sum(groups.values()) / (4 * current) / 1e12
