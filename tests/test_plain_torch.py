"""The plain PyTorch DiT against the recordings of the released model, and its own definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks.plain_torch import (
    PlainDiT,
    PlainStream,
)
from tests.conftest import relative_error

Load = Callable[[str], dict[str, Tensor]]
BLOCKS = 5
# float32 has 2^-24 = 6e-8 relative rounding per operation; the longest chain here (5 blocks that
# read each other's caches, 3 steps, 2 layers of about 10 sums of up to 512 terms) multiplies that
# by less than 150. The recordings' own README names the same bound.
FLOAT32_CHAIN = 1e-5


@pytest.fixture(scope="module")
def model(golden: Path, load_golden: Load) -> PlainDiT:
    config = json.loads((golden / "dit/config.json").read_text())
    return PlainDiT(config, load_golden("dit/diffusion_pytorch_model.safetensors"))


@pytest.fixture(scope="module")
def inputs(load_golden: Load) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_golden("dit/inputs.safetensors").items()}


def open_stream(model: PlainDiT, inputs: dict[str, Tensor], **settings: Any) -> PlainStream:
    conditioning = {name: inputs[name] for name in ("text", "clip", "y", "audio")}
    return PlainStream(model, **conditioning, **settings)


def renoise(inputs: dict[str, Tensor], block: int) -> list[Tensor]:
    return [inputs[f"renoise.{block}.{step}"] for step in range(3)]


def run_recorded(stream: PlainStream, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
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
    model: PlainDiT,
    inputs: dict[str, Tensor],
    load_golden: Load,
) -> None:
    expected = load_golden(f"dit/outputs_{recording}.safetensors")
    stream = open_stream(model, inputs, **settings)
    found = run_recorded(stream, inputs)
    for name in expected:
        if name[0] in "kv" and not name.startswith("velocity"):
            step, layer = map(int, name.split(".")[1:])
            found[name] = stream.cache(step, layer)[name[0] == "v"]
    errors = {name: relative_error(found[name], tensor) for name, tensor in expected.items()}
    assert len(errors) == tensors, f"tensors recorded: {sorted(errors)}"
    worst = max(errors, key=lambda name: errors[name])
    print(f"{recording}: {len(errors)} tensors, worst {worst} {errors[worst]:.2e}")
    assert errors[worst] <= FLOAT32_CHAIN, f"{worst}: relative error {errors[worst]:.2e}"
