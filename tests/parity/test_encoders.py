"""Prompt, portrait and speech encoders against the recordings, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from liveact.checkpoint.layout import IMAGE_CONFIG_FILE, IMAGE_FILE, TEXT_CONFIG_FILE, TEXT_FILE
from liveact.checkpoint.tensors import load_pth
from liveact.encoders import speech as audio_encoder
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder, clean_prompt
from liveact.encoders.speech import AudioEncoder
from liveact.errors import InputError
from tests.support.compare import relative_error
from tests.support.paths import REPOSITORY

# fp32 results agree with the recordings to about this (golden/README.md).
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small get slower with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(load_golden) -> dict[str, torch.Tensor]:
    return load_golden("encoders/inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(load_golden) -> dict[str, torch.Tensor]:
    return load_golden("encoders/outputs.safetensors")


@pytest.fixture
def checkpoint(golden, tmp_path) -> Path:
    """A copy of the recorded checkpoint that may be changed."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in (golden / "encoders").iterdir():
        if file.is_file():
            shutil.copyfile(file, copy / file.name)
    return copy


@pytest.fixture
def wav2vec(golden, tmp_path) -> Path:
    """A copy of the recorded wav2vec2 directory that may be changed."""
    copy = tmp_path / "wav2vec"
    copy.mkdir()
    for file in (golden / "encoders" / "wav2vec").iterdir():
        shutil.copyfile(file, copy / file.name)
    return copy


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_pth(path: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes one tensor of a `.pth`."""
    state = dict(load_pth(path))
    state.pop(name, None)
    # Renamed into place: `state` is a mapping of the file.
    torch.save(state if tensor is None else {**state, name: tensor}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


@pytest.mark.slow
def test_loading_imports_no_transformers_and_says_nothing(golden):
    """Which would take longer than all the rest of a start."""
    script = f"""
import sys
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
for encoder, path in ((TextEncoder, ""), (ImageEncoder, ""), (AudioEncoder, "wav2vec")):
    encoder.load({str(golden / "encoders") + "/"!r} + path)
assert "transformers" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(REPOSITORY / "engine")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def text_model(golden) -> TextEncoder:
    return TextEncoder.load(golden / "encoders")


def save_tokenizer(directory: Path, words: int = 8) -> None:
    """A tokenizer of words w0, w1, … that ends a text with </s>, as UMT5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {f"w{i}": 3 + i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def test_text_as_recorded(text_model, inputs, outputs):
    found = text_model.encode_ids(inputs["t5.ids"], inputs["t5.mask"])
    assert relative_error(found, outputs["t5.output"]) < TOLERANCE
    assert text_model.dim == 64


def test_padding_changes_nothing(text_model, inputs, outputs):
    """What lets `encode` leave the padding out: 17 tokens alone give the recorded 17 rows."""
    n_tok = int(inputs["t5.mask"].sum())
    ids = inputs["t5.ids"][:, :n_tok]
    assert 0 < n_tok < inputs["t5.ids"].shape[1]
    found = text_model.encode_ids(ids, torch.ones_like(ids))
    assert relative_error(found, outputs["t5.output"][:, :n_tok]) < TOLERANCE


def test_prompt_is_cleaned_tokenized_and_cut(checkpoint):
    save_tokenizer(checkpoint / "google" / "umt5-xxl")
    encoder = TextEncoder.load(checkpoint)
    ids = torch.tensor([[3, 4, 5, 1]])
    expected = encoder.encode_ids(ids, torch.ones_like(ids))[0]
    assert torch.equal(encoder.encode("w0 w1 w2"), expected)
    assert torch.equal(encoder.encode(" w0\n\t w1&amp;nbsp;w2 "), expected)
    # Cut to text_len with the end token kept.
    assert encoder.encode("w0 w1 w2 w3 w4", text_len=4).shape == (4, 64)
    assert torch.equal(encoder.encode("w0 w1 w2 w3 w4", text_len=4), expected)
    assert encoder.encode("").shape == (1, 64)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a  b\n\tc ", "a b c"),
        ("a &lt;b&gt; &amp;amp; c", "a <b> & c"),
        ("a\u3000b\xa0c", "a b c"),
        # What the released tokenizer's ftfy.fix_text makes of them.
        ("“quoted” cafe\u0301", '"quoted" caf\u00e9'),
        ("ｆｕｌｌ ｗｉｄｔｈ，ﬁne", "full width,fine"),
        ("schÃ¶n", "schön"),
        ("", ""),
    ],
)
def test_prompt_cleaning(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


def test_tokenizer_problems_are_told(text_model, checkpoint):
    with pytest.raises(InputError, match=r"umt5-xxl: expected the directory of the tokenizer"):
        text_model.encode("w0")
    directory = checkpoint / "google" / "umt5-xxl"
    save_tokenizer(directory, words=300)
    with pytest.raises(InputError, match="at most the 256 tokens of the text encoder, found 303"):
        TextEncoder.load(checkpoint)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=f"^{directory}/tokenizer.json: expected JSON, found .*$"):
        TextEncoder.load(checkpoint)


@pytest.mark.parametrize("wrong", [[[256]], [[-1]], [[]], [1, 2]])
def test_wrong_ids_are_refused(text_model, wrong):
    ids = torch.tensor(wrong, dtype=torch.int64)
    with pytest.raises(InputError, match=r"^ids.*expected .*, found"):
        text_model.encode_ids(ids, torch.ones_like(ids))


def test_weights_of_the_right_dtype_stay_mapped(golden, inputs, outputs):
    """bf16 on the CPU uses the file's own pages: 11 GB of UMT5-XXL are not read into memory."""
    weights = load_pth(golden / "encoders" / TEXT_FILE)
    encoder = TextEncoder.load(golden / "encoders", dtype=torch.bfloat16)
    maps = Path("/proc/self/maps").read_text().splitlines()
    pages = [line.split()[0].split("-") for line in maps if TEXT_FILE in line]
    inside = [
        any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in pages)
        for tensor in encoder.weights.values()
    ]
    assert len(inside) == len(weights) and all(inside)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 2}, "found tensor 'blocks.2."),
        ({"num_layers": 4}, "expected tensor 'blocks.3.norm1.weight' of shape [64]"),
        ({"num_layers": 10**9}, "expected num_layers to be in 1..256, found 1000000000"),
        ({"dim_ffn": 97}, "'blocks.0.ffn.gate.0.weight': expected shape [97, 64], found [96, 64]"),
        ({"num_heads": 5}, "expected dim_attn divisible by 5 heads, found 64"),
        ({"shared_pos": True}, "expected shared_pos false, found True"),
    ],
)
def test_text_sizes_must_match(checkpoint, values, message):
    edit_json(checkpoint / TEXT_CONFIG_FILE, **values)
    with pytest.raises(InputError, match=re.escape(message)):
        TextEncoder.load(checkpoint)


