"""The reference DiT: against the recordings of the released model, in batches, differentiated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import (
    TIMESTEPS,
    DiT,
    DiTStream,
    Layout,
    audio_rows,
    audio_windows,
    plan_block,
    stack_texts,
)
from tests.support.compare import relative_error
from tests.support.gradients import slopes

pytestmark = pytest.mark.usefixtures("one_thread")

Load = Callable[[str], dict[str, Tensor]]
BLOCKS = 5
# float32 has 2^-24 = 6e-8 relative rounding per operation; the longest chain here (5 blocks that
# read each other's caches, 3 steps, 2 layers of about 10 sums of up to 512 terms) multiplies that
# by less than 150. The recordings' own README names the same bound.
FLOAT32_CHAIN = 1e-5


# ------------------------------------------------------------------------------ recordings


@pytest.fixture(scope="module")
def model(golden: Path, load_golden: Load) -> DiT:
    config = json.loads((golden / "dit/config.json").read_text())
    return DiT.from_tensors(config, load_golden("dit/diffusion_pytorch_model.safetensors"))


@pytest.fixture(scope="module")
def inputs(load_golden: Load) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_golden("dit/inputs.safetensors").items()}


def open_stream(model: DiT, inputs: dict[str, Tensor], **settings: Any) -> DiTStream:
    conditioning = {name: inputs[name] for name in ("text", "clip", "y", "audio")}
    return DiTStream(model, **conditioning, **settings)


def renoise(inputs: dict[str, Tensor], block: int) -> list[Tensor]:
    return [inputs[f"renoise.{block}.{step}"] for step in range(3)]


@torch.no_grad()
def run_recorded(stream: DiTStream, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The five recorded blocks; block 3 has the edited prompt. Named as the recordings are."""
    found = {}
    for block in range(BLOCKS):
        stream.set_prompt(inputs["text_edit" if block == 3 else "text"])
        found[f"latent.{block}"] = stream.denoise(inputs[f"noise.{block}"], renoise(inputs, block))
        for step, velocity in enumerate(stream.velocities):
            found[f"velocity.{block}.{step}"] = velocity
    return found


@pytest.mark.parametrize(
    ("recording", "settings", "tensors"),
    [
        ("single", {"memory": "sequential"}, 28),
        ("sp2", {"memory": "sharded"}, 20),
        ("mean", {"memory": "mean"}, 28),
        ("audio_cfg", {"memory": "sequential", "audio_guidance": 1.7}, 28),
    ],
)
def test_agrees_with_the_recordings(
    recording: str,
    settings: dict[str, Any],
    tensors: int,
    model: DiT,
    inputs: dict[str, Tensor],
    load_golden: Load,
) -> None:
    expected = load_golden(f"dit/outputs_{recording}.safetensors")
    stream = open_stream(model, inputs, **settings)
    found = run_recorded(stream, inputs)
    for name in expected:
        if name[0] in "kv" and not name.startswith("velocity"):
            step, layer = map(int, name.split(".")[1:])
            found[name] = stream.cache(step, layer)[name[0] == "v"][0]
    errors = {name: relative_error(found[name], tensor) for name, tensor in expected.items()}
    assert len(errors) == tensors, f"tensors recorded: {sorted(errors)}"
    worst = max(errors, key=lambda name: errors[name])
    print(f"{recording}: {len(errors)} tensors, worst {worst} {errors[worst]:.2e}")
    assert errors[worst] <= FLOAT32_CHAIN, f"{worst}: relative error {errors[worst]:.2e}"


