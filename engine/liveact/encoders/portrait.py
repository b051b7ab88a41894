"""The portrait encoder: the vision tower of CLIP ViT-H/14 in the released `.pth`.

What conditions the DiT is the output of the last but one layer, without a final norm, so the last
layer is checked for but neither loaded nor run. Sizes are those of ViT-H/14 unless a
`clip_config.json` lies beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from liveact.checkpoint.layout import IMAGE_CONFIG_FILE, IMAGE_FILE
from liveact.checkpoint.tensors import FLOATS, PthTensors, check_tensors, load_pth
from liveact.encoders.weights import Weights, attention
from liveact.errors import InputError
from liveact.files import read_json, read_size

_VIT_HUGE_14: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "num_layers": 32,
}
# What the released model is and this one therefore has to be.
_FIXED = {"pool_type": "token", "pre_norm": True, "post_norm": False, "activation": "gelu"}

_EPS = 1e-5
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B in 0..1
_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageSizes(NamedTuple):
    """Sizes of a vision tower."""

    image_size: int
    patch_size: int
    dim: int
    dim_ffn: int
    num_heads: int
    num_layers: int

    @property
    def tokens(self) -> int:
        """One for the class and one for each patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


class ImageWeights(NamedTuple):
    """What `open_image` found."""

    sizes: ImageSizes
    tensors: PthTensors


def open_image(checkpoint_dir: Path | str) -> ImageWeights:
    """Sizes and mapped weights of a checkpoint directory, checked; reads no weights.

    Raises:
        InputError: a file is missing or not what was expected.
    """
    checkpoint_dir = Path(checkpoint_dir)
    sizes = _read_sizes(checkpoint_dir / IMAGE_CONFIG_FILE)
    tensors = load_pth(checkpoint_dir / IMAGE_FILE)
    check_tensors(tensors, shapes(sizes), FLOATS, "image encoder", ("visual.transformer.",))
    return ImageWeights(sizes, tensors)


class ImageEncoder:
    """Portrait → image embeddings. Stateless after loading; may be shared between threads."""

    def __init__(
        self,
        opened: ImageWeights,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reads the weights that `open_image` found, but for those of the last layer."""
        self.sizes = opened.sizes
        used = shapes(self.sizes._replace(num_layers=self.sizes.num_layers - 1))
        wanted = {name: opened.tensors[name] for name in used if "post_norm" not in name}
        self.weights = Weights(wanted, device, dtype)

    @classmethod
    def load(
        cls,
        checkpoint_dir: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ImageEncoder:
        """`open_image`, then the weights."""
        return cls(open_image(checkpoint_dir), device, dtype)

    def close(self) -> None:
        """Frees the weights; nothing may be called afterwards."""
        self.weights.clear()

    @property
    def dim(self) -> int:
        """Width of the embeddings; 1280 in the released model."""
        return self.sizes.dim

    @property
    def tokens(self) -> int:
        """Number of embeddings of an image, class token included; 257 in the released model."""
        return self.sizes.tokens

    @torch.no_grad()
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """The embeddings of an image.

        Args:
            image: [1, 3, H, W] or [1, 3, 1, H, W] (a video of one frame), RGB in [−1, 1]; any
                size and shape: it is resized, without cropping, to the square of the model.

        Returns:
            [1, tokens, dim] on the device and in the dtype of the encoder.
        """
        shape = tuple(image.shape)
        if len(shape) == 5 and shape[2] == 1:
            image = image.squeeze(2)
        if image.dim() != 4 or image.shape[:2] != (1, 3) or 0 in shape:
            raise InputError(
                f"image: expected [1, 3, H, W] or [1, 3, 1, H, W], found {list(shape)}"
            )
        image = image.to(device=self.weights.device, dtype=torch.float32)
        square = (self.sizes.image_size, self.sizes.image_size)
        image = F.interpolate(image, size=square, mode="bicubic", align_corners=False)
        mean, std = (image.new_tensor(x).view(1, 3, 1, 1) for x in (_MEAN, _STD))
        pixels = (image * 0.5 + 0.5 - mean) / std
        weights = self.weights
        patches = F.conv2d(
            pixels.to(weights.dtype),
            weights["visual.patch_embedding.weight"],
            stride=self.sizes.patch_size,
        )
        x = torch.cat([weights["visual.cls_embedding"], patches.flatten(2).transpose(1, 2)], dim=1)
        x = x + weights["visual.pos_embedding"]  # [1, tokens, dim]
        x = weights.layer_norm("visual.pre_norm", x, _EPS)
        for layer in range(self.sizes.num_layers - 1):
            x = self._layer(f"visual.transformer.{layer}", x)
        return x

    def _layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [1, tokens, dim] → same shape."""
        weights = self.weights
        h = weights.layer_norm(f"{name}.norm1", x, _EPS)
        q, k, v = weights.linear(f"{name}.attn.to_qkv", h).chunk(3, dim=-1)
        seen = attention(q, k, v, self.sizes.num_heads)
        x = x + weights.linear(f"{name}.attn.proj", seen)
        h = weights.layer_norm(f"{name}.norm2", x, _EPS)
        h = F.gelu(weights.linear(f"{name}.mlp.0", h))
        return x + weights.linear(f"{name}.mlp.2", h)


def _read_sizes(path: Path) -> ImageSizes:
    """The sizes in `clip_config.json`, or those of ViT-H/14 where there is no such file."""
    config = read_json(path) if path.exists() else _VIT_HUGE_14
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise InputError(f"{path}: expected {key} {value!r}, found {config[key]!r}")
    dim = read_size(config, "dim", path, at_most=2**16)
    sizes = ImageSizes(
        image_size=read_size(config, "image_size", path, at_most=2**14),
        patch_size=read_size(config, "patch_size", path, at_most=2**14),
        dim=dim,
        dim_ffn=dim * read_size(config, "mlp_ratio", path, at_most=64),
        num_heads=read_size(config, "num_heads", path, at_most=1024),
        num_layers=read_size(config, "num_layers", path, at_most=256),
    )
    if dim % sizes.num_heads or sizes.image_size % sizes.patch_size or sizes.num_layers < 2:
        raise InputError(
            f"{path}: expected dim divisible by num_heads, image_size by patch_size and 2 layers "
            f"or more, found {sizes}"
        )
    return sizes


def shapes(sizes: ImageSizes) -> dict[str, tuple[int, ...]]:
    """Released name → shape of every tensor of the tower but the projection `visual.head`."""
    dim, ffn, patch = sizes.dim, sizes.dim_ffn, sizes.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, sizes.tokens, dim),
        "visual.patch_embedding.weight": (dim, 3, patch, patch),
    }
    linears = {"attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    linears |= {"mlp.0": (ffn, dim), "mlp.2": (dim, ffn)}
    norms = ["visual.pre_norm", "visual.post_norm"]
    for layer in range(sizes.num_layers):
        prefix = f"visual.transformer.{layer}"
        norms += [f"{prefix}.norm1", f"{prefix}.norm2"]
        for name, shape in linears.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            shapes[f"{prefix}.{name}.bias"] = shape[:1]
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (dim,)
    return shapes
