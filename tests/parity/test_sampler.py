"""The two samplers: that of the released generator, and the Euler step of the released demo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from liveact import _core
from liveact.commands import cli
from liveact.dit.dit import STEPS, Dit, DitStream, MemoryPolicy
from liveact.errors import InputError
from reference import DiT, DiTStream
from tests.support.compare import relative_error
from tests.support.demo_dit import AUDIO_DIM
from tests.support.pipeline import demo_checkpoint

SIGMAS = (1.0, 0.9375, 0.83333333, 0.0)
FLOAT32_CHAIN = 1e-5  # see tests/parity/test_replay.py


def open_stream(sampler: str) -> DitStream:
    dit = Dit.load(demo_checkpoint(), _core.open_cpu())
    stream = dit.open_stream((4, 4), MemoryPolicy(), sampler=sampler)
    generator = torch.Generator().manual_seed(0)
    stream.set_image(
        torch.randn(257, 64, generator=generator), torch.randn(20, 14, 4, 4, generator=generator)
    )
    stream.set_prompt(torch.randn(7, 64, generator=generator))
    return stream


def test_an_euler_step_follows_the_velocity() -> None:
    """z goes from σ to σ' by (σ' − σ)·v, so a block ends at its noise and all of its steps."""
    stream = open_stream("euler")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        noise, fresh = stream.draw_noise(generator)
        assert fresh is None
        velocities = np.zeros((STEPS, *stream.latent_shape), np.float32)
        rows = torch.randn(stream.audio_rows_of_next_block, AUDIO_DIM, generator=generator)
        latent = stream.denoise(noise, None, rows, velocities=velocities)
        expected = noise.double()
        for step in range(STEPS):
            move = SIGMAS[step + 1] - SIGMAS[step]
            expected += move * torch.from_numpy(velocities[step]).double()
        # Three sums of float32: half an ulp of the largest term each.
        assert (latent - expected).abs().max() <= 3 * 2.0**-24 * expected.abs().max() * 2


def test_fresh_noise_goes_with_one_of_them() -> None:
    for sampler, given, found in (("euler", True, "some"), ("renoise", False, "none")):
        stream = open_stream(sampler)
        shape = stream.latent_shape
        rows = torch.zeros(stream.audio_rows_of_next_block, AUDIO_DIM)
        fresh = torch.zeros(2, *shape) if given else None
        with pytest.raises(InputError, match=f"fresh noise with the sampler renoise.*{found}"):
            stream.denoise(torch.zeros(shape), fresh, rows)


@torch.no_grad()
def test_the_recorded_inputs_as_the_reference_samples_them(
    golden: Path, load_golden: Callable[[str], dict[str, Tensor]], tmp_path: Path
) -> None:
    inputs = {
        name: tensor.float() for name, tensor in load_golden("dit/inputs.safetensors").items()
    }
    config = json.loads((golden / "dit/config.json").read_text())
    out = tmp_path / "out.safetensors"
    replay = ["replay", "--part", "dit", "--checkpoint", str(golden / "dit"), "--out", str(out)]
    recorded = str(golden / "dit/inputs.safetensors")
    assert cli.main([*replay, "--inputs", recorded, "--sampler", "euler"]) == 0
    found = load_file(out)
    stream = DiTStream(
        DiT.from_tensors(config, load_golden("dit/diffusion_pytorch_model.safetensors")),
        **{name: inputs[name] for name in ("text", "clip", "y", "audio")},
        sampler="euler",
    )
    released = load_golden("dit/outputs_single.safetensors")
    for block in range(5):
        stream.set_prompt(inputs["text_edit" if block == 3 else "text"])
        noise = inputs[f"noise.{block}"]
        expected = stream.denoise(noise, [noise] * STEPS)  # not read
        assert relative_error(found[f"latent.{block}"], expected) <= FLOAT32_CHAIN
        assert relative_error(expected, released[f"latent.{block}"]) > 0.01, "another sampler"
