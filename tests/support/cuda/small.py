"""The DiT that tests of the CUDA backend run: the smallest size that kernels are compiled for."""

from __future__ import annotations

from typing import Any

import torch

from liveact import _core
from liveact.checkpoint.random import random_checkpoint

CONFIG: dict[str, Any] = {
    "in_dim": 36,
    "out_dim": 16,
    "dim": 256,
    "ffn_dim": 512,
    "num_heads": 2,
    "num_layers": 1,
    "text_dim": 64,
    "text_len": 32,
    "freq_dim": 256,
    "intermediate_dim": 16,
    "output_dim": 48,
    "context_tokens": 8,
    "audio_window": 5,
    "vae_scale": 4,
    "patch_size": [1, 2, 2],
}
AUDIO_LAYERS, AUDIO_WIDTH = 2, 16
AUDIO_DIM = AUDIO_LAYERS * AUDIO_WIDTH
IMAGE_DIM = 64


def core_config(num_layers: int) -> _core.ModelConfig:
    config = _core.ModelConfig()
    for key in set(CONFIG) & set(dir(config)):
        setattr(config, key, CONFIG[key])
    config.num_layers = num_layers
    config.image_dim, config.audio_dim = IMAGE_DIM, AUDIO_DIM
    return config


def random_weights(num_layers: int) -> dict[str, torch.Tensor]:
    config = {**CONFIG, "num_layers": num_layers}
    return random_checkpoint(
        config, 0, audio_layers=AUDIO_LAYERS, audio_channels=AUDIO_WIDTH, clip_dim=IMAGE_DIM
    )
