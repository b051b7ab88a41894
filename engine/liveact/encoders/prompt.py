"""The prompt encoder: UMT5-XXL in the released `.pth`, on the `transformers` implementation.

The model is the encoder half of UMT5: a relative position bias in every layer, gated GELU(tanh)
feed-forward, no scaling of q·k. Sizes are those of UMT5-XXL unless a `t5_config.json` lies beside
the weights.
"""

from __future__ import annotations

import html
import logging
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftfy
import torch

from liveact.checkpoint.layout import TEXT_CONFIG_FILE, TEXT_FILE, TOKENIZER_DIRECTORY
from liveact.checkpoint.tensors import FLOATS, assign_tensors, check_tensors, load_pth
from liveact.errors import InputError
from liveact.files import read_json, read_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

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

# transformers → released, for one layer and around the layers.
_LAYER_NAMES = {
    "layer.0.layer_norm.weight": "norm1.weight",
    "layer.0.SelfAttention.q.weight": "attn.q.weight",
    "layer.0.SelfAttention.k.weight": "attn.k.weight",
    "layer.0.SelfAttention.v.weight": "attn.v.weight",
    "layer.0.SelfAttention.o.weight": "attn.o.weight",
    "layer.0.SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
    "layer.1.layer_norm.weight": "norm2.weight",
    "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.0.weight",
    "layer.1.DenseReluDense.wi_1.weight": "ffn.fc1.weight",
    "layer.1.DenseReluDense.wo.weight": "ffn.fc2.weight",
}
_OUTER_NAMES = {
    "shared.weight": "token_embedding.weight",
    "encoder.embed_tokens.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
}


class TextEncoder:
    """Prompt → text embeddings. Stateless after loading; may be shared between threads."""

    def __init__(
        self,
        model: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase | None,
        tokenizer_directory: Path,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._tokenizer_directory = tokenizer_directory
        # Truncation is set on the tokenizer itself, so its calls exclude each other.
        self._tokenizer_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        checkpoint_dir: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoder:
        """Loads weights, and the tokenizer if its directory is there.

        Without a tokenizer `encode_ids` works and `encode` raises.

        Raises:
            InputError: weights, sizes or tokenizer missing or not what was expected.
        """
        checkpoint_dir = Path(checkpoint_dir)
        model = _load_model(checkpoint_dir, device, dtype)
        directory = checkpoint_dir / TOKENIZER_DIRECTORY
        tokenizer = _load_tokenizer(directory) if directory.is_dir() else None
        if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
            raise InputError(
                f"{directory}: expected at most the {model.config.vocab_size} tokens of the "
                f"text encoder, found {len(tokenizer)}"
            )
        return cls(model, tokenizer, directory)

    @property
    def dim(self) -> int:
        """Width of the embeddings; 4096 in the released model."""
        return int(self._model.config.d_model)

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
        with self._tokenizer_lock:
            text = clean_prompt(prompt)
            tokens = self._tokenizer(
                text, truncation=True, max_length=text_len, return_tensors="pt"
            )
            ids: torch.Tensor = tokens["input_ids"]
            found = ids.shape[1]
            if found == text_len:
                found = len(self._tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if found > text_len:
            logging.getLogger("liveact").warning(
                "prompt: %d tokens, the first %d are used", found, text_len
            )
        if ids.shape[1] == 0:
            raise InputError(f"prompt: expected at least one token, found none in {prompt!r:.80}")
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
        vocabulary = self._model.config.vocab_size
        if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise InputError(
                f"ids: expected one or more in 0..{vocabulary - 1}, found {ids.tolist()!r:.80}"
            )
        device = self._model.device
        output = self._model(input_ids=ids.to(device), attention_mask=mask.to(device))
        embeddings: torch.Tensor = output.last_hidden_state
        return embeddings


def clean_prompt(prompt: str) -> str:
    """A prompt as the released tokenizer cleans it: wrongly decoded text repaired, curly quotes
    straightened and full-width letters narrowed (`ftfy.fix_text`), HTML entities (also doubly
    escaped ones) resolved, runs of whitespace to one blank, ends cut."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def _load_model(
    checkpoint_dir: Path, device: torch.device | str, dtype: torch.dtype
) -> UMT5EncoderModel:
    from transformers import UMT5EncoderModel

    config = _read_config(checkpoint_dir / TEXT_CONFIG_FILE)
    tensors = load_pth(checkpoint_dir / TEXT_FILE)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    released = {name: _released_name(name) for name in shapes}
    expected = {released[name]: shape for name, shape in shapes.items()}
    check_tensors(tensors, expected, FLOATS, "text encoder", ("blocks.",))
    assign_tensors(model, {name: tensors[released[name]] for name in shapes}, device, dtype)
    return model


def _released_name(name: str) -> str:
    """The released name of a parameter of `UMT5EncoderModel`."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    layer, inner = name.removeprefix("encoder.block.").split(".", 1)
    return f"blocks.{layer}.{_LAYER_NAMES[inner]}"


def _read_config(path: Path) -> UMT5Config:
    """The sizes in `t5_config.json`, or those of UMT5-XXL where there is no such file."""
    from transformers import UMT5Config

    sizes = read_json(path) if path.exists() else _UMT5_XXL
    heads = read_size(sizes, "num_heads", path, at_most=1024)
    dim_attn = read_size(sizes, "dim_attn", path, at_most=2**16)
    if dim_attn % heads:
        raise InputError(f"{path}: expected dim_attn divisible by {heads} heads, found {dim_attn}")
    if sizes.get("shared_pos", False) is not False:
        raise InputError(f"{path}: expected shared_pos false, found {sizes['shared_pos']!r}")
    values: dict[str, Any] = {
        "vocab_size": read_size(sizes, "vocab", path, at_most=2**24),
        "d_model": read_size(sizes, "dim", path, at_most=2**16),
        "d_kv": dim_attn // heads,
        "d_ff": read_size(sizes, "dim_ffn", path, at_most=2**20),
        "num_heads": heads,
        "num_layers": read_size(sizes, "num_layers", path, at_most=256),
        "relative_attention_num_buckets": read_size(sizes, "num_buckets", path, at_most=1024),
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",  # the tanh form
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "use_cache": False,
        # The position bias is added to the logits, which the eager form does in all versions.
        "attn_implementation": "eager",
    }
    return UMT5Config(**values)


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True
        )
    # Depending on the damage this raises from OSError to exceptions of the Rust tokenizers.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{directory}: expected a tokenizer, found {text}") from error
    return tokenizer
