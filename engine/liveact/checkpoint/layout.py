"""The files of a checkpoint directory, as released (docs/model.md, "Checkpoint directory")."""

from __future__ import annotations

from pathlib import Path

# The DiT: sizes, and `<stem>.safetensors` or the shards of `<stem>.safetensors.index.json`.
DIT_CONFIG_FILE = "config.json"
DIT_STEM = "diffusion_pytorch_model"

VAE_FILE = "Wan2.1_VAE.pth"

# The prompt encoder; without a configuration the sizes are those of UMT5-XXL.
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TEXT_CONFIG_FILE = "t5_config.json"
TOKENIZER_DIRECTORY = Path("google") / "umt5-xxl"

# The portrait encoder; without a configuration the sizes are those of ViT-H/14.
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
IMAGE_CONFIG_FILE = "clip_config.json"

# The speech encoder: a Hugging Face directory, in the checkpoint unless another one is named.
WAV2VEC_DIRECTORY = "wav2vec"
WAV2VEC_CONFIG_FILE = "config.json"
WAV2VEC_PREPROCESSOR_FILE = "preprocessor_config.json"
WAV2VEC_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # the first of them that exists
