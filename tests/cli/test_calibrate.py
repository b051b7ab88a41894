"""`liveact calibrate`: what it measures, and the policy that follows from it.

How much rounding costs a product is derived in tests/support/bounds.py: 0.425·2⁻⁴ = 2.7 % for each
of its two operands, 3.8 % for both. The band that is checked is 2 to 5 %.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from liveact import _core
from liveact.blocks import audio_rows
from liveact.checkpoint.layout import DIT_STEM
from liveact.commands.calibrate import Calibration, calibrate
from liveact.commands.conditioning import Conditioning, conditioning
from liveact.dit.dit import Dit
from liveact.dit.precision import PRODUCTS, PrecisionPolicy
from liveact.dit.weights import open_weights
from liveact.errors import InputError
from tests.support.bounds import BOUND, ONE_PRODUCT
from tests.support.cli import Run, refused
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import AUDIO_DIM, IMAGE_DIM, core_config, random_weights
from tests.support.demo_dit import denoise, open_stream
from tests.support.kernels.manifest import read_manifest
from tests.support.paths import PORTRAIT
from tests.support.pipeline import demo_checkpoint, speech, write_wav

GEMMS = [product for product in PRODUCTS if product != "attention"]
BLOCKS = 3
LAYERS = 2


@pytest.fixture(scope="module")
def recorded(golden: Path) -> Conditioning:
    """The inputs that the released model was recorded with, for three blocks."""
    given = {n: t.float() for n, t in load_file(golden / "dit/inputs.safetensors").items()}
    rows = [audio_rows(given["audio"], b).flatten(1) for b in range(BLOCKS)]
    return Conditioning(given["text"], given["clip"][0], given["y"][0], rows, "recorded")


@pytest.fixture(scope="module")
def calibrated(golden: Path, recorded: Conditioning) -> Calibration:
    return calibrate(golden / "dit", _core.open_cpu(), recorded)


Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def changed(golden: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """The recorded model with `change(tensors)` applied."""

    def make(change: Change) -> Path:
        directory = tmp_path / "changed"
        directory.mkdir()
        shutil.copy(golden / "dit" / "config.json", directory)
        tensors = load_file(golden / "dit" / f"{DIT_STEM}.safetensors")
        change(tensors)
        save_file(tensors, directory / f"{DIT_STEM}.safetensors")
        return directory

    return make


def wide_products(policy: PrecisionPolicy) -> set[tuple[int, str]]:
    layers = enumerate(policy.layers)
    return {(i, p) for i, layer in layers for p, c in layer.items() if c.format == "bf16"}


# ------------------------------------------------------------------------------ the measurement


def test_the_default_of_fp8_everywhere_is_what_the_recorded_model_supports(
    calibrated: Calibration,
) -> None:
    assert wide_products(calibrated.policy) == set()
    for layer in calibrated.policy.layers:
        for product in GEMMS:
            assert 0.02 < (layer[product].error or 0) < 0.05, product
        # Two products: q·kᵀ, whose error counts as much as the logits vary, and P·V.
        assert 0 < (layer["attention"].error or 0) < 2**0.5 * 0.05


def test_the_velocity_of_the_policy_is_compared_with_wider_ones(calibrated: Calibration) -> None:
    assert len(calibrated.velocity) == BLOCKS
    for found in calibrated.velocity:
        assert ONE_PRODUCT["bf16"] / 2 < found["bf16 - fp32"] < BOUND["bf16"]
        assert ONE_PRODUCT["fp8"] / 2 < found["policy - fp32"] < BOUND["fp8"]
        assert abs(found["policy - fp32"] - found["policy - bf16"]) <= found["bf16 - fp32"]


def test_measuring_changes_nothing() -> None:
    plain, measuring = _core.open_cpu(), _core.CalibrationDevice(_core.open_cpu())
    results = []
    for device in (plain, measuring):
        dit = Dit.load(demo_checkpoint(), device, "bf16")
        if device is measuring:
            measuring.watch(dit.model)
        stream = open_stream(dit, guidance=1.7)
        results.append(torch.cat([denoise(stream, block) for block in range(4)], dim=1))
    assert torch.equal(*results)
    measured = measuring.errors()
    assert [set(layer) for layer in measured] == [set(PRODUCTS)] * LAYERS
    for layer in measured:
        for product, linears in layer.items():
            assert linears, product
            assert all(difference > 0 and reference > 0 for difference, reference in linears)


def test_an_error_is_what_torch_says(
    changed: Callable[[Change], Path], recorded: Conditioning
) -> None:
    """A norm without gain makes x its bias, here one 1 among zeros: the product is one column."""
    column = 17
    name = "blocks.1.cross_attn.q.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.1.norm3.weight"].zero_()
        tensors["blocks.1.norm3.bias"].zero_()[column] = 1.0

    directory = changed(change)
    found = calibrate(directory, _core.open_cpu(), recorded).policy.layers[1]["cross_q"].error
    weight = load_file(directory / f"{DIT_STEM}.safetensors")[name].float()
    scale = weight.abs().amax(1, keepdim=True) / 448
    rounded = ((weight / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16().float()
    expected = (rounded - weight)[:, column].norm() / weight[:, column].norm()
    # A quotient that is rounded once more may flip a code: 1 of 256 rows, by 6 % of its value.
    assert found == pytest.approx(expected.item(), rel=0.02)


HUGE = 2.0**20  # fp8 has 2^15 between its largest and its smallest normal value


def outlier_of_an_activation(tensors: dict[str, Tensor]) -> None:
    """A channel of x that is a million times the others, and that no weight looks at."""
    tensors["blocks.1.norm3.weight"][5] = HUGE
    tensors["blocks.1.cross_attn.q.weight"][:, 5] = 0


def outlier_of_a_weight(tensors: dict[str, Tensor]) -> None:
    """Weights a million times the others, for a channel of x that is zero."""
    tensors["blocks.0.norm_x.weight"][9] = tensors["blocks.0.norm_x.bias"][9] = 0
    tensors["blocks.0.audio_cross_attn.q_linear.weight"][:, 9] = HUGE


def outlier_of_a_text_key(tensors: dict[str, Tensor]) -> None:
    """As of a weight, in one of the four linears of cross_kv."""
    for end in ("weight", "bias"):
        tensors[f"text_embedding.2.{end}"][3] = 0
    tensors["blocks.1.cross_attn.k.weight"][:, 3] = HUGE


def outlier_of_a_key(tensors: dict[str, Tensor]) -> None:
    """A rotated pair of channels of k, a million times the others, where q is zero."""
    tensors["blocks.1.self_attn.norm_k.weight"][[64, 65]] = HUGE
    tensors["blocks.1.self_attn.norm_q.weight"][[64, 65]] = 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (outlier_of_an_activation, (1, "cross_q")),
        (outlier_of_a_weight, (0, "audio_q")),
        (outlier_of_a_text_key, (1, "cross_kv")),
        (outlier_of_a_key, (1, "attention")),
    ],
)
def test_an_outlier_makes_exactly_its_product_bf16(
    changed: Callable[[Change], Path],
    recorded: Conditioning,
    calibrated: Calibration,
    change: Change,
    expected: tuple[int, str],
) -> None:
    result = calibrate(changed(change), _core.open_cpu(), recorded)
    assert wide_products(result.policy) == {expected}
    layer, product = expected
    assert (result.policy.layers[layer][product].error or 0) > 0.2
    # With that product in bf16 the whole is as good as without the outlier.
    worst = max(found["policy - fp32"] for found in result.velocity)
    assert worst < 1.5 * max(found["policy - fp32"] for found in calibrated.velocity)


def test_the_threshold_decides(golden: Path, recorded: Conditioning) -> None:
    found = calibrate(golden / "dit", _core.open_cpu(), recorded, threshold=0.036)
    for layer in found.policy.layers:
        for product, choice in layer.items():
            assert choice.error is not None
            limit = 0.036 * (2**0.5 if product == "attention" else 1)
            assert (choice.format == "fp8") == (choice.error <= limit), product
    assert 0 < len(wide_products(found.policy)) < 2 * len(PRODUCTS)


def test_a_model_in_fp8_cannot_be_measured() -> None:
    measuring = _core.CalibrationDevice(_core.open_cpu())
    dit = Dit.load(demo_checkpoint(), measuring, "fp8")
    with pytest.raises(InputError, match="expected a model in bf16 or fp32, found self_qkv of"):
        measuring.watch(dit.model)


@pytest.mark.slow
def test_on_cuda_it_is_launches_that_exist(tmp_path: Path, compiled_kernels: Path) -> None:
    """The launcher checks each against the manifest; the driver is a fake that runs nothing."""
    fake = FakeCuda.copy_into(tmp_path)
    images = fake.images(read_manifest("sm_90a", compiled_kernels))
    measuring = _core.CalibrationDevice(_core.open_cuda(0, images, fake.path, fake.path))
    dit = Dit(measuring, core_config(1), random_weights(1), "bf16")
    measuring.watch(dit.model)
    stream = dit.open_stream((6, 8), image_tokens=4)
    stream.set_image(torch.randn(4, IMAGE_DIM), torch.randn(20, 14, 6, 8))
    stream.set_prompt(torch.randn(5, 64))
    for _ in range(3):
        fake.clear()
        n, rows = stream.frames_of_next_block, stream.audio_rows_of_next_block
        stream.denoise(
            torch.randn(16, n, 6, 8), torch.randn(2, 16, n, 6, 8), torch.zeros(rows, AUDIO_DIM)
        )
    launched = Counter(x.split()[1] for x in fake.log() if x.startswith("cuLaunchKernel "))
    # Of 8 products (the two of audio at two steps): x and the weight of each, from 256 or 512.
    assert launched["quantize.256.bf16.f8"] == 2 * (3 * 5 + 2 * 2)
    assert launched["quantize.512.bf16.f8"] == 2 * 3
    assert launched["self_attention.f8"] == launched["self_attention.bf16"] == 3
    assert launched["update_memory.key.compress.f8"] == launched["update_memory.key.compress.bf16"]
    assert not any(line.startswith("cuGraphLaunch") for line in fake.log())


# ------------------------------------------------------------------------------ conditioning


def test_random_conditioning_looks_like_what_encoders_give() -> None:
    config, _ = open_weights(demo_checkpoint())
    given = conditioning(demo_checkpoint(), config, (64, 32), 4, seed=1)
    assert given.origin == "prompt, image, audio: random"
    assert given.text.shape[1] == 64 and given.image.shape == (257, 64)
    assert given.y.shape == (20, 14, 4, 8)
    assert torch.equal(given.y[:4, 0], torch.ones(4, 4, 8)) and not given.y[:4, 1:].any()
    assert torch.equal(given.y[4:, 1], given.y[4:, 13])
    assert [len(rows) for rows in given.audio] == [25, 36, 36, 36]
    # Blocks share the features at their seams, and neighbours are alike.
    assert torch.equal(given.audio[1][-4:], given.audio[2][:4])
    rows = given.audio[2]
    assert 0.8 < rows.std() < 1.2
    assert (rows[1:] - rows[:-1]).std() < 0.5 * rows.std()
    again = conditioning(demo_checkpoint(), config, (64, 32), 4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(given.audio, again.audio, strict=True))


def test_what_is_given_goes_through_the_encoders(tmp_path: Path) -> None:
    config, _ = open_weights(demo_checkpoint())
    audio = write_wav(tmp_path / "speech.wav", speech(4.0))
    given = conditioning(
        demo_checkpoint(), config, (32, 32), 2, 0, prompt="hi", image=PORTRAIT, audio=audio
    )
    assert given.origin == "prompt, image, audio: encoded"
    assert given.image.shape == (257, 64) and given.y.shape == (20, 14, 4, 4)
    assert [tuple(rows.shape) for rows in given.audio] == [(25, 192), (36, 192)]
    found = calibrate(demo_checkpoint(), _core.open_cpu(), given)
    assert all(
        choice.error is not None for layer in found.policy.layers for choice in layer.values()
    )
    with pytest.raises(InputError, match="expected audio for 4 blocks, found 3"):
        conditioning(demo_checkpoint(), config, (32, 32), 4, 0, audio=audio)


# ------------------------------------------------------------------------------ command line


def test_the_command_line(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "policy.json"
    common = ["--out", out, "--size=32x32", "--device=cpu", "--blocks=2"]
    code, output, errors = run("calibrate", demo_checkpoint(), *common, "--seed", 3)
    assert (code, errors) == (0, "")
    for expected in (*PRODUCTS, "median", "in layer", "policy - bf16", "bf16 - fp32", "of 2"):
        assert expected in output
    policy = PrecisionPolicy.read(out)
    raw = json.loads(out.read_text())["measured"]
    assert raw["conditioning"] == "prompt, image, audio: random"
    assert (raw["blocks"], raw["seed"], raw["threshold"]) == (2, 3, 0.05)
    assert (raw["device"], raw["latent_size"]) == ("cpu", [4, 4])
    assert len(raw["velocity"]) == 2
    count = 2 * len(PRODUCTS)
    assert f"{out}: calibrated ({count - len(wide_products(policy))} of {count} in fp8)" in output
    # It is a policy: the engine takes it, and a checkpoint can be converted with it.
    assert run("convert", demo_checkpoint(), "--out", tmp_path / "c", "--precision", out)[0] == 0
    refused(run("calibrate", tmp_path / "c", *common), "expected a precision with fp8", "original")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--size=33x32"], "16"),
        (["--blocks=0"], "blocks: expected 1 to 1000, found 0"),
        (["--threshold=0"], "threshold: expected more than 0"),
        (["--threshold=nan"], "threshold: expected more than 0"),
        (["--audio=no.wav"], "no.wav: expected"),
        (["--image=no.png"], "no.png: expected"),
        (["--device=gpu"], "device: expected cpu or cuda:N"),
        (["--out=no/such/policy.json"], "expected the directory no/such to exist"),
    ],
)
def test_bad_arguments(run: Run, tmp_path: Path, options: list[str], expected: str) -> None:
    out = [] if options[0].startswith("--out") else [f"--out={tmp_path / 'policy.json'}"]
    refused(run("calibrate", demo_checkpoint(), *out, "--size=32x32", *options), expected)
    assert not any(tmp_path.iterdir())


def test_a_policy_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    out = tmp_path / ("x" * 251 + ".json")  # a character too long
    refused(
        run("calibrate", demo_checkpoint(), f"--out={out}", "--size=32x32", "--blocks=1"),
        "cannot be written",
    )
