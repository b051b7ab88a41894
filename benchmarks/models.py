"""The models that are measured: a checkpoint, or random weights of a named size.

Random weights are as fast as trained ones. They are drawn on the device, so the released size needs
neither files nor a network. What runs once per session (text and image encoder) is then replaced by
random features of the right width; what runs in every block (audio encoder, DiT, VAE) is complete.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import weights_hash
from benchmarks.peaks import row_scales
from liveact import _core
from liveact.checkpoint import demo
from liveact.checkpoint.layout import DIT_STEM, VAE_FILE, WAV2VEC_DIRECTORY
from liveact.checkpoint.random import random_audio_encoder, random_checkpoint, random_vae
from liveact.checkpoint.tensors import PthTensors, open_tensors
from liveact.device.devices import Devices, open_devices
from liveact.dit.dit import Dit
from liveact.dit.precision import Precision, format_of
from liveact.dit.weights import product_weights
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
from liveact.engine import Engine
from liveact.files import read_json
from liveact.vae.vae import Vae

PROMPT_TOKENS = 40  # of a prompt of two sentences
IMAGE_TOKENS = 257


@dataclass(frozen=True)
class SizedModel:
    """Sizes of everything that runs in a block."""

    config: dict[str, Any]  # of the DiT, keys of config.json
    audio_config: dict[str, Any]  # of wav2vec2
    clip_dim: int
    vae_width: int

    @property
    def features(self) -> dict[str, int]:
        """What random_checkpoint takes beside the config."""
        return {
            "audio_layers": self.audio_config["num_hidden_layers"],
            "audio_channels": self.audio_config["hidden_size"],
            "clip_dim": self.clip_dim,
        }


def _audio(hidden: int, layers: int, heads: int, conv: int, positions: int) -> dict[str, Any]:
    return demo.AUDIO_CONFIG | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "conv_dim": [conv] * 7,
        "num_conv_pos_embeddings": positions,
        "num_conv_pos_embedding_groups": 16,
    }


_RELEASED = demo.DIT_CONFIG | {
    "dim": 5120,
    "ffn_dim": 13824,
    "text_dim": 4096,
    "num_heads": 40,
    "num_layers": 40,
    "intermediate_dim": 512,
    "output_dim": 768,
    "context_tokens": 32,
}
MODELS = {
    "tiny": SizedModel(demo.DIT_CONFIG, demo.AUDIO_CONFIG, demo.IMAGE_CONFIG["dim"], 8),
    # At 192×192 the benchmark of a block ends within a minute on two CPU cores.
    "middle": SizedModel(
        _RELEASED | {"dim": 384, "ffn_dim": 1056, "num_heads": 3, "num_layers": 1, "text_dim": 384},
        _audio(192, 4, 4, 64, 32),
        320,
        4,
    ),
    "released": SizedModel(_RELEASED, _audio(768, 12, 12, 512, 128), 1280, 96),
}


@dataclass(frozen=True)
class Loaded:
    """A DiT on its device, and what it was made of."""

    devices: Devices
    dit: Dit
    config: dict[str, Any]  # keys of config.json
    weights: Mapping[str, Tensor]
    source: str
    checkpoint: Path | None
    model: SizedModel | None  # None: a checkpoint
    size: tuple[int, int]  # width, height of the picture
    seed: int

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.size[1] // 8, self.size[0] // 8

    @property
    def tokens_per_frame(self) -> int:
        return self.size[0] * self.size[1] // 256

    @property
    def on_cpu(self) -> bool:
        return self.devices.core.name == "cpu"

    def described(self) -> dict[str, Any]:
        """The part of a result that says what ran."""
        keys = ("dim", "ffn_dim", "num_heads", "num_layers")
        return {
            "device": self.devices.name,
            "precision": str(self.dit.precision if self.dit else self.devices.precision),
            "sizes": {key: self.config[key] for key in keys}
            | {
                "picture": list(self.size),
                "tokens_per_latent_frame": self.tokens_per_frame,
                "prompt_tokens": PROMPT_TOKENS,
            },
            "weights": {"source": self.source, "sha256": weights_hash(self.weights)},
        }


def core_config(config: Mapping[str, Any], model: SizedModel) -> _core.ModelConfig:
    """The runtime's configuration of the same sizes."""
    result = _core.ModelConfig()
    for key in set(config) & {name for name in dir(result) if not name.startswith("_")}:
        setattr(result, key, config[key])
    features = model.features
    result.image_dim = features["clip_dim"]
    result.audio_dim = features["audio_layers"] * features["audio_channels"]
    return result


