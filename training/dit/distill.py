"""Two ways to a sampler of three steps, from one teacher and with equal compute, small.

The teacher learns by Neighbor Forcing at every noise level (eq. 2 to 5 of the paper). From its
weights two students learn to make a block in three steps, all blocks going through a step together
(the rollout with the memory that `train` has):

- regression: the result of each step is pulled to the clip; what `train` does on-policy.
- dmd: the result of a step is moved to where the teacher finds it more likely, and from where a
  third network does, which learns meanwhile what the student makes (distribution matching, Yin et
  al. 2024, eq. 7 and 8; several steps of the third network for one of the student, as in DMD2).

Regression needs to know the clip and blurs what speech and prompt do not decide; distribution
matching needs three networks and knows no clip.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference import DiT
from training.dit.examples import Examples
from training.dit.forcing import CONFIG
from training.dit.train import (
    SIGMAS,
    STEPS,
    Batch,
    DitSettings,
    denoise,
    denoise_at,
    draw_batch,
    fresh_dit,
    hidden_matrix,
    noised,
    rollout,
)
from training.optimiser import Muon, split
from training.run import learning_rate

LOWEST, HIGHEST = 20, 980  # timesteps that are drawn: at the ends a score says nothing


@dataclass(frozen=True)
class DistillSettings:
    """teacher_s, student_s: CPU seconds of the teacher and of each student. dmd_rate: lower than
    the other student's: the third network has to keep up, `fake_steps` steps for one.
    """

    seed: int = 0
    teacher_s: float = 240.0
    student_s: float = 240.0
    batch: int = 4
    teacher_rate: float = 3e-3
    student_rate: float = 5e-4
    dmd_rate: float = 2e-4
    fake_steps: int = 5


class Learner:
    """A DiT with its optimiser, whose rate falls with the share of the time that is spent."""

    def __init__(self, dit: DiT, rate: float) -> None:
        self.dit, self.steps, self._rate = dit, 0, rate
        self._optimiser = Muon(*split(dit, hidden_matrix), weight_decay=1e-3)

    def step(self, loss: Tensor, spent: float) -> None:
        """One step down a loss. spent: from 0 to 1."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(round(1000 * spent), self._rate, 20, 1000)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.dit.parameters(), 1.0)
        self._optimiser.step()
        self.steps += 1


