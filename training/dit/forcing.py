"""What the context of a block is in training: Neighbor Forcing beside the three usual ways, small.

- neighbor: the block before at the same diffusion step (what `train` does and the engine runs).
- teacher: the clip's own latents, clean.
- diffusion: every block at a level of its own, clean among them.
- own: clean latents that the model made itself, block after block ("Self Forcing").

The last three need one more pass over each finished block, at level 0, to make its keys; at
inference they condition on what they made. Equal compute: every way has as many seconds of CPU
time, from the same weights; then it samples held-out clips, block after block, in three steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference import TIMESTEPS, DiT, KVCache, plan_block
from training.checkpoint import DIT_CONFIG
from training.dit.examples import Examples
from training.dit.train import (
    SIGMAS,
    STEPS,
    Batch,
    denoise,
    draw_batch,
    fresh_dit,
    hidden_matrix,
    motion_weights,
    noised,
)
from training.optimiser import Muon, split
from training.run import learning_rate

WAYS = ("neighbor", "teacher", "diffusion", "own")
CONFIG = DIT_CONFIG | {"dim": 128, "ffn_dim": 384, "num_heads": 1, "num_layers": 2}
CLEAN = STEPS  # the level of latents without noise: TIMESTEPS ends with 0


@dataclass(frozen=True)
class ForcingSettings:
    """seconds: of CPU time for each way. reports: how often it is sampled meanwhile."""

    seed: int = 0
    seconds: float = 240.0
    batch: int = 4
    rate: float = 3e-3
    warmup: int = 20
    reports: int = 4


def compare(
    examples: Examples, settings: ForcingSettings, config: Mapping[str, Any] = CONFIG
) -> list[dict[str, Any]]:
    """For each way and report: training steps, CPU seconds, and the error of each block."""
    return [line for way in WAYS for line in train_way(way, examples, settings, config)]


def train_way(
    way: str,
    examples: Examples,
    settings: ForcingSettings,
    config: Mapping[str, Any] = CONFIG,
    clock: Callable[[], float] = time.process_time,
) -> list[dict[str, Any]]:
    """The lines of one way. The last clips of the examples, a twentieth, are held out."""
    dit = fresh_dit(settings.seed, config)
    dit.narrow_rotation()
    optimiser = Muon(*split(dit, hidden_matrix), weight_decay=1e-3)
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    count = len(examples.person)
    held_out = max(4, count // 20)
    held = draw_batch(examples, torch.arange(count - held_out, count)[:8], examples.blocks)
    lines: list[dict[str, Any]] = []
    spent_s, steps = 0.0, 0
    while spent_s < settings.seconds:
        started_s = clock()
        done = spent_s / settings.seconds
        rate = learning_rate(round(1000 * done), settings.rate, 0, 1000)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / settings.warmup)
        chosen = torch.randint(count - held_out, (settings.batch,), generator=generator)
        batch = draw_batch(examples, chosen, examples.blocks)
        loss = forced_loss(dit, batch, way, steps)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimiser.step()
        steps += 1
        spent_s += clock() - started_s
        if spent_s >= settings.seconds * (len(lines) + 1) / settings.reports:
            errors = sampled_errors(dit, held, way)
            lines.append(
                {"way": way, "steps": steps, "cpu_s": round(spent_s, 1)}
                | {f"block_{block}": error for block, error in enumerate(errors)}
            )
            print(lines[-1], flush=True)
    return lines


def forced_loss(dit: DiT, batch: Batch, way: str, number: int) -> Tensor:
    """Of one training step. number: from 0; the diffusion step goes round with it."""
    step = number % STEPS
    weights = motion_weights(batch, 4.0)
    blocks = range(len(batch.latents))
    levels = [step] * len(blocks)
    if way == "diffusion":
        levels = [int(torch.randint(CLEAN + 1, ())) for _ in blocks]
    noisy = [noised(x, SIGMAS[level]) for x, level in zip(batch.latents, levels, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        if way == "neighbor":
            made = denoise(dit, batch, step, noisy)
        else:
            made, caches = [], empty(dit, batch)
            for block in blocks:
                x0, after = one_block(dit, batch, block, noisy[block], levels[block], caches)
                made.append(x0)
                if way == "diffusion":
                    caches = after
                elif block < blocks[-1]:
                    clean = batch.latents[block]
                    if way == "own":
                        clean = sampled_block(dit, batch, block, caches)
                    _, caches = one_block(dit, batch, block, clean, CLEAN, caches)
    errors = [
        (w * (x0 - truth).square()).mean()
        for w, x0, truth in zip(weights, made, batch.latents, strict=True)
    ]
    return torch.stack(errors).mean()


def empty(dit: DiT, batch: Batch) -> Sequence[KVCache]:
    """Before the first block."""
    height, width = batch.y.shape[3:]
    return dit.empty_caches(len(batch.y), (height, width))


def one_block(
    dit: DiT, batch: Batch, block: int, z: Tensor, level: int, caches: Sequence[KVCache]
) -> tuple[Tensor, Sequence[KVCache]]:
    """What a block at one level is cleaned to, and the caches with it."""
    plan = plan_block(block)
    y = batch.y[:, :, plan.first_slot : plan.end_slot]
    timestep = torch.tensor(TIMESTEPS[level])
    given = (z, y, timestep, batch.text[block], batch.image, batch.windows[block])
    velocity, after = dit(*given, caches, plan, skip_audio=level == 0)
    return z - SIGMAS[level] * velocity.float(), after


@torch.no_grad()
def sampled_block(dit: DiT, batch: Batch, block: int, caches: Sequence[KVCache]) -> Tensor:
    """A block made in three steps from noise, on a context that is the same in all of them."""
    z = torch.randn_like(batch.latents[block])
    for step in range(STEPS):
        x0, _ = one_block(dit, batch, block, z, step, caches)
        z = noised(x0, SIGMAS[step + 1])
    return x0


@torch.no_grad()
def sampled_errors(dit: DiT, batch: Batch, way: str) -> list[float]:
    """The mean squared error of each block of clips that are made as this way makes them."""
    made: list[Tensor] = []
    with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        if way == "neighbor":
            noisy = [torch.randn_like(latent) for latent in batch.latents]
            for step in range(STEPS):
                made = denoise(dit, batch, step, noisy)
                noisy = [noised(x0, SIGMAS[step + 1]) for x0 in made]
        else:
            caches = empty(dit, batch)
            for block in range(len(batch.latents)):
                made.append(sampled_block(dit, batch, block, caches))
                _, caches = one_block(dit, batch, block, made[-1], CLEAN, caches)
    return [
        float((x0 - truth).square().mean()) for x0, truth in zip(made, batch.latents, strict=True)
    ]