def load(options: argparse.Namespace, plain: bool = False) -> Loaded:
    """The DiT that `options` (see options.add_model) ask for. Raises InputError, DeviceError.

    plain: of random weights, not quantised and without the engine's DiT, for which there may be no
    memory beside plain PyTorch's.
    """
    devices = open_devices(options.device, None, options.precision, options.checkpoint)
    on_cpu = devices.core.name == "cpu"
    size = options.size or ((192, 192) if on_cpu else (512, 512))
    common = {"size": size, "seed": options.seed}
    if options.checkpoint is not None:
        directory = options.checkpoint
        dit = Dit.load(directory, devices.cores, devices.precision)
        tensors = open_tensors(directory, DIT_STEM)
        config = demo.DIT_CONFIG | read_json(directory / "config.json")
        return Loaded(devices, dit, config, tensors, directory.name, directory, None, **common)
    name = options.random_weights or ("middle" if on_cpu else "released")
    model = MODELS[name]
    if len(devices.cores) == 2 and model.config["num_heads"] % 2:  # they share the heads
        heads = model.config["num_heads"] + 1
        model = replace(model, config=model.config | {"num_heads": heads})
    drawn = draw(model, options.seed, devices.torch_device)
    if devices.precision == "fp32":  # as torch has them too, beside which they are timed
        drawn = {name: tensor.float() for name, tensor in drawn.items()}
    elif not on_cpu and not plain:  # 19 GB instead of 38 from here on, and no way through the host
        quantise(drawn, model.config["num_layers"], devices.precision)
        torch.cuda.empty_cache()  # the runtime has an allocator of its own
    dit = cast(Dit, None)
    if not plain:
        dit = Dit(devices.cores, core_config(model.config, model), drawn, devices.precision)
    source = f"random, {name}, seed {options.seed}"
    return Loaded(devices, dit, model.config, drawn, source, None, model, **common)


def draw(model: SizedModel, seed: int, device: torch.device) -> dict[str, Tensor]:
    """The weights of a DiT in bf16, drawn on the device."""
    return random_checkpoint(model.config, seed, device=device, **model.features)


def quantise(weights: dict[str, Tensor], num_layers: int, precision: Precision) -> None:
    """Replaces the weight of every product in fp8 by its codes and their scale, where it lies, as a
    converted checkpoint has them (docs/precision.md)."""
    for name, (layer, product) in product_weights(num_layers).items():
        if format_of(precision, layer, product) == "fp8":
            weights[name], scale = row_scales(weights[name])
            weights[f"{name}_scale"] = scale[:, 0].contiguous()


def open_engine(loaded: Loaded) -> Engine:
    """The whole pipeline round a DiT."""
    device, vae_device = loaded.devices.torch_device, loaded.devices.vae_torch_device
    if loaded.checkpoint is not None:
        folder = loaded.checkpoint
        return Engine(
            devices=loaded.devices,
            dit=loaded.dit,
            vae=Vae.load(folder / VAE_FILE, vae_device, loaded.devices.vae_launch),
            text_encoder=TextEncoder.load(folder, device),
            image_encoder=ImageEncoder.load(folder, device),
            audio_encoder=AudioEncoder.load(folder / WAV2VEC_DIRECTORY, device),
        )
    model = loaded.model
    assert model is not None
    vae = PthTensors(random_vae(model.vae_width, loaded.seed), Path("random"))
    return Engine(
        devices=loaded.devices,
        dit=loaded.dit,
        vae=Vae.from_tensors(vae, vae_device, loaded.devices.vae_launch),
        text_encoder=cast(TextEncoder, _RandomText(model.config["text_dim"], loaded.seed)),
        image_encoder=cast(ImageEncoder, _RandomImage(model.clip_dim, loaded.seed)),
        audio_encoder=_random_audio_encoder(model, loaded.seed, device),
    )


def _random_audio_encoder(model: SizedModel, seed: int, device: torch.device) -> AudioEncoder:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(model.audio_config))
        preprocessor = json.dumps(demo.AUDIO_PREPROCESSOR_CONFIG)
        (folder / "preprocessor_config.json").write_text(preprocessor)
        tensors = random_audio_encoder(model.audio_config, seed)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return AudioEncoder.load(folder, device)


class _RandomText:
    """Stands in for UMT5: features of its width. Runs once per prompt, never in a block."""

    def __init__(self, dim: int, seed: int) -> None:
        self.dim, self._seed = dim, seed

    def encode(self, prompt: str, text_len: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randn(min(PROMPT_TOKENS, text_len), self.dim, generator=generator)

    def close(self) -> None:
        """It holds nothing."""


class _RandomImage:
    """Stands in for CLIP: features of its width. Runs once per session."""

    tokens = IMAGE_TOKENS

    def __init__(self, dim: int, seed: int) -> None:
        self.dim, self._seed = dim, seed

    def encode(self, image: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randn(image.shape[0], self.tokens, self.dim, generator=generator)

    def close(self) -> None:
        """It holds nothing."""
