"""Trains the DiT on what the runtime does: block by block, at the three noise levels.

A block's keys at a step come from the previous block at the same step (Neighbor Forcing, eq. 2-5
of the paper), so the gradient of a block reaches the blocks before it through the cached keys and,
from the third block on, through the taps of the memory (eq. 6-7). All blocks of a session go
through a step together.

First, each training step is one diffusion step, from noise in which the portrait stands for what
the diffusion step before would have made: so the network learns to take everything from the
portrait and the sound. Then (`on_policy`) a training step is the whole sampler, each step from the
re-noised result of the one before, as in inference; between the steps the gradient is cut.

The target is the clip itself. In a family where speech decides the picture this regression needs
no distillation: what it cannot predict it blurs, and `data.motion` leaves nothing such.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference import TIMESTEPS, DiT, KVCache, plan_block
from training.checkpoint import AUDIO_DIM, DIT_CONFIG, IMAGE_DIM
from training.dit.examples import Examples, windows_of
from training.optimiser import Muon, split
from training.run import Run, learning_rate

SIGMAS = tuple(t / 1000 for t in TIMESTEPS)
STEPS = len(SIGMAS) - 1
# Of a filter of the memory, the sum of magnitudes. Rounding to bf16 adds 2⁻⁹ of it at most, and
# then it is still at most 1.
MEMORY_GAIN = 1 - 2**-8


@dataclass(frozen=True)
class DitSettings:
    """How the DiT is trained.

    on_policy: see above. first_step_every: training steps from one with diffusion step 0 (which
    hears nothing, so that there is little to learn) to the next. blocks: of a training step; each
    `long_every`th has all that the examples have, so that the memory is trained.
    """

    seed: int = 0
    steps: int = 3000
    batch: int = 4
    blocks: int = 2
    long_every: int = 5
    rate: float = 2e-3
    warmup: int = 40
    motion_weight: float = 4.0
    first_step_every: int = 8
    on_policy: bool = False
    precision: str = "bfloat16"


@dataclass(frozen=True)
class Batch:
    """Sessions: y [B, 20, 14, h, w], image [B, tokens, dim], and for each block its text [B, rows,
    dim], latents [B, 16, n, h, w] and audio windows [B, 53, 5, layers, hidden]."""

    y: Tensor
    image: Tensor
    text: list[Tensor]
    latents: list[Tensor]
    windows: list[Tensor]

    def to(self, device: str) -> Batch:
        """The same there."""
        text, latents, windows = (
            [tensor.to(device) for tensor in some]
            for some in (self.text, self.latents, self.windows)
        )
        return Batch(self.y.to(device), self.image.to(device), text, latents, windows)


def fresh_dit(seed: int, config: Mapping[str, Any] = DIT_CONFIG) -> DiT:
    """A DiT whose layers add nothing yet: projections into the residual stream are zero, gates one,
    shifts and scales zero, and the memory is all but the mean of its five latent frames."""
    torch.manual_seed(seed)
    dit = DiT(config, clip_dim=IMAGE_DIM, audio_dim=AUDIO_DIM)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if name.endswith(("attn.o.weight", "attn.proj.weight", "ffn.2.weight", "bias")):
                parameter.zero_()
            elif "memory_proj" in name:
                parameter.fill_(MEMORY_GAIN / 5)
            elif name.endswith("modulation"):
                parameter.zero_()
                if name.startswith("blocks"):
                    parameter[:, [2, 5]] = 1.0
            elif name == "time_projection.1.weight":
                parameter.mul_(0.2)
    return dit


@torch.no_grad()
def contract_memory(dit: nn.Module) -> None:
    """Scales each filter of the memory down to a sum of magnitudes of at most `MEMORY_GAIN`.

    A part of slot 2 is compressed from slot 2 itself (`reference/layout.py`), once a block and for
    hours, and clips of five blocks do not show what a filter of gain 1.8 becomes. With at most 1
    what is remembered stays within what was once there.
    """
    for name, parameter in dit.named_parameters():
        if "memory_proj" in name:
            gain = parameter.abs().sum(dim=-1, keepdim=True)
            parameter.mul_((MEMORY_GAIN / gain).clamp(max=1))


def draw_batch(examples: Examples, chosen: Tensor, blocks: int) -> Batch:
    """The sessions of some clips, their first `blocks` blocks."""
    person = examples.person[chosen]
    every_text = nn.utils.rnn.pad_sequence(examples.text, batch_first=True)
    text = [every_text[examples.prompt[chosen, block]] for block in range(blocks)]
    latents, first = [], 0
    clip = examples.latents[chosen].float()
    for block in range(blocks):
        count = plan_block(block).frames
        latents.append(clip[:, :, first : first + count])
        first += count
    windows = [windows_of(examples.audio[b][chosen].float(), b) for b in range(blocks)]
    return Batch(examples.y[person].float(), examples.image[person], text, latents, windows)


def denoise(dit: DiT, batch: Batch, step: int, noisy: list[Tensor]) -> list[Tensor]:
    """One step of all blocks: noisy latents [B, 16, n, h, w] of each -> what it makes of them.

    The same as `DiTStream.denoise`, step by step instead of block by block.
    """
    return denoise_at(dit, batch, TIMESTEPS[step], noisy, skip_audio=step == 0)


def denoise_at(
    dit: DiT, batch: Batch, timestep: float, noisy: list[Tensor], *, skip_audio: bool = False
) -> list[Tensor]:
    """`denoise` at any timestep, 1 to 1000: a thousandth of it is the share of noise."""
    caches: list[KVCache] = dit.empty_caches(len(batch.y), tuple(batch.y.shape[3:]))  # type: ignore[arg-type]
    cleaned = []
    for block, z in enumerate(noisy):
        plan = plan_block(block)
        y = batch.y[:, :, plan.first_slot : plan.end_slot]
        at = torch.tensor(timestep, device=batch.y.device)
        given = (z, y, at, batch.text[block], batch.image, batch.windows[block])
        velocity, caches = dit(*given, caches, plan, skip_audio=skip_audio)
        cleaned.append(z - timestep / 1000 * velocity.float())
    return cleaned


def noised(latent: Tensor, sigma: float) -> Tensor:
    """With so much noise: eq. 2 of the paper."""
    return (1 - sigma) * latent + sigma * torch.randn_like(latent)


def motion_weights(batch: Batch, weight: float) -> list[Tensor]:
    """For each block [B, 1, n, h, w], mean 1: more where a latent is far from its clip's mean."""
    clip = torch.cat(batch.latents, dim=2)
    away = (clip - clip.mean(2, keepdim=True)).abs().mean(1, keepdim=True)
    weights = 1 + weight * (away / (away.mean() + 1e-6)).clamp(max=6)
    weights = weights / weights.mean()
    return list(weights.split([latent.shape[2] for latent in batch.latents], dim=2))