def test_damaged_text_weights_are_refused(checkpoint):
    path = checkpoint / TEXT_FILE
    edit_pth(path, "blocks.1.attn.k.weight", torch.zeros(64, 64, dtype=torch.int8))
    message = f"{path}: text encoder: tensor 'blocks.1.attn.k.weight': expected dtype"
    with pytest.raises(InputError, match=re.escape(message)):
        TextEncoder.load(checkpoint)


@pytest.mark.parametrize(
    ("encoder", "config", "message"),
    [
        (
            TextEncoder,
            TEXT_CONFIG_FILE,
            "'token_embedding.weight': expected shape [256384, 4096], found [256, 64]",
        ),
        (
            ImageEncoder,
            IMAGE_CONFIG_FILE,
            "'visual.cls_embedding': expected shape [1, 1, 1280], found [1, 1, 64]",
        ),
    ],
)
def test_without_a_config_the_sizes_are_the_released_ones(checkpoint, encoder, config, message):
    """And other weights are refused before the released model is allocated (22 GB of UMT5)."""
    (checkpoint / config).unlink()
    started_s = time.monotonic()
    with pytest.raises(InputError, match=re.escape(message)):
        encoder.load(checkpoint)
    assert time.monotonic() - started_s < 20


# --------------------------------------------------------------------------------------- image


