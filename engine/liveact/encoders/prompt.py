"""The prompt encoder: UMT5-XXL in the released `.pth`.

The encoder half of UMT5: a relative position bias in every layer, gated GELU(tanh) feed-forward, no
scaling of q·k, RMS norms without bias. Sizes are those of UMT5-XXL unless a `t5_config.json` lies
beside the weights.
"""

from __future__ import annotations

import html
import logging
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import ftfy
import torch
from torch.nn import functional as F

from liveact.checkpoint.layout import TEXT_CONFIG_FILE, TEXT_FILE, TOKENIZER_DIRECTORY
from liveact.checkpoint.tensors import FLOATS, PthTensors, check_tensors, load_pth
from liveact.encoders.tokens import PromptTokenizer, check_tokenizer
from liveact.encoders.weights import Weights, attention
from liveact.errors import InputError
from liveact.files import read_json, read_size

_UMT5_XXL: dict[str, Any] = {
    "vocab": 256384,
    "dim": 4096,
    "dim_attn": 4096,
    "dim_ffn": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "num_buckets": 32,
    "shared_pos": False,
}

_EPS = 1e-6
_FARTHEST = 128  # tokens; the last bucket is for all that are farther away


class TextSizes(NamedTuple):
    """Sizes of the encoder."""

    vocabulary: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int


class TextWeights(NamedTuple):
    """What `open_text` found. tokenizer: its file; None where its directory is missing."""

    sizes: TextSizes
    tensors: PthTensors
    tokenizer: Path | None
    tokenizer_directory: Path


def open_text(checkpoint_dir: Path | str) -> TextWeights:
    """Sizes, tokenizer and mapped weights of a checkpoint directory, checked; reads no weights.

    Raises:
        InputError: weights, sizes or tokenizer missing or not what was expected.
    """
    checkpoint_dir = Path(checkpoint_dir)
    sizes = _read_sizes(checkpoint_dir / TEXT_CONFIG_FILE)
    tensors = load_pth(checkpoint_dir / TEXT_FILE)
    check_tensors(tensors, shapes(sizes), FLOATS, "text encoder", ("blocks.",))
    directory = checkpoint_dir / TOKENIZER_DIRECTORY
    tokenizer = check_tokenizer(directory) if directory.is_dir() else None
    return TextWeights(sizes, tensors, tokenizer, directory)