def compare(
    examples: Examples,
    settings: DistillSettings,
    config: Mapping[str, Any] = CONFIG,
    clock: Callable[[], float] = time.process_time,
) -> list[dict[str, Any]]:
    """A line for the teacher, sampled in three steps as it is, and for each student: its steps and
    how its samples of held-out clips are (`sample_quality`)."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    count = len(examples.person)
    held_out = max(4, count // 20)
    held = draw_batch(examples, torch.arange(count - held_out, count)[:8], examples.blocks)

    def drawn() -> Batch:
        chosen = torch.randint(count - held_out, (settings.batch,), generator=generator)
        return draw_batch(examples, chosen, examples.blocks)

    lines: list[dict[str, Any]] = []

    def finished(learner: Learner, name: str, seconds: float) -> None:
        found = sample_quality(learner.dit, held)
        lines.append({"network": name, "steps": learner.steps, "cpu_s": seconds} | found)
        print(lines[-1], flush=True)

    teacher = fresh_dit(settings.seed, config)
    teacher.narrow_rotation()
    learner = Learner(teacher, settings.teacher_rate)
    for _, spent in timed_steps(settings.teacher_s, clock):
        learner.step(score_loss(teacher, drawn()), spent)
    finished(learner, "teacher", settings.teacher_s)

    learner = Learner(copy.deepcopy(teacher), settings.student_rate)
    for _, spent in timed_steps(settings.student_s, clock):
        learner.step(regression_loss(learner.dit, drawn()), spent)
    finished(learner, "regression", settings.student_s)

    learner = Learner(copy.deepcopy(teacher), settings.dmd_rate)
    fake = Learner(copy.deepcopy(teacher), settings.student_rate)
    for number, spent in timed_steps(settings.student_s, clock):
        last = number % STEPS
        for _ in range(settings.fake_steps):
            batch = drawn()
            with torch.no_grad():
                made = sampled(learner.dit, batch, last)
            fake.step(score_loss(fake.dit, batch, made), spent)
        learner.step(dmd_loss(learner.dit, teacher, fake.dit, drawn(), last), spent)
    finished(learner, "dmd", settings.student_s)
    return lines


def timed_steps(seconds: float, clock: Callable[[], float]) -> Iterator[tuple[int, float]]:
    """Until the time is spent: the number of the step, from 1, and the share that was spent."""
    begun_s, number = clock(), 0
    while (spent_s := clock() - begun_s) < seconds:
        number += 1
        yield number, spent_s / seconds


def score_loss(dit: DiT, batch: Batch, latents: list[Tensor] | None = None) -> Tensor:
    """Neighbor Forcing at a timestep drawn for the batch: the error of the velocity (eq. 4).

    latents: of each block, in place of the clip's.
    """
    latents = batch.latents if latents is None else latents
    timestep = _drawn_timestep()
    noisy = [noised(x0, timestep / 1000) for x0 in latents]
    with torch.autocast("cpu", torch.bfloat16):
        made = denoise_at(dit, batch, timestep, noisy)
    errors = [(x0 - truth).square().mean() for x0, truth in zip(made, latents, strict=True)]
    return torch.stack(errors).mean() / (timestep / 1000) ** 2


def regression_loss(dit: DiT, batch: Batch) -> Tensor:
    """All three steps against the clip, as in `train` on-policy."""
    every = tuple(range(STEPS))
    losses = dict(rollout(dit, batch, DitSettings(on_policy=True), every))
    return torch.stack(list(losses.values())).sum()


def dmd_loss(student: DiT, teacher: DiT, fake: DiT, batch: Batch, last: int) -> Tensor:
    """Its gradient is that of the divergence between what the student makes in the sampler up to
    its step `last` and what the teacher knows, over the mean error of the teacher (eq. 7, 8)."""
    made = sampled(student, batch, last)
    timestep = _drawn_timestep()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        noisy = [noised(x0.detach(), timestep / 1000) for x0 in made]
        real = denoise_at(teacher, batch, timestep, noisy)
        own = denoise_at(fake, batch, timestep, noisy)
    losses = []
    for x0, likely, like_student in zip(made, real, own, strict=True):
        scale = (x0.detach() - likely).abs().mean().clamp_min(1e-3)
        target = x0.detach() - (like_student - likely) / scale
        losses.append(0.5 * (x0 - target).square().mean())
    return torch.stack(losses).mean()


def sampled(dit: DiT, batch: Batch, last: int = STEPS - 1) -> list[Tensor]:
    """What step `last` of the sampler makes of all blocks, with its gradient only."""
    grad = torch.is_grad_enabled()
    made = noisy = [torch.randn_like(latent) for latent in batch.latents]
    for step in range(last + 1):
        with torch.set_grad_enabled(grad and step == last), torch.autocast("cpu", torch.bfloat16):
            made = denoise(dit, batch, step, noisy)
        noisy = [noised(x0, SIGMAS[step + 1]) for x0 in made]
    return made


@torch.no_grad()
def sample_quality(dit: DiT, batch: Batch) -> dict[str, float]:
    """Of clips that the sampler makes, against the true ones. error: mean square. motion, spread:
    the size of the change from one latent frame to the next, and of the latents, over the true
    ones': below 1 where a sampler blurs."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = torch.cat(sampled(dit, batch), dim=2)
    true = torch.cat(batch.latents, dim=2)
    numbers = {
        "error": (made - true).square().mean(),
        "motion": made.diff(dim=2).std() / true.diff(dim=2).std(),
        "spread": made.std() / true.std(),
    }
    return {name: round(float(value), 4) for name, value in numbers.items()}


def _drawn_timestep() -> int:
    return int(torch.randint(LOWEST, HIGHEST + 1, ()))