def test_a_trained_model_is_saved_in_the_released_layout(model: DiT, load_golden: Load) -> None:
    released = load_golden("dit/diffusion_pytorch_model.safetensors")
    fresh = DiT(model.config, clip_dim=1280, audio_dim=12 * 768)
    for state in (model.state_dict(), fresh.state_dict()):
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in released.items()}
    assert all(torch.equal(model.state_dict()[n], t.float()) for n, t in released.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------ a tiny model

CONFIG = {
    "model_type": "i2v", "in_dim": 36, "out_dim": 16, "text_dim": 6, "text_len": 9, "freq_dim": 8,
    "dim": 24, "num_heads": 2, "num_layers": 2, "ffn_dim": 20, "intermediate_dim": 10,
    "output_dim": 7, "context_tokens": 3, "patch_size": [1, 2, 2], "eps": 1e-6, "qk_norm": True,
    "cross_attn_norm": True, "audio_window": 5, "vae_scale": 4,
}  # fmt: skip
AUDIO_LAYERS, AUDIO_CHANNELS, CLIP_DIM, CLIP_TOKENS = 2, 3, 5, 4
HEIGHT, WIDTH = 4, 6  # F = 6, not a multiple of five
LAYOUT = Layout()


@pytest.fixture
def tiny() -> Iterator[DiT]:
    """In float64; random weights that make every part of it count."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(CONFIG, clip_dim=CLIP_DIM, audio_dim=AUDIO_LAYERS * AUDIO_CHANNELS)
        yield model.double()


class Given:
    """Random inputs of a batch, block after block, in float64; prompts of different lengths."""

    def __init__(self, batch: int) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self.texts = [self._randn(2 + 3 * i, CONFIG["text_dim"]) for i in range(batch)]
        self.clip = self._randn(batch, CLIP_TOKENS, CLIP_DIM)
        self.y = self._randn(batch, 20, LAYOUT.slots, HEIGHT, WIDTH)
        self.audio = self._randn(batch, 90, AUDIO_LAYERS, AUDIO_CHANNELS)
        frames = [LAYOUT.block_frames(block) for block in range(3)]
        self.noise = [self._randn(batch, 16, n, HEIGHT, WIDTH) for n in frames]
        self.renoise = [[self._randn(batch, 16, n, HEIGHT, WIDTH)] * 3 for n in frames]

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)


def unroll(
    model: DiT,
    given: Given,
    timestep: Tensor,
    rows: slice = slice(None),
    noise: Sequence[Tensor] | None = None,
    **settings: Any,
) -> list[Tensor]:
    """The velocities of three blocks at one step; block 2 is the first that compresses."""
    texts = given.texts[rows]
    text = texts[0].unsqueeze(0) if len(texts) == 1 else stack_texts(texts, CONFIG["text_len"])
    caches = model.empty_caches(len(text), (HEIGHT, WIDTH))
    found = []
    for block, z in enumerate(given.noise if noise is None else noise):
        plan = plan_block(block, **settings)
        velocity, caches = model(
            z[rows],
            given.y[rows, :, plan.first_slot : plan.end_slot],
            timestep,
            text,
            given.clip[rows],
            audio_windows(given.audio[rows], block),
            caches,
            plan,
            skip_audio=False,
        )
        found.append(velocity)
    return found


# ------------------------------------------------------------------------------ batches

# A batch sums in another order where the matrix products are cut otherwise: a rounding of 2^-53 per
# operation, times at most a few thousand (see FLOAT32_CHAIN, where it is 150 for 5 blocks).
FLOAT64_CHAIN = 1e-12


# In float32 16 roundings of 2^-24: nothing but the cuts of a few small products differs (found: 5).
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, FLOAT64_CHAIN), (torch.float32, 1e-6)]
)
def test_a_batch_is_its_members_one_by_one(tiny: DiT, dtype: torch.dtype, bound: float) -> None:
    """With prompts of different lengths, and each at a noise level of its own."""
    given = Given(3)
    levels = torch.tensor(TIMESTEPS[:3], dtype=torch.float64)
    model = tiny.to(dtype)
    given.clip, given.y, given.audio = (t.to(dtype) for t in (given.clip, given.y, given.audio))
    given.texts = [text.to(dtype) for text in given.texts]
    with torch.no_grad():
        batched = unroll(model, given, levels)
        for i in range(3):
            alone = unroll(model, given, levels[i], slice(i, i + 1))
            for block, expected in enumerate(alone):
                error = relative_error(batched[block][i : i + 1], expected)
                assert error <= bound, f"member {i}, block {block}: {error:.1e}"


def test_a_batch_of_sessions_is_its_sessions(tiny: DiT) -> None:
    """Through the sampler, with guidance; and an unbatched session is a batch of one."""
    given = Given(2)
    text = stack_texts(given.texts, CONFIG["text_len"])
    conditioning = {"text": text, "clip": given.clip, "y": given.y, "audio": given.audio}
    whole = DiTStream(tiny, **conditioning, audio_guidance=1.7)
    parts = [
        DiTStream(
            tiny, **{name: tensor[i] for name, tensor in conditioning.items()}, audio_guidance=1.7
        )
        for i in range(2)
    ]
    with torch.no_grad():
        for noise, epsilons in zip(given.noise, given.renoise, strict=True):
            latent = whole.denoise(noise, epsilons)
            for i, part in enumerate(parts):
                expected = part.denoise(noise[i], [epsilon[i] for epsilon in epsilons])
                assert expected.shape == noise.shape[1:]
                assert relative_error(latent[i], expected) <= FLOAT64_CHAIN


@pytest.mark.parametrize("memory", ["sequential", "sharded", "mean"])
def test_caches_written_in_place_are_the_same(tiny: DiT, memory: str) -> None:
    """What the baseline does and what training does: the same operations, so the same bits."""
    given, level = Given(1), torch.tensor(TIMESTEPS[1])
    with torch.no_grad():
        written = unroll(tiny, given, level, memory=memory, in_place=True)
        made = unroll(tiny, given, level, memory=memory)
    assert all(torch.equal(a, b) for a, b in zip(written, made, strict=True))


def test_the_caches_given_are_left_alone(tiny: DiT) -> None:
    given, level = Given(1), torch.tensor(TIMESTEPS[1])
    caches = tiny.empty_caches(1, (HEIGHT, WIDTH))
    for in_place in (False, True):
        plan = plan_block(0, in_place=in_place)
        with torch.no_grad():
            _, after = tiny(
                given.noise[0],
                given.y[:, :, :6],
                level,
                given.texts[0].unsqueeze(0),
                given.clip,
                audio_windows(given.audio, 0),
                caches,
                plan,
                skip_audio=True,
            )
        assert bool(caches[0].k.any()) is in_place
        assert (after[0].k.data_ptr() == caches[0].k.data_ptr()) is in_place
        assert after[1].v[:, :6].any() and not after[1].v[:, 6:].any()


# ------------------------------------------------------------------------------ gradients


def loss_of_block_2(velocities: list[Tensor]) -> Tensor:
    """A fixed random projection of the velocity of the third block, and of it alone."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(velocities[2].shape, generator=generator, dtype=torch.float64)
    return (velocities[2] * weights).sum()


# Central differences with h = 1e-5 are off by h^2 = 1e-10 times the third derivative over the
# first, and by 2^-53 / h = 1e-11 times the size of the loss over its slope: with a factor of a
# thousand for either, 1e-6. A gradient that lacks a path is wrong by percents.
STEP, DIFFERENCE = 1e-5, 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory": "sharded"},
        {"memory": "mean"},
        {"compress_axis": "frame"},
        {"value_filter": "own"},
    ],
    ids=["released", "sharded", "mean", "frame", "own"],
)
def test_gradients_reach_block_0_and_the_taps(tiny: DiT, settings: dict[str, Any]) -> None:
    """Of block 2's loss, through cached keys and values, compression and RoPE reset."""
    given, level = Given(1), torch.tensor(TIMESTEPS[1], dtype=torch.float64)
    noise = [z.clone().requires_grad_() for z in given.noise]

    def run() -> Tensor:
        return loss_of_block_2(unroll(tiny, given, level, noise=noise, **settings))

    run().backward()
    attention = [tiny.get_submodule(f"blocks.{layer}.self_attn") for layer in range(2)]
    probed = {"noise of block 0": noise[0], "noise of block 1": noise[1]}
    for layer, module in enumerate(attention):
        probed[f"memory_proj_k of layer {layer}"] = module.get_parameter("memory_proj_k.weight")
        probed[f"memory_proj_v of layer {layer}"] = module.get_parameter("memory_proj_v.weight")
        probed[f"k of layer {layer}"] = module.get_parameter("k.weight")
    unused = {"memory_proj_v"} if settings.get("value_filter") != "own" else set()
    unused |= {"memory_proj_k", "memory_proj_v"} if settings.get("memory") == "mean" else set()
    for name, tensor in probed.items():
        if name.split()[0] in unused:
            assert tensor.grad is None, name
            continue
        slope, measured = slopes(run, tensor, STEP)
        print(f"{name}: {slope:.6g}, by differences off by {abs(measured / slope - 1):.1e}")
        assert measured == pytest.approx(slope, rel=DIFFERENCE), name


