"""`python -m benchmarks block` on two devices: the first one alone is timed in turn."""

from __future__ import annotations

import torch

from benchmarks import __main__ as command
from benchmarks import block, models
from benchmarks.headline import two_ms
from benchmarks.timing import Clock

PAIR = ["block", "--device", "cpu,cpu", "--size", "32x32"]


def test_two_devices_beside_the_first_one() -> None:
    loaded = models.load(command.parse([*PAIR, "--random-weights", "tiny"]))
    assert len(loaded.dit.devices) == 2 and len(loaded.dit.on_first().devices) == 1
    found = block.split(loaded, 2, Clock(torch.device("cpu")))
    assert found["one_ms"]["n"] == 2 and found["ratio"] > 0


def test_a_model_of_three_heads_gets_a_fourth_to_share() -> None:
    loaded = models.load(command.parse(PAIR))
    assert (models.MODELS["middle"].config["num_heads"], loaded.config["num_heads"]) == (3, 4)
    assert loaded.described()["sizes"]["num_heads"] == 4


def test_what_two_gpus_are_expected_to_take() -> None:
    assert two_ms(925, 1080) == (463.5, 554)
