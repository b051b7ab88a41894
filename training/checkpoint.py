"""Writes a trained model in the released layout, part by part, in bf16.

The prompt and the portrait encoder are not trained: random ones tell prompts and identities apart,
and the DiT learns to read what they say.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from liveact.checkpoint.demo import IMAGE_CONFIG as DEMO_IMAGE_CONFIG
from liveact.checkpoint.demo import TEXT_CONFIG, write_tokenizer
from liveact.checkpoint.layout import (
    DIT_CONFIG_FILE,
    DIT_STEM,
    IMAGE_CONFIG_FILE,
    IMAGE_FILE,
    TEXT_CONFIG_FILE,
    TEXT_FILE,
    TOKENIZER_DIRECTORY,
    VAE_FILE,
    WAV2VEC_CONFIG_FILE,
    WAV2VEC_DIRECTORY,
    WAV2VEC_PREPROCESSOR_FILE,
    WAV2VEC_WEIGHTS_FILES,
)
from liveact.checkpoint.random import random_image_encoder, random_text_encoder
from liveact.files import write_json
from training.speech.model import CONFIG, PREPROCESSOR

IMAGE_CONFIG = DEMO_IMAGE_CONFIG | {"patch_size": 28, "num_layers": 2}  # 65 tokens
ENCODER_SEED = 11

DIT_CONFIG: dict[str, Any] = {
    "_class_name": "WanModel",
    "model_type": "i2v",
    "in_dim": 36,
    "dim": 256,
    "ffn_dim": 768,
    "text_dim": TEXT_CONFIG["dim"],
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 4,
    "intermediate_dim": 256,
    "output_dim": 64,
    "context_tokens": 8,
    "text_len": 64,
    "freq_dim": 256,
    "patch_size": [1, 2, 2],
    "eps": 1e-06,
    "qk_norm": True,
    "cross_attn_norm": True,
    "audio_window": 5,
    "vae_scale": 4,
    "norm_input_visual": True,
    "norm_output_audio": True,
}
AUDIO_DIM = CONFIG["num_hidden_layers"] * CONFIG["hidden_size"]
IMAGE_DIM = IMAGE_CONFIG["dim"]


def write_encoders(
    directory: Path, vae: Mapping[str, Tensor], speech: Mapping[str, Tensor]
) -> None:
    """All files but those of the DiT. vae, speech: by released name, any format."""
    directory.mkdir(parents=True, exist_ok=True)
    write_vae(directory, vae)
    _write_pth(directory / TEXT_FILE, random_text_encoder(TEXT_CONFIG, ENCODER_SEED))
    write_json(directory / TEXT_CONFIG_FILE, TEXT_CONFIG)
    _write_pth(directory / IMAGE_FILE, random_image_encoder(IMAGE_CONFIG, ENCODER_SEED))
    write_json(directory / IMAGE_CONFIG_FILE, IMAGE_CONFIG)
    if not (directory / TOKENIZER_DIRECTORY).exists():
        write_tokenizer(directory / TOKENIZER_DIRECTORY)
    audio = directory / WAV2VEC_DIRECTORY
    audio.mkdir(exist_ok=True)
    write_json(audio / WAV2VEC_CONFIG_FILE, CONFIG)
    write_json(audio / WAV2VEC_PREPROCESSOR_FILE, PREPROCESSOR)
    (audio / WAV2VEC_WEIGHTS_FILES[0]).write_bytes(save(rounded(speech), {"format": "pt"}))


def write_vae(directory: Path, vae: Mapping[str, Tensor]) -> None:
    """The autoencoder. vae: by released name."""
    _write_pth(directory / VAE_FILE, rounded(vae))


def write_dit(directory: Path, dit: Mapping[str, Tensor]) -> None:
    """The DiT and its sizes. dit: by released name."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / DIT_CONFIG_FILE, DIT_CONFIG)
    (directory / f"{DIT_STEM}.safetensors").write_bytes(save(rounded(dit), {"format": "pt"}))


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In bf16, contiguous, by name."""
    return {n: t.detach().bfloat16().contiguous() for n, t in tensors.items()}


def _write_pth(path: Path, tensors: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()  # as `torch.save` to a path keeps the name of the file in it
    torch.save(tensors, buffer)
    path.write_bytes(buffer.getvalue())