class TextEncoder:
    """Prompt → text embeddings. Stateless after loading; may be shared between threads."""

    def __init__(
        self,
        opened: TextWeights,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reads the tokenizer and the weights that `open_text` found. Raises InputError."""
        self.sizes, path = opened.sizes, opened.tokenizer
        self._tokenizer = None if path is None else PromptTokenizer(path, self.sizes.vocabulary)
        self._tokenizer_directory = opened.tokenizer_directory
        wanted = {name: opened.tensors[name] for name in shapes(opened.sizes)}
        self.weights = Weights(wanted, device, dtype)

    @classmethod
    def load(
        cls,
        checkpoint_dir: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoder:
        """`open_text`, then the weights.

        Without a tokenizer `encode_ids` works and `encode` raises.
        """
        return cls(open_text(checkpoint_dir), device, dtype)

    def close(self) -> None:
        """Frees the weights; nothing may be called afterwards."""
        self.weights.clear()

    @property
    def dim(self) -> int:
        """Width of the embeddings; 4096 in the released model."""
        return self.sizes.dim

    def encode(self, prompt: str, text_len: int = 512) -> torch.Tensor:
        """The embeddings of a prompt of at most `text_len` tokens. What is longer is cut off, and
        a warning is logged to `liveact`.

        The released code pads to `text_len`, masks the padding and cuts the output to its true
        length. A masked key has weight exp(−∞) = 0 and the position bias depends on distances
        only, so encoding the true tokens alone gives the same rows for less work.

        Returns:
            [n_tok, dim] on the device and in the dtype of the encoder, 1 ≤ n_tok ≤ text_len.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self._tokenizer_directory}: expected the directory of the tokenizer, "
                "found nothing"
            )
        found, num_tokens = self._tokenizer.encode(clean_prompt(prompt), text_len)
        if not found:
            raise InputError(f"prompt: expected at least one token, found none in {prompt!r:.80}")
        if num_tokens > text_len:
            logging.getLogger("liveact").warning(
                "prompt: %d tokens, the first %d are used", num_tokens, text_len
            )
        ids = torch.tensor([found])
        return self.encode_ids(ids, torch.ones_like(ids))[0]

    @torch.no_grad()
    def encode_ids(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The embeddings of token ids.

        Args:
            ids: [1, n] integers below the size of the vocabulary.
            mask: [1, n], 1 for a token, 0 for padding, which nothing attends to.

        Returns:
            [1, n, dim], the rows of padding included.
        """
        if ids.dim() != 2 or ids.shape != mask.shape:
            raise InputError(
                f"ids and mask: expected [1, n] each, found {list(ids.shape)}, {list(mask.shape)}"
            )
        vocabulary = self.sizes.vocabulary
        if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise InputError(
                f"ids: expected one or more in 0..{vocabulary - 1}, found {ids.tolist()!r:.80}"
            )
        weights, device = self.weights, self.weights.device
        ids, mask = ids.to(device), mask.to(device)
        buckets = _buckets(ids.shape[1], self.sizes.num_buckets).to(device)
        lowest = torch.finfo(weights.dtype).min
        masked = torch.where(mask[:, None, None, :] > 0, 0.0, lowest).to(weights.dtype)
        x = F.embedding(ids, weights["token_embedding.weight"])  # [1, n, dim]
        for layer in range(self.sizes.num_layers):
            x = self._layer(f"blocks.{layer}", x, buckets, masked)
        return self._norm("norm", x)

    def _layer(
        self, name: str, x: torch.Tensor, buckets: torch.Tensor, masked: torch.Tensor
    ) -> torch.Tensor:
        """x [1, n, dim] → same shape. buckets [n, n]; masked [1, 1, 1, n], added to the logits."""
        weights = self.weights
        table = weights[f"{name}.pos_embedding.embedding.weight"]  # [buckets, heads]
        bias = F.embedding(buckets, table).permute(2, 0, 1)[None] + masked  # [1, heads, n, n]
        h = self._norm(f"{name}.norm1", x)
        q, k, v = (weights.linear(f"{name}.attn.{part}", h) for part in "qkv")
        heard = attention(q, k, v, self.sizes.num_heads, bias, scale=1.0)
        x = x + weights.linear(f"{name}.attn.o", heard)
        h = self._norm(f"{name}.norm2", x)
        gate = F.gelu(weights.linear(f"{name}.ffn.gate.0", h), approximate="tanh")
        return x + weights.linear(f"{name}.ffn.fc2", gate * weights.linear(f"{name}.ffn.fc1", h))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] scaled to a root mean square of 1, in float32."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)
        return self.weights[f"{name}.weight"] * scaled.to(x.dtype)


def clean_prompt(prompt: str) -> str:
    """A prompt as the released tokenizer cleans it: wrongly decoded text repaired, curly quotes
    straightened and full-width letters narrowed (`ftfy.fix_text`), HTML entities (also doubly
    escaped ones) resolved, runs of whitespace to one blank, ends cut."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def shapes(sizes: TextSizes) -> dict[str, tuple[int, ...]]:
    """Released name → shape of every tensor of the encoder."""
    dim, attn, ffn = sizes.dim, sizes.dim_attn, sizes.dim_ffn
    layer: dict[str, tuple[int, ...]] = {
        "norm1.weight": (dim,),
        "attn.q.weight": (attn, dim),
        "attn.k.weight": (attn, dim),
        "attn.v.weight": (attn, dim),
        "attn.o.weight": (dim, attn),
        "pos_embedding.embedding.weight": (sizes.num_buckets, sizes.num_heads),
        "norm2.weight": (dim,),
        "ffn.gate.0.weight": (ffn, dim),
        "ffn.fc1.weight": (ffn, dim),
        "ffn.fc2.weight": (dim, ffn),
    }
    found: dict[str, tuple[int, ...]] = {"token_embedding.weight": (sizes.vocabulary, dim)}
    for i in range(sizes.num_layers):
        found |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    return found | {"norm.weight": (dim,)}


def _buckets(count: int, num_buckets: int) -> torch.Tensor:
    """[query, key] → the bucket of their distance, of `count` tokens each.

    Half of the buckets are for keys behind the query. Of each half, half are for one distance each,
    the others for ranges that grow logarithmically.
    """
    positions = torch.arange(count)
    distance = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    exact = half // 2
    near = distance.abs()
    ratio = torch.log(near.float() / exact) / math.log(_FARTHEST / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return (distance > 0).long() * half + torch.where(near < exact, near, far)


def _read_sizes(path: Path) -> TextSizes:
    """The sizes in `t5_config.json`, or those of UMT5-XXL where there is no such file."""
    config = read_json(path) if path.exists() else _UMT5_XXL
    heads = read_size(config, "num_heads", path, at_most=1024)
    dim_attn = read_size(config, "dim_attn", path, at_most=2**16)
    if dim_attn % heads:
        raise InputError(f"{path}: expected dim_attn divisible by {heads} heads, found {dim_attn}")
    if config.get("shared_pos", False) is not False:
        raise InputError(f"{path}: expected shared_pos false, found {config['shared_pos']!r}")
    buckets = read_size(config, "num_buckets", path, at_most=2 * _FARTHEST)
    if buckets % 4:
        raise InputError(f"{path}: expected num_buckets to be a multiple of 4, found {buckets}")
    return TextSizes(
        vocabulary=read_size(config, "vocab", path, at_most=2**24),
        dim=read_size(config, "dim", path, at_most=2**16),
        dim_attn=dim_attn,
        dim_ffn=read_size(config, "dim_ffn", path, at_most=2**20),
        num_heads=heads,
        num_layers=read_size(config, "num_layers", path, at_most=256),
        num_buckets=buckets,
    )