def test_image_as_recorded(golden, inputs, outputs):
    encoder = ImageEncoder.load(golden / "encoders")
    image = inputs["clip.image"]  # [1, 3, 1, 40, 56]
    found = encoder.encode(image)
    assert relative_error(found, outputs["clip.output"]) < TOLERANCE
    assert torch.equal(encoder.encode(image[:, :, 0]), found)
    assert found.shape == (1, encoder.tokens, encoder.dim) == (1, 5, 64)
    for wrong in (image[0], image[:, :2], image.expand(1, 3, 2, 40, 56), image[..., :0]):
        with pytest.raises(InputError, match=re.escape(f"found {list(wrong.shape)}")):
            encoder.encode(wrong)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 3}, "found tensor 'visual.transformer.3."),
        ({"num_layers": 5}, "expected tensor 'visual.transformer.4."),
        ({"num_layers": 1}, "2 layers or more, found"),
        ({"image_size": 30}, "image_size by patch_size"),
        ({"image_size": 42}, "'visual.pos_embedding': expected shape [1, 10, 64]"),
        ({"mlp_ratio": 2}, "'visual.transformer.0.mlp.0.weight': expected shape [128, 64]"),
        ({"activation": "quick_gelu"}, "expected activation 'gelu', found 'quick_gelu'"),
    ],
)
def test_image_sizes_must_match(checkpoint, values, message):
    edit_json(checkpoint / IMAGE_CONFIG_FILE, **values)
    with pytest.raises(InputError, match=re.escape(message)):
        ImageEncoder.load(checkpoint)


def test_only_the_vision_tower_is_needed(checkpoint):
    path = checkpoint / IMAGE_FILE
    edit_pth(path, "textual.token_embedding.weight", torch.zeros(4))
    edit_pth(path, "visual.head", None)
    ImageEncoder.load(checkpoint)
    edit_pth(path, "visual.transformer.3.mlp.2.bias", None)  # of the layer that is not run
    with pytest.raises(
        InputError, match=re.escape("'visual.transformer.3.mlp.2.bias' of shape [64]")
    ):
        ImageEncoder.load(checkpoint)


# --------------------------------------------------------------------------------------- audio


@pytest.fixture(scope="module")
def speech(inputs) -> np.ndarray:
    return inputs["wav2vec.speech"].numpy()


def test_speech_as_recorded(golden, speech, outputs):
    encoder = AudioEncoder.load(golden / "encoders" / "wav2vec")
    found = encoder.encode(speech, 50)
    assert relative_error(found, outputs["wav2vec.embedding"]) < TOLERANCE
    assert (encoder.num_layers, encoder.hidden) == (4, 48)
    assert torch.equal(encoder.encode(torch.from_numpy(speech), 50), found)


def test_speech_is_normalised_if_the_directory_says_so(wav2vec, speech, outputs):
    # Gain and offset go away but for the 1e-7 on the variance, which is 1e-7 / var of the result.
    from transformers import Wav2Vec2FeatureExtractor

    loud = 3.0 * speech + 0.5
    expected = Wav2Vec2FeatureExtractor.from_pretrained(wav2vec)(loud, sampling_rate=16_000)
    normalised = audio_encoder._zero_mean_unit_variance(torch.from_numpy(loud))
    assert relative_error(normalised, torch.tensor(expected.input_values[0])) < TOLERANCE
    encoder = AudioEncoder.load(wav2vec)
    found = encoder.encode(loud, 50)
    assert relative_error(found, outputs["wav2vec.embedding"]) < TOLERANCE
    edit_json(wav2vec / "preprocessor_config.json", do_normalize=False)
    encoder = AudioEncoder.load(wav2vec)
    # Quiet, because the first group norm takes any other gain away again.
    raw = encoder.encode(0.01 * speech, 50)
    assert relative_error(raw, outputs["wav2vec.embedding"]) > 100 * TOLERANCE
    assert relative_error(encoder.encode(normalised, 50), outputs["wav2vec.embedding"]) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
@pytest.mark.parametrize("old_spelling", [True, False])
@pytest.mark.parametrize("pickled", [True, False])
def test_speech_weights_in_every_spelling(wav2vec, speech, outputs, prefix, old_spelling, pickled):
    state = load_file(wav2vec / "model.safetensors")
    if old_spelling:
        for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
            conv = "encoder.pos_conv_embed.conv."
            state[conv + old] = state.pop(f"{conv}parametrizations.weight.{new}")
    state = {prefix + name: tensor.clone() for name, tensor in state.items()}
    state |= {"quantizer.codevectors": torch.zeros(2), "lm_head.bias": torch.zeros(2)}
    (wav2vec / "model.safetensors").unlink()
    if pickled:
        torch.save(state, wav2vec / "pytorch_model.bin")
    else:
        save_file(state, wav2vec / "model.safetensors")
    found = AudioEncoder.load(wav2vec).encode(speech, 50)
    assert relative_error(found, outputs["wav2vec.embedding"]) < TOLERANCE