def rollout(
    dit: DiT, batch: Batch, settings: DitSettings, trained: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """The steps of all blocks from fresh noise: the loss of each, with a gradient for those in
    `trained`. It begins at the first of these, or at step 0 if there are none, with the portrait
    for what the step before would have made, of which re-noising leaves at most a sixth."""
    weights = motion_weights(batch, settings.motion_weight)
    noisy = [torch.randn_like(latent) for latent in batch.latents]
    first = min(trained, default=0)
    if first:
        portrait = batch.y[:, 4:, :1]
        sigma = SIGMAS[first]
        noisy = [(1 - sigma) * portrait + sigma * noise for noise in noisy]
    for step in range(first, 1 + max(trained, default=STEPS - 1)):
        with (
            torch.set_grad_enabled(step in trained and torch.is_grad_enabled()),
            torch.autocast(
                batch.y.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"
            ),
        ):
            cleaned = denoise(dit, batch, step, noisy)
        errors = [
            (w * (made - truth).square()).mean()
            for w, made, truth in zip(weights, cleaned, batch.latents, strict=True)
        ]
        yield step, torch.stack(errors).mean()
        noisy = [noised(made.detach(), SIGMAS[step + 1]) for made in cleaned]


def steps_of(step: int, settings: DitSettings) -> tuple[int, ...]:
    """The diffusion steps of a training step: the last one, which makes the picture, most often."""
    first = step % settings.first_step_every == 0
    if settings.on_policy:
        return (0, 1, 2) if first else (1, 2)
    return (0,) if first else (1,) if step % 3 == 1 else (2,)


def hidden_matrix(name: str) -> bool:
    """Whether Muon steps a parameter: the matrices between the first and the last layer."""
    return not name.startswith(("patch_embedding", "head", "time_embedding")) and not any(
        part in name for part in ("modulation", "memory_proj", "norm")
    )


def train_dit(
    examples: Examples,
    directory: Path,
    settings: DitSettings,
    *,
    stop_at: float = math.inf,
    config: Mapping[str, Any] = DIT_CONFIG,
    device: str = "cpu",
) -> DiT:
    """Trains, or goes on training, until `settings.steps` or the time `stop_at` (of `time.time`);
    returns the averaged DiT."""
    dit = fresh_dit(settings.seed, config).to(device)
    dit.narrow_rotation()
    optimiser = Muon(*split(dit, hidden_matrix), weight_decay=1e-3)
    changeable = frozenset(asdict(settings)) - {"seed"}
    run = Run(directory, dit, optimiser, asdict(settings), decay=0.99, changeable=changeable)
    generator = torch.Generator().manual_seed(settings.seed + 7919 * run.step)
    held_out = max(4, len(examples.person) // 20)
    held = draw_batch(examples, torch.arange(min(4, held_out)), examples.blocks).to(device)
    while run.step < settings.steps and time.time() < stop_at:
        run.set_rate(learning_rate(run.step, settings.rate, settings.warmup, settings.steps))
        count = len(examples.person) - held_out
        chosen = held_out + torch.randint(count, (settings.batch,), generator=generator)
        long = run.step % settings.long_every == 0
        batch = draw_batch(examples, chosen, examples.blocks if long else settings.blocks)
        batch = batch.to(device)
        trained = steps_of(run.step, settings)
        losses = dict(rollout(dit, batch, settings, trained))
        norm = run.stepped(torch.stack([losses[step] for step in trained]).sum(), contract_memory)
        if run.step % 10 == 0:
            run.report(
                **{f"step{step}": float(loss.detach()) for step, loss in losses.items()},
                gradient=norm,
                **(evaluate(dit, held, settings) if run.step % 100 == 0 else {}),
            )
    run.save()
    run.average.copy_to(dit)
    return dit.cpu()


@torch.no_grad()
def evaluate(dit: DiT, batch: Batch, settings: DitSettings) -> dict[str, float]:
    """Of a batch that is not trained on: the last step's loss, with and without its audio."""
    silent = Batch(
        batch.y,
        batch.image,
        batch.text,
        batch.latents,
        [torch.zeros_like(windows) for windows in batch.windows],
    )
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, given in (("held", batch), ("deaf", silent)):
            found[name] = dict(rollout(dit, given, settings, ()))[STEPS - 1]
    return {name: float(value) for name, value in found.items()}


def parameters(dit: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in dit.parameters())