def test_a_session_has_gradients_through_its_sampler(tiny: DiT) -> None:
    """The loss of the third block's latent, three steps of three blocks deep, with guidance."""
    given = Given(1)
    noise = [z.clone().requires_grad_() for z in given.noise]

    def run() -> Tensor:
        conditioning = {"text": given.texts[0], "clip": given.clip, "y": given.y}
        stream = DiTStream(tiny, **conditioning, audio=given.audio, audio_guidance=1.7)
        for z, epsilons in zip(noise, given.renoise, strict=True):
            latent = stream.denoise(z, epsilons)
        return latent.square().sum()

    run().backward()
    for block, z in enumerate(noise):
        slope, measured = slopes(run, z, STEP)
        assert measured == pytest.approx(slope, rel=DIFFERENCE), f"noise of block {block}"


def test_an_optimiser_trains_every_parameter_but_two(tiny: DiT) -> None:
    """`memory_proj_v` is not read with the released filter; `proj1` makes the audio tokens of slot
    0 alone, and the audio of slot 0 counts for nothing: neither can be trained, in any version."""
    given, level = Given(2), torch.tensor(TIMESTEPS[1])
    assert all(parameter.requires_grad for parameter in tiny.parameters())
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    optimiser = torch.optim.AdamW(tiny.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = torch.stack([v.square().mean() for v in unroll(tiny, given, level)]).sum()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    still = {
        name for name, tensor in tiny.state_dict().items() if torch.equal(tensor, before[name])
    }
    never = {f"blocks.{layer}.self_attn.memory_proj_v.weight" for layer in range(2)}
    assert still == never | {"audio_proj.proj1.weight", "audio_proj.proj1.bias"}


# ------------------------------------------------------------------------------ boundaries


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": "all"}, "memory: expected one of sequential, sharded, mean, found 'all'"),
        ({"compress_axis": "x"}, "compress_axis: expected one of token, frame, found 'x'"),
        ({"sampler": "x"}, "sampler: expected one of renoise, euler, found 'x'"),
        ({"value_filter": "x"}, "value_filter: expected one of key, own, found 'x'"),
        ({"y": torch.zeros(20, 13, 4, 6)}, r"y: expected \[B, 20, >= 14, h, w\], found"),
        ({"clip": torch.zeros(2, 4, 5)}, "clip: expected 2 dimensions, or 3 of which the first"),
        ({"text": torch.zeros(6)}, r"text: expected 2 dimensions, .* is 1, found \[6\]"),
    ],
)
def test_a_session_that_cannot_be(tiny: DiT, change: dict[str, Any], message: str) -> None:
    given = Given(1)
    right = {"text": given.texts[0], "clip": given.clip, "y": given.y, "audio": given.audio}
    DiTStream(tiny, **right)
    with pytest.raises(ValueError, match=message):
        DiTStream(tiny, **(right | change))


