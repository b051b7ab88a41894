"""Trains the speech encoder to say what the face does: mouth, lids, brows, nod of each frame.

It is trained on windows as the engine cuts them (`AudioFrontEnd`): up to 4 s of history and then
the 36 features of a block, or fewer at the beginning. The window matters, as the group norm spans
all of it.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from liveact.audio.chain import SAMPLES_PER_FEATURE
from training.data.clips import Clips
from training.data.motion import SPOKEN
from training.optimiser import Muon, split
from training.run import Run, learning_rate
from training.speech.model import SpeechEncoder

TARGETS = SPOKEN
SCALE = torch.tensor([0.24, 0.36, 0.33, 0.25, 0.2, 0.26, 0.13])  # their deviations
LONGEST = 136  # features: 100 of history and 36 of a block
# A window after block b ends two features after the last frame of the block.
_LENGTHS = (23, 55, 87, 119, LONGEST, LONGEST, LONGEST)


@dataclass(frozen=True)
class SpeechSettings:
    """How the speech encoder is trained."""

    seed: int = 0
    steps: int = 1500
    batch: int = 8
    rate: float = 4e-3
    warmup: int = 50


class SpeechTrainer(nn.Module):
    """The encoder and a linear read-out of its last layer that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SpeechEncoder()
        self.read_out = nn.Linear(self.encoder.config["hidden_size"], len(TARGETS))

    def forward(self, samples: Tensor, features: int) -> Tensor:
        """[B, n] -> [B, features, 7], in units of `SCALE`."""
        return self.read_out(self.encoder(samples, features)[:, :, -1])


def draw_windows(clips: Clips, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples [B, 640 * n] and targets [B, n, 7] of windows of one random length n."""
    n = _LENGTHS[int(torch.randint(len(_LENGTHS), (), generator=generator))]
    n = min(n, clips.motion.shape[1])
    samples, targets = [], []
    for _ in range(batch):
        clip = int(torch.randint(len(clips), (), generator=generator))
        start = int(torch.randint(clips.motion.shape[1] - n + 1, (), generator=generator))
        first = start * SAMPLES_PER_FEATURE
        samples.append(
            torch.from_numpy(clips.speech[clip, first : first + n * SAMPLES_PER_FEATURE])
        )
        targets.append(torch.from_numpy(clips.motion[clip, start : start + n, : len(TARGETS)]))
    return torch.stack(samples), torch.stack(targets) / SCALE


def correlations(trainer: SpeechTrainer, clips: Clips) -> dict[str, float]:
    """Of read-out and truth over all clips, in the last 36 frames of the longest window."""
    n = min(LONGEST, clips.motion.shape[1])
    with torch.no_grad():
        said = torch.cat(
            [
                trainer(torch.from_numpy(clips.speech[i : i + 1, : n * SAMPLES_PER_FEATURE]), n)
                for i in range(len(clips))
            ]
        )
    truth = torch.from_numpy(clips.motion[:, :n, : len(TARGETS)])
    pairs = torch.stack([said[:, -36:], truth[:, -36:] / SCALE]).flatten(1, 2)  # [2, N * 36, 7]
    return {name: float(torch.corrcoef(pairs[:, :, i])[0, 1]) for i, name in enumerate(TARGETS)}


def train_speech(
    clips: Clips,
    held_out: Clips,
    directory: Path,
    settings: SpeechSettings,
    *,
    stop_at: float = math.inf,
    device: str = "cpu",
) -> SpeechTrainer:
    """Trains, or goes on training, to `settings.steps` or the time `stop_at` (of `time.time`);
    returns the averaged encoder."""
    torch.manual_seed(settings.seed)
    trainer = SpeechTrainer().to(device)
    optimiser = Muon(*split(trainer, lambda name: "encoder.layers" in name or ".conv." in name))
    run = Run(directory, trainer, optimiser, asdict(settings), decay=0.99)
    generator = torch.Generator().manual_seed(settings.seed + 7919 * run.step)
    while run.step < settings.steps and time.time() < stop_at:
        run.set_rate(learning_rate(run.step, settings.rate, settings.warmup, settings.steps))
        samples, targets = draw_windows(clips, settings.batch, generator)
        said = trainer(samples.to(device), targets.shape[1])
        loss = (said - targets.to(device)).square().mean()
        norm = run.stepped(loss)
        if run.step % 100 == 0 or run.step == settings.steps:
            trainer.eval()
            found = correlations(trainer.cpu(), held_out)
            run.report(loss=float(loss.detach()), gradient=norm, **found)
            trainer.to(device).train()
    run.save()
    run.average.copy_to(trainer)
    return trainer.cpu()
