"""Where the time of a block goes, op by op, measured in place.

Models of one and of two layers of the same sizes run on a `TimedDevice`, which puts time marks
round every op. How often each op runs in a block of any number of layers follows exactly from the
two counts; how long one call takes is the median in the model of two layers. Each op is timed by
itself, with empty caches: the sum is therefore an upper bound of the block that runs undisturbed,
and how far it is above it is printed beside it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from benchmarks import spread
from benchmarks.models import IMAGE_TOKENS, PROMPT_TOKENS, Loaded
from benchmarks.timing import FLUSH_BYTES
from liveact import _core, _core_dev
from liveact.checkpoint.random import random_checkpoint
from liveact.dit.dit import Dit, MemoryPolicy
from liveact.dit.precision import PrecisionPolicy

STEADY_BLOCK = 2  # the first whose memory is full


@dataclass(frozen=True)
class Group:
    """One op in one block: `calls` times `ms` each."""

    op: str
    calls: int
    ms: float

    @property
    def total_ms(self) -> float:
        return self.calls * self.ms


def measure(loaded: Loaded, policy: MemoryPolicy) -> list[Group]:
    """Of a steady block, the most expensive first."""
    layers = int(loaded.config["num_layers"])
    one = _log(loaded, policy, 1)
    two = _log(loaded, policy, 2) if layers > 1 else one
    groups = []
    for op, times in two.items():
        calls = len(one[op]) + (layers - 1) * (len(times) - len(one[op]))
        groups.append(Group(op, calls, spread.percentile(times, 50)))
    return sorted(groups, key=lambda group: -group.total_ms)


def share_of(op: str, groups: list[Group]) -> float:
    """Of the sum of all groups."""
    return sum(g.total_ms for g in groups if g.op == op) / sum(g.total_ms for g in groups)


def _log(loaded: Loaded, policy: MemoryPolicy, layers: int) -> dict[str, list[float]]:
    """Milliseconds of every call of every op in a steady block of a model of `layers`."""
    sizes = loaded.dit.config
    config = loaded.config | {"num_layers": layers}
    weights = random_checkpoint(
        config,
        loaded.seed,
        audio_layers=1,
        audio_channels=int(sizes.audio_dim),
        clip_dim=int(sizes.image_dim),
        device=loaded.devices.torch_device,
    )
    core = _core.ModelConfig()
    for key in (name for name in dir(core) if not name.startswith("_") and name != "check"):
        setattr(core, key, getattr(sizes, key))
    core.num_layers = layers
    on_cpu = loaded.on_cpu
    # On the CPU nothing is launched, and what the op before left in the caches belongs to a block.
    timed = _core_dev.TimedDevice(loaded.devices.core, 0 if on_cpu else FLUSH_BYTES["cuda"])
    if loaded.devices.precision == "fp32":
        weights = {name: tensor.float() for name, tensor in weights.items()}
    precision = loaded.devices.precision
    if isinstance(precision, PrecisionPolicy):
        precision = replace(precision, layers=precision.layers[:layers])
    stream = Dit(timed, core, weights, precision).open_stream(
        loaded.latent_size, policy, 1.0, IMAGE_TOKENS
    )
    generator = torch.Generator().manual_seed(loaded.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    slots = sum(policy.slots)
    stream.set_image(random(IMAGE_TOKENS, core.image_dim), random(20, slots, *loaded.latent_size))
    stream.set_prompt(random(PROMPT_TOKENS, core.text_dim))
    for _ in range(STEADY_BLOCK + 1):
        timed.take()
        shape = (16, stream.frames_of_next_block, *loaded.latent_size)
        audio = random(stream.audio_rows_of_next_block, core.audio_dim)
        stream.denoise(random(*shape), random(2, *shape), audio)
    log: dict[str, list[float]] = defaultdict(list)
    for op, ms in timed.take():
        log[op].append(ms)
    return log
