"""The portrait encoder: the vision tower of CLIP ViT-H/14 in the released `.pth`.

What conditions the DiT is the output of the last but one layer, without a final norm, so the last
layer is checked for but neither loaded nor run. Sizes are those of ViT-H/14 unless a
`clip_config.json` lies beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from liveact.checkpoint.layout import IMAGE_CONFIG_FILE, IMAGE_FILE
from liveact.checkpoint.tensors import (
    FLOATS,
    PthTensors,
    assign_tensors,
    check_tensors,
    load_pth,
)
from liveact.errors import InputError
from liveact.files import read_json, read_size

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

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

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B in 0..1
_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder:
    """Portrait → image embeddings. Stateless after loading; may be shared between threads."""

    def __init__(self, model: CLIPVisionModel, sizes: _Sizes) -> None:
        self._model = model
        self._sizes = sizes

    @classmethod
    def load(
        cls,
        checkpoint_dir: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ImageEncoder:
        """Loads the `visual.*` tensors; `InputError` if they are not what was expected."""
        checkpoint_dir = Path(checkpoint_dir)
        sizes = _read_sizes(checkpoint_dir / IMAGE_CONFIG_FILE)
        tensors = load_pth(checkpoint_dir / IMAGE_FILE)
        check_tensors(tensors, _shapes(sizes), FLOATS, "image encoder", ("visual.transformer.",))
        model = _build_model(sizes)
        assign_tensors(model, _renamed(tensors, sizes.num_layers - 1), device, dtype)
        # A buffer that is in no checkpoint, so still on the meta device.
        positions = torch.arange(sizes.tokens, device=device)
        model.embeddings.register_buffer("position_ids", positions[None], persistent=False)
        return cls(model, sizes)

    @property
    def dim(self) -> int:
        """Width of the embeddings; 1280 in the released model."""
        return self._sizes.dim

    @property
    def tokens(self) -> int:
        """Number of embeddings of an image, class token included; 257 in the released model."""
        return self._sizes.tokens

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
        image = image.to(device=self._model.device, dtype=torch.float32)
        square = (self._sizes.image_size, self._sizes.image_size)
        image = F.interpolate(image, size=square, mode="bicubic", align_corners=False)
        mean, std = (image.new_tensor(x).view(1, 3, 1, 1) for x in (_MEAN, _STD))
        pixels = (image * 0.5 + 0.5 - mean) / std
        output = self._model(pixel_values=pixels.to(self._model.dtype))
        embeddings: torch.Tensor = output.last_hidden_state
        return embeddings


class _Sizes(NamedTuple):
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


def _read_sizes(path: Path) -> _Sizes:
    """The sizes in `clip_config.json`, or those of ViT-H/14 where there is no such file."""
    config = read_json(path) if path.exists() else _VIT_HUGE_14
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise InputError(f"{path}: expected {key} {value!r}, found {config[key]!r}")
    dim = read_size(config, "dim", path, at_most=2**16)
    sizes = _Sizes(
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


def _build_model(sizes: _Sizes) -> CLIPVisionModel:
    """The tower without its last layer, on the meta device."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    values: dict[str, Any] = {
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.dim_ffn,
        "num_hidden_layers": sizes.num_layers - 1,
        "num_attention_heads": sizes.num_heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_act": "gelu",  # the erf form
        "layer_norm_eps": 1e-5,
        "attn_implementation": "sdpa",
    }
    with torch.device("meta"):
        return CLIPVisionModel(CLIPVisionConfig(**values))


def _shapes(sizes: _Sizes) -> dict[str, tuple[int, ...]]:
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


def _renamed(tensors: PthTensors, layers: int) -> dict[str, torch.Tensor]:
    """The tensors under the names of `CLIPVisionModel`, q, k and v apart; views, no copies."""
    renamed = {
        "embeddings.class_embedding": tensors["visual.cls_embedding"][0, 0],
        "embeddings.position_embedding.weight": tensors["visual.pos_embedding"][0],
        "embeddings.patch_embedding.weight": tensors["visual.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"pre_layrnorm.{kind}"] = tensors[f"visual.pre_norm.{kind}"]
        renamed[f"post_layernorm.{kind}"] = tensors[f"visual.post_norm.{kind}"]
        for layer in range(layers):
            theirs, ours = f"visual.transformer.{layer}", f"encoder.layers.{layer}"
            parts = tensors[f"{theirs}.attn.to_qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                renamed[f"{ours}.self_attn.{name}_proj.{kind}"] = part
            renamed[f"{ours}.self_attn.out_proj.{kind}"] = tensors[f"{theirs}.attn.proj.{kind}"]
            renamed[f"{ours}.layer_norm1.{kind}"] = tensors[f"{theirs}.norm1.{kind}"]
            renamed[f"{ours}.layer_norm2.{kind}"] = tensors[f"{theirs}.norm2.{kind}"]
            renamed[f"{ours}.mlp.fc1.{kind}"] = tensors[f"{theirs}.mlp.0.{kind}"]
            renamed[f"{ours}.mlp.fc2.{kind}"] = tensors[f"{theirs}.mlp.2.{kind}"]
    return renamed
