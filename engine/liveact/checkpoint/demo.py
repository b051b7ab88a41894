"""A tiny complete checkpoint with random weights, in the released directory format.

With it the whole pipeline runs end to end, on two CPU cores and without a download: the names,
dtypes and files are those of a released checkpoint, the sizes are small. The pictures are
moving texture, not people. `random_checkpoint` alone makes a DiT of any size for benchmarks
and tests. Equal seeds give equal bytes of every file (for one version of torch, safetensors and
tokenizers).
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

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
from liveact.checkpoint.random import (
    random_audio_encoder,
    random_checkpoint,
    random_image_encoder,
    random_text_encoder,
    random_vae,
)
from liveact.errors import InputError
from liveact.files import one_line, whole_directory, write_json

DIT_FILE = f"{DIT_STEM}.safetensors"
DEMO_FILES = frozenset(
    {
        DIT_CONFIG_FILE,
        DIT_FILE,
        VAE_FILE,
        TEXT_FILE,
        TEXT_CONFIG_FILE,
        IMAGE_FILE,
        IMAGE_CONFIG_FILE,
        f"{TOKENIZER_DIRECTORY}/tokenizer.json",
        f"{TOKENIZER_DIRECTORY}/tokenizer_config.json",
        f"{TOKENIZER_DIRECTORY}/special_tokens_map.json",
        f"{WAV2VEC_DIRECTORY}/{WAV2VEC_CONFIG_FILE}",
        f"{WAV2VEC_DIRECTORY}/{WAV2VEC_PREPROCESSOR_FILE}",
        f"{WAV2VEC_DIRECTORY}/{WAV2VEC_WEIGHTS_FILES[0]}",
    }
)

# `_demo` is how a reader of the directory knows that the weights are random.
DIT_CONFIG: dict[str, Any] = {
    "_class_name": "WanModel",
    "_demo": True,
    "model_type": "i2v",
    "in_dim": 36,
    "dim": 256,
    "ffn_dim": 512,
    "text_dim": 64,
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "intermediate_dim": 32,
    "output_dim": 48,
    "context_tokens": 8,
    "text_len": 512,
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
TEXT_CONFIG: dict[str, Any] = {
    "vocab": 320,  # pad, eos, unk, 256 bytes, and room: a released vocabulary is larger too
    "dim": DIT_CONFIG["text_dim"],
    "dim_attn": 64,
    "dim_ffn": 128,
    "num_heads": 4,
    "num_layers": 3,
    "num_buckets": 32,
    "shared_pos": False,
    "dropout": 0.0,
}
IMAGE_CONFIG: dict[str, Any] = {
    "image_size": 224,  # with patch 14: the 257 tokens that the DiT expects
    "patch_size": 14,
    "dim": 64,
    "mlp_ratio": 4,
    "out_dim": 32,
    "num_heads": 4,
    "num_layers": 4,
    "pool_type": "token",
    "pre_norm": True,
    "post_norm": False,
    "activation": "gelu",
}
AUDIO_CONFIG: dict[str, Any] = {
    "model_type": "wav2vec2",
    "architectures": ["Wav2Vec2Model"],
    "dtype": "float32",
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "do_stable_layer_norm": False,
    "num_feat_extract_layers": 7,
    "conv_dim": [32] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
AUDIO_PREPROCESSOR_CONFIG: dict[str, Any] = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "do_normalize": True,
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}
VAE_BASE_WIDTH = 8


def write_demo_checkpoint(directory: str | Path, seed: int = 0) -> Path:
    """Writes the demo checkpoint to `directory` and returns its absolute path.

    The directory appears complete or not at all. An existing demo checkpoint is replaced.

    Raises:
        InputError: the seed is out of range; the path is a file, cannot be written, or is a
            directory that holds anything but a demo checkpoint.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: expected 0..2^63-1, found {seed}")
    target = Path(directory).resolve()
    try:
        _refuse_foreign(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be read: {one_line(error)}") from error
    with whole_directory(target) as partial:
        _write_files(partial, seed)
    return target


def _refuse_foreign(target: Path) -> None:
    """Raises InputError where writing would destroy something that is not a demo checkpoint."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: expected a directory or nothing, found a file")
    if not any(target.iterdir()):
        return
    if not _is_demo(target / DIT_CONFIG_FILE):
        raise InputError(f"{target}: expected a demo checkpoint or nothing, found other files")
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    foreign = sorted(files - DEMO_FILES)
    if foreign:
        raise InputError(f"{target}: expected only a demo checkpoint, found {foreign[0]} too")


def _is_demo(config_path: Path) -> bool:
    try:
        config = json.loads(config_path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_demo") is True


def _write_files(directory: Path, seed: int) -> None:
    dit = random_checkpoint(
        DIT_CONFIG,
        seed,
        audio_layers=AUDIO_CONFIG["num_hidden_layers"],
        audio_channels=AUDIO_CONFIG["hidden_size"],
        clip_dim=IMAGE_CONFIG["dim"],
    )
    write_json(directory / DIT_CONFIG_FILE, DIT_CONFIG)
    (directory / DIT_FILE).write_bytes(save(dit))
    _write_pth(directory / VAE_FILE, random_vae(VAE_BASE_WIDTH, seed))
    _write_pth(directory / TEXT_FILE, random_text_encoder(TEXT_CONFIG, seed))
    write_json(directory / TEXT_CONFIG_FILE, TEXT_CONFIG)
    _write_pth(directory / IMAGE_FILE, random_image_encoder(IMAGE_CONFIG, seed))
    write_json(directory / IMAGE_CONFIG_FILE, IMAGE_CONFIG)
    write_tokenizer(directory / TOKENIZER_DIRECTORY)
    audio = directory / WAV2VEC_DIRECTORY
    audio.mkdir()
    write_json(audio / WAV2VEC_CONFIG_FILE, AUDIO_CONFIG)
    write_json(audio / WAV2VEC_PREPROCESSOR_FILE, AUDIO_PREPROCESSOR_CONFIG)
    weights = random_audio_encoder(AUDIO_CONFIG, seed)
    (audio / WAV2VEC_WEIGHTS_FILES[0]).write_bytes(save(weights, metadata={"format": "pt"}))


def _write_pth(path: Path, tensors: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()  # torch reports a full disk as something other than an OSError
    torch.save(tensors, buffer)
    path.write_bytes(buffer.getvalue())


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes, so that any text has an encoding without training anything."""
    pad, eos, unk = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in the released tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([pad, eos, unk, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([pad, eos, unk])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, vocabulary[eos])]
    )
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    special = {"pad_token": pad, "eos_token": eos, "unk_token": unk}
    write_json(directory / "special_tokens_map.json", special)
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": DIT_CONFIG["text_len"],
            **special,
        },
    )