def test_noise_of_another_shape_is_refused(tiny: DiT) -> None:
    given = Given(1)
    stream = DiTStream(tiny, text=given.texts[0], clip=given.clip, y=given.y, audio=given.audio)
    for noise, count in ((given.noise[1], 3), (given.noise[0], 2), (given.noise[0][0, 0], 3)):
        with pytest.raises(ValueError, match=r"of block 0: expected \(1, 16, 6, 4, 6\) or \(16,"):
            stream.denoise(noise, [noise] * count)


def test_prompts_are_padded_at_their_end() -> None:
    stacked = stack_texts([torch.ones(1, 6), torch.ones(3, 6)], 9)
    assert stacked.shape == (2, 9, 6)
    assert stacked.sum(2).tolist() == [[6.0] + 8 * [0.0], 3 * [6.0] + 6 * [0.0]]


def test_a_prompt_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="text: expected at most 9 rows, found 10"):
        stack_texts([torch.zeros(1, 6), torch.zeros(10, 6)], 9)


def test_audio_of_a_batch_is_cut_as_of_one() -> None:
    audio = torch.arange(2 * 70 * 6.0).view(2, 70, 2, 3)
    for block in range(4):
        for cut in (audio_rows, audio_windows):
            assert torch.equal(cut(audio, block)[1], cut(audio[1], block))
    windows = audio_windows(audio, 1)
    assert windows.shape == (2, 53, 5, 2, 3)
    assert torch.equal(windows[:, 52, 2], audio[:, 52])
    assert torch.equal(windows[:, 0, 0], audio[:, 0])


def test_moving_a_model_moves_its_rotation(tiny: DiT) -> None:
    """The tables are complex; `to(dtype)` must not make real numbers of them."""
    given, level = Given(1), torch.tensor(TIMESTEPS[1])
    with torch.no_grad():
        unroll(tiny, given, level)
    assert tiny.float().rotation()[0].dtype == torch.complex128
    fresh = nn.ModuleList([tiny]).half()[0]
    assert isinstance(fresh, DiT) and math.isclose(fresh.rotation()[1][1, 0].imag, math.sin(1))