def test_older_configurations_are_read(wav2vec, speech, outputs):
    """Keys that configurations of the time of chinese-wav2vec2-base have."""
    edit_json(
        wav2vec / "config.json",
        _name_or_path="somewhere",
        gradient_checkpointing=True,
        torch_dtype="float16",
        mask_time_prob=0.05,
        transformers_version="4.16.2",
    )
    found = AudioEncoder.load(wav2vec).encode(speech, 50)
    assert relative_error(found, outputs["wav2vec.embedding"]) < TOLERANCE


def test_layer_outputs_are_those_of_transformers(wav2vec, speech):
    """Against the outputs that transformers itself records, where nothing is interpolated."""
    from transformers import Wav2Vec2Model

    model = Wav2Vec2Model.from_pretrained(wav2vec).eval()
    normalised = torch.from_numpy((speech - speech.mean()) / np.sqrt(speech.var() + 1e-7))
    with torch.no_grad():
        hidden = model(normalised[None], output_hidden_states=True).hidden_states[1:]
    expected = torch.stack(hidden, dim=2)[0]  # [99, 4, 48]: as many as there are
    found = AudioEncoder.load(wav2vec).encode(speech, expected.shape[0])
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("samples", "num_features", "message"),
    [
        (np.zeros(399, np.float32), 1, "samples: expected at least 400 at 16000 Hz, found 399"),
        (np.zeros((1, 400), np.float32), 1, "samples: expected [n] float, found [1, 400]"),
        (np.zeros(400, np.int16), 1, "samples: expected [n] float, found [400] torch.int16"),
        (np.zeros(400, np.float32), 0, "num_features: expected 1 or more, found 0"),
    ],
)
def test_wrong_speech_is_refused(golden, samples, num_features, message):
    encoder = AudioEncoder.load(golden / "encoders" / "wav2vec")
    assert encoder.encode(np.zeros(400, np.float32), 3).isfinite().all()
    with pytest.raises(InputError, match=re.escape(message)):
        encoder.encode(samples, num_features)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("preprocessor_config.json", {"sampling_rate": 8000}, "expected sampling_rate 16000"),
        ("preprocessor_config.json", {"do_normalize": "no"}, "expected do_normalize true or false"),
        ("config.json", {"num_hidden_layers": 3}, "found tensor 'encoder.layers.3."),
        ("config.json", {"num_hidden_layers": 5}, "expected tensor 'encoder.layers.4."),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers to be in 1..256"),
        ("config.json", {"intermediate_size": 97}, "expected shape [97, 48], found [96, 48]"),
        ("config.json", {"do_stable_layer_norm": True}, "do_stable_layer_norm False, found True"),
        ("config.json", {"conv_dim": "x"}, "expected conv_dim to be a list of 1 to 64, found 'x'"),
        ("config.json", {"conv_dim": [32]}, "conv_stride of one length, found 1, 7 and 7"),
        ("config.json", {"conv_kernel": [0] * 7}, "expected conv_kernel to be in 1..1024, found 0"),
        ("config.json", {"hidden_act": "relu"}, "expected hidden_act 'gelu', found 'relu'"),
        ("config.json", {"num_attention_heads": 5}, "hidden_size divisible by num_attention_heads"),
        ("config.json", {"layer_norm_eps": "x"}, "layer_norm_eps to be from 0 to 1, found 'x'"),
    ],
)
def test_wrong_speech_directory_is_refused(wav2vec, file, values, message):
    edit_json(wav2vec / file, **values)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        AudioEncoder.load(wav2vec)
    assert str(wav2vec) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "missing", ["config.json", "preprocessor_config.json", "model.safetensors"]
)
def test_missing_speech_file_is_told(wav2vec, missing):
    (wav2vec / missing).unlink()
    with pytest.raises(InputError, match=f"{missing}.*found n"):
        AudioEncoder.load(wav2vec)
