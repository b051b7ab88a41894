"""The encoders and the tokenizer beside those of `transformers`: shapes, results, ids."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liveact.checkpoint import demo
from liveact.checkpoint.layout import TOKENIZER_DIRECTORY
from liveact.encoders import portrait, prompt
from liveact.encoders import speech as audio
from liveact.encoders.tokens import PromptTokenizer
from tests.support.pipeline import demo_checkpoint

TOKENIZER = f"{TOKENIZER_DIRECTORY}/tokenizer.json"


def meta(build: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


TEXT_NAMES = {  # of a layer: transformers → released
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "encoder.final_layer_norm": "norm",
    "encoder.embed_tokens": "token_embedding",
    "shared": "token_embedding",
    "encoder.block": "blocks",
}


@pytest.mark.slow
def test_shapes_of_the_text_encoder_are_those_of_transformers() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = prompt._read_sizes(Path("none"))._replace(num_layers=3)
    config = UMT5Config(
        vocab_size=sizes.vocabulary, d_model=sizes.dim, d_ff=sizes.dim_ffn, num_layers=3,
        d_kv=sizes.dim_attn // sizes.num_heads, num_heads=sizes.num_heads,
        relative_attention_num_buckets=sizes.num_buckets, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    found = {}
    for name, shape in meta(lambda: UMT5EncoderModel(config)).items():
        for theirs, released_name in TEXT_NAMES.items():
            name = name.replace(theirs, released_name)
        found[name] = shape
    assert found == prompt.shapes(sizes)


def test_shapes_of_the_image_encoder_are_those_of_transformers() -> None:
    """By number: names differ, and q, k and v are one there."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = portrait._read_sizes(Path("none"))
    config = CLIPVisionConfig(
        hidden_size=sizes.dim, intermediate_size=sizes.dim_ffn, num_attention_heads=16,
        num_hidden_layers=sizes.num_layers, image_size=224, patch_size=14,
    )  # fmt: skip
    theirs = meta(lambda: CLIPVisionModel(config)).values()
    ours = portrait.shapes(sizes).values()
    assert sum(map(math.prod, theirs)) == sum(map(math.prod, ours))


def test_shapes_of_the_audio_encoder_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    path = tmp_path / "config.json"
    for config in ({}, demo.AUDIO_CONFIG):
        path.write_text(json.dumps(config))
        unmasked = config | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
        theirs = meta(lambda unmasked=unmasked: Wav2Vec2Model(Wav2Vec2Config(**unmasked)))
        assert theirs == audio.shapes(audio._read_sizes(path))


@pytest.mark.parametrize("count", [1, 7, 200])
def test_text_is_encoded_as_by_transformers(count: int) -> None:
    """Also where distances go beyond the last bucket."""
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = prompt.TextEncoder.load(demo_checkpoint())
    sizes = encoder.sizes
    config = UMT5Config(
        vocab_size=sizes.vocabulary, d_model=sizes.dim, d_ff=sizes.dim_ffn, num_heads=4,
        num_layers=sizes.num_layers, d_kv=sizes.dim_attn // 4, feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )  # fmt: skip
    model = UMT5EncoderModel(config).eval()
    state = {}
    for name in model.state_dict():
        ours = name
        for theirs, released_name in TEXT_NAMES.items():
            ours = ours.replace(theirs, released_name)
        state[name] = encoder.weights[ours]
    model.load_state_dict(state)
    ids = torch.randint(0, sizes.vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    found = encoder.encode_ids(ids, torch.ones_like(ids))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


# -------------------------------------------------------------------------------- the tokenizer


TEXTS = [
    "", " ", "A person is speaking.", "naïve café, 你好 🙂", "a</s>b <pad> <unk>", "</s>",
    "x" * 999, "tab\tnew\nline", "\u200b", "0" * 7,
]  # fmt: skip


@pytest.mark.parametrize("at_most", [1, 2, 8, 512])
def test_ids_are_those_of_transformers(at_most: int) -> None:
    from transformers import AutoTokenizer

    folder = demo_checkpoint() / TOKENIZER_DIRECTORY
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = PromptTokenizer(folder / "tokenizer.json", 320)
    for text in TEXTS:
        expected = theirs(text, truncation=True, max_length=at_most)["input_ids"]
        ids, found = ours.encode(text, at_most)
        assert ids == expected, text
        assert found == len(theirs(text)["input_ids"])


def test_padding_and_truncation_that_a_file_asks_for_do_not_count(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    original = demo_checkpoint() / TOKENIZER
    tokenizer = Tokenizer.from_file(str(original))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = PromptTokenizer(tmp_path / "tokenizer.json", 320).encode("A person.", 512)
    assert found == PromptTokenizer(original, 320).encode("A person.", 512) and found[1] == 10
